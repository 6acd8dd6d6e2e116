"""What is common to all problems: agreement first, then a sweep of chunk sizes, then rounds in which all take turns."""

import gc
import math
import re
import signal
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ntkbook.experiments.products import measure

PROBES = 2000  # entries of the full answer that are compared with ours
LATE = "more than"  # how the reason of what exceeds the time limit begins
MEMORY = "out of memory"  # and of what exceeds that of memory


class Skipped(Exception):
    """A competitor that cannot take part, and why."""


@dataclass
class Competitor:
    """One way to the answer.

    Attributes:
        run: from a problem's inputs and a chunk size to the answer.
        chunk_sizes: those that are tried; None for the method's own choice.
        tolerance: largest error that still counts as agreement; the problem's unless given.
        cost: as `run`, but times itself: (answer, seconds, peak bytes). For other processes.
        agrees: False for what is timed for its own sake, such as one gradient.
        compare: what of the answer is compared; all of it unless given.
        prepare: called before, and not timed.
    """

    run: Callable[[tuple, int | None], Tensor]
    chunk_sizes: Sequence[int | None] = (None,)
    tolerance: float | None = None
    cost: Callable[[tuple, int | None], tuple[Tensor, float, float]] | None = None
    agrees: bool = True
    compare: slice = field(default_factory=lambda: slice(None))
    prepare: Callable[[tuple, int | None], None] = lambda inputs, size: None

    def answer(self, inputs: tuple, size: int | None) -> Tensor:
        self.prepare(inputs, size)
        return self.run(inputs, size)

    def measured(self, inputs: tuple, size: int | None) -> tuple[Tensor, float, float]:
        self.prepare(inputs, size)
        if self.cost is not None:
            return self.cost(inputs, size)
        answers: list[Tensor] = []
        seconds, peak = measure(lambda: answers.append(self.run(inputs, size)))
        return answers[0], seconds, peak


class Prepared:
    """A model made before the clock runs, for one n and chunk size at a time, and asked once for what it caches."""

    def __init__(self, make: Callable, predict: Callable) -> None:
        self.make, self.predict, self.models = make, predict, {}

    def prepare(self, inputs: tuple, size: int | None) -> None:
        if (len(inputs[0]), size) not in self.models:
            self.models = {(len(inputs[0]), size): self.make(inputs, size)}  # the one before is dropped
            self(inputs, size)

    def __call__(self, inputs: tuple, size: int | None) -> Tensor:
        return self.predict(self.models[len(inputs[0]), size], inputs, size)


@dataclass
class Case:
    """A problem that has been built.

    Attributes:
        inputs: what competitors are timed on; small: what they are checked on first.
        reference: the answer for `small`, in float64 and by another way than any competitor's, as far as there is one.
        competitors: by name; the first is ours, to which ratios are taken.
        floor: seconds that the multiply-adds which must be done take (see `floor.py`).
        tolerance: largest error relative to the largest entry.
        close: called at the end.
    """

    inputs: tuple
    small: tuple
    reference: Tensor
    competitors: Mapping[str, Competitor]
    floor: Callable[[], float]
    tolerance: float
    close: Callable[[], None] = lambda: None


@dataclass
class Limits:
    """Seconds of one call; bytes above the process as it is; a call slower than `once` seconds is timed once."""

    seconds: float = 120.0
    memory: float = 12e9
    once: float = 60.0


def error(answer: Tensor, reference: Tensor) -> float:
    """The largest difference relative to the largest entry; infinite for another shape and for NaN."""
    if answer.shape != reference.shape:
        return math.inf
    found = float((answer.double() - reference.double()).abs().max() / reference.double().abs().max())
    return math.inf if math.isnan(found) else found


def run_case(
    case: Case, repeats: int, limits: Limits, say: Callable[[str], None], too_slow: Mapping[str, str]
) -> dict[str, Any]:
    """All rows of a problem: a competitor that fails has its reason in its row, and the others are kept.

    `too_slow`: competitors that exceeded a limit at a smaller n, and where; they are not tried.
    """
    rows = [row(name, case, limits, too_slow.get(name)) for name in case.competitors]
    probes: dict[str, Tensor] = {}
    for entry in rows:
        if "reason" not in entry:
            sweep(entry, case, limits, probes)
        say(f"  {entry['name']}: " + (entry.get("reason") or f"{entry['median']:.4g} s"))
    for _ in range(repeats - 1):  # the first round is the best of the sweep's calls
        for entry in rows:
            if "reason" not in entry and entry["seconds"][0] <= limits.once:
                again = guarded(lambda entry=entry: timed(entry, case, limits), entry)
                if again is not None:
                    entry["seconds"].append(again)
    good = [entry for entry in rows if "reason" not in entry]
    for entry in good:
        entry["median"] = statistics.median(entry["seconds"])
    base = good[0]["median"] if good and good[0] is rows[0] else None
    for entry in good:
        entry["ratio"] = entry["median"] / base if base else None
    case.close()
    floor = case.floor()
    return {"rows": rows, "floor": floor, "floor_ratio": floor / base if base else None}


def row(name: str, case: Case, limits: Limits, too_slow: str | None) -> dict[str, Any]:
    """A competitor's row after its agreement on the small inputs has been looked at, and nothing timed."""
    competitor = case.competitors[name]
    tolerance = competitor.tolerance or case.tolerance
    entry: dict[str, Any] = {"name": name, "sweep": [], "seconds": [], "tolerance": tolerance, "error": 0.0}
    if too_slow:
        entry["reason"] = too_slow
    if too_slow or not competitor.agrees:
        return entry
    size = competitor.chunk_sizes[0]
    answer = guarded(lambda: limited(lambda: competitor.answer(case.small, size), limits), entry)
    if answer is not None:
        entry["error"] = error(answer[competitor.compare], case.reference[competitor.compare])
        if entry["error"] > tolerance:
            entry["reason"] = f"disagrees: error {entry['error']:.1e}, tolerance {tolerance:.0e}"
    return entry


def sweep(entry: dict[str, Any], case: Case, limits: Limits, probes: dict[str, Tensor]) -> None:
    """Each chunk size once; keep the best. What exceeds a limit ends it, unless a chunk size before went through."""
    competitor = case.competitors[entry["name"]]
    failed: dict[str, Any] = {}
    n = len(case.inputs[0])
    for size in dict.fromkeys(size and min(size, n) for size in competitor.chunk_sizes):
        found = guarded(lambda size=size: limited(lambda: competitor.measured(case.inputs, size), limits), failed)
        if found is None:
            entry["sweep"].append({"chunk_size": size, "reason": failed["reason"]})
            if failed["reason"].startswith(LATE):
                break
            continue
        answer, seconds, peak = found
        entry["sweep"].append({"chunk_size": size, "seconds": seconds, "peak": peak})
        if competitor.agrees:
            for other in case.competitors.values():  # ours, the first, in every form in which it is compared
                probes.setdefault(str(other.compare), probe(answer[other.compare]))
            ours = probes[str(competitor.compare)]
            entry["error"] = max(entry["error"], error(probe(answer[competitor.compare]), ours))
        del found, answer
        if seconds > limits.once:
            break
    done = [trial for trial in entry["sweep"] if "seconds" in trial]
    if not done:
        entry["reason"] = failed["reason"]
    elif entry["error"] > entry["tolerance"]:
        entry["reason"] = f"disagrees on all inputs: error {entry['error']:.1e}, tolerance {entry['tolerance']:.0e}"
    else:
        best = min(done, key=lambda trial: trial["seconds"])
        entry |= {"chunk_size": best["chunk_size"], "peak": best["peak"], "seconds": [best["seconds"]]}
        entry["median"] = best["seconds"]


def probe(answer: Tensor) -> Tensor:
    """Entries at which full answers are compared."""
    count = min(PROBES, answer.numel())
    return answer.flatten()[torch.arange(count) * (answer.numel() - 1) // max(1, count - 1)]


def timed(entry: dict[str, Any], case: Case, limits: Limits) -> float:
    competitor = case.competitors[entry["name"]]
    return limited(lambda: competitor.measured(case.inputs, entry["chunk_size"])[1], limits)


def guarded(call: Callable[[], Any], entry: dict[str, Any]) -> Any:
    """The call's result, or None and the reason in the row. Whatever somebody's library raises must not end the run."""
    try:
        return call()
    except Skipped as problem:
        entry["reason"] = f"skipped: {problem}"
    except TimeoutError as problem:
        entry["reason"] = str(problem)
    except Exception as problem:
        text = str(problem).strip().partition("\n")[0][:200]
        size = re.search(r"allocat\w+ (?:memory: you tried to allocate )?(\d+)", text)
        if size:
            entry["reason"] = f"{MEMORY}: {int(size[1]) / 1e9:.1f} GB at once"
        elif isinstance(problem, MemoryError):
            entry["reason"] = f"{MEMORY}: {text}"
        else:
            entry["reason"] = f"{type(problem).__name__}: {text}"
    gc.collect()
    return None


@contextmanager
def _limits(limits: Limits):
    """A timer that raises between two operations, and a limit on the data segment, where the system has them."""

    def late(*_: object) -> None:
        raise TimeoutError(f"{LATE} {limits.seconds:g} seconds")

    if sys.platform != "linux":
        yield
        return
    import resource

    old, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize() + int(limits.memory)
    before = signal.signal(signal.SIGALRM, late)
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (limit if hard < 0 else min(limit, hard), hard))
        signal.setitimer(signal.ITIMER_REAL, limits.seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_DATA, (old, hard))


def limited(call: Callable[[], Any], limits: Limits) -> Any:
    with _limits(limits):
        return call()
