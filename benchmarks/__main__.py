"""One command, one table, one plot: `python -m benchmarks`.

Every competitor in the same run with the same inputs; nothing is timed before it agrees with a reference in float64.
Resumable: what is in DIR/results.json already, with the same settings, is not measured again.
"""

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.harness import LATE, MEMORY, Limits, guarded, run_case
from benchmarks.problems import Problem, Settings, problems


def main(arguments: Sequence[str] | None = None, chosen: Sequence[Problem] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("--only", default="", help="groups, or parts of names, with commas: gram,products,n = 500")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small sizes, a minute or two: no result, a rehearsal")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--seconds", type=float, default=120.0, help="limit of one call; half of it: timed once")
    parser.add_argument("--memory", type=float, default=12.0, help="limit of one call, GB")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "ntkbook-benchmarks",
                        help="where environments for neural-tangents and laplace-torch are made")  # fmt: skip
    parser.add_argument("--no-install", action="store_true", help="make none")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    limits = Limits(options.seconds, options.memory * 1e9, options.seconds / 2)
    settings = Settings(options.cache.absolute(), not options.no_install)
    machine = {
        "torch": torch.__version__,
        "cpu": processor(),
        "threads": options.threads,
        "repeats": options.repeats,
        "quick": options.quick,
        "seconds": options.seconds,
        "memory": options.memory,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine, "problems": {}}
    stored = options.out / "results.json"
    if stored.exists():
        before = json.loads(stored.read_text("utf8"))
        if before["machine"] != machine:
            raise SystemExit(f"{stored} was measured with other settings, {before['machine']}: choose another --out.")
        results = before
    wanted = [part.strip() for part in options.only.split(",") if part.strip()]
    order = problems(options.quick) if chosen is None else chosen
    for problem in order:
        if wanted and not any(part == problem.group or part in problem.name for part in wanted):
            continue
        if problem.name in results["problems"]:
            continue
        print(problem.name, flush=True)
        found: dict[str, Any] = {}
        beyond = too_slow(problem.name, results["problems"])

        def run(problem: Problem = problem, beyond: dict[str, str] = beyond) -> dict[str, Any]:
            return run_case(problem.build(settings), options.repeats, limits, say, beyond)

        done = guarded(run, found)
        measured = {**results["problems"], problem.name: found if done is None else done}
        places = {known.name: place for place, known in enumerate(order)}
        results["problems"] = dict(sorted(measured.items(), key=lambda item: places.get(item[0], len(places))))
        report.write(results, options.out)
    print(f"{options.out / 'table.md'}, {options.out / 'plot.svg'}")
    return results


def too_slow(name: str, problems: dict[str, Any]) -> dict[str, str]:
    """Who exceeded a limit of time or memory on the same network at a smaller n: what larger ones spare."""
    family, found = name.partition(", n =")[0], {}
    for other, result in problems.items():
        if other.partition(", n =")[0] == family and "vectors" not in name:
            for row in result.get("rows", ()):
                if row.get("reason", "").startswith((LATE, MEMORY)):
                    found[row["name"]] = f'not tried: {row["reason"]} in "{other}"'
    return found


def say(text: str) -> None:
    print(text, flush=True)


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
