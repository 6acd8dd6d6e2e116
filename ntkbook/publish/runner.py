"""Running chapters with profiles and parameters into ``runs/``."""

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ntkbook.publish import results
from ntkbook.publish.book import bare_notebook, checked_profile, runs_path, select
from ntkbook.publish.book import chapters as chapters  # chapters of the book and others look for these two here
from ntkbook.publish.book import find_root as find_root
from ntkbook.publish.claims import collect, collect_data
from ntkbook.publish.parameters import ParameterError, check_parameters, from_here
from ntkbook.publish.runcard import commit, fingerprint, is_fresh, read_run, run_card, stamp, write_json


class Interrupted(Exception):
    """Ctrl-C while chapters ran; the message says what is kept, and what the same command does next."""


@dataclass(frozen=True)
class Result:
    """How the run of one chapter ended. ``status`` is done, fresh (nothing had changed), failed or interrupted."""

    chapter: str
    folder: Path
    status: str
    seconds: float = 0.0
    peak_mib: float | None = None
    error: str = ""

    @property
    def notebook(self) -> Path:
        """The executed notebook; up to the cell that failed, or in which the run was interrupted."""
        return self.folder / "notebook.ipynb"

    @property
    def line(self) -> str:
        """The result in one line."""
        if self.status == "fresh":
            return f"{self.chapter}: nothing changed, kept"
        peak = f", {self.peak_mib:.0f} MiB" if self.peak_mib else ""
        error = f"\n{self.error}" if self.error else ""
        return f"{self.chapter}: {self.status} in {self.seconds:.0f} s{peak}{error}"


def run(
    root: Path,
    wanted: Iterable[str] = (),
    *,
    profile: str = "cpu",
    parameters: Mapping[str, Any] | None = None,
    force: bool = False,
    progress: bool = True,
    after: Callable[[Result], Result] | None = None,
) -> list[Result]:
    """Run chapters, each into ``runs/<chapter>/<profile or hash of parameters>/``; a failure does not stop the others.

    Args:
        root: the book's folder, with ``_toc.yml``.
        wanted: chapters as in :func:`select`.
        profile: ``cpu`` or the name of a file in ``profiles/``.
        parameters: further overrides, the same for all the chapters.
        force: run even what has not changed.
        progress: bars on standard error, one overall and one a chapter.
        after: called with each result as it comes; gives the one to report.

    Raises:
        ValueError, ParameterError: an unknown chapter, profile or parameter, or one of the wrong type, before any run.
        Interrupted: Ctrl-C. Chapters that were done are kept and fresh. The one that ran is kept up to its last whole
            cell, but run from its start again: what its cells made lives in the kernel's memory alone.
    """
    from tqdm import tqdm

    names = select(root, wanted)
    plans = [(name, _plan(root, name, profile, dict(parameters or {}))) for name in names]
    done: list[Result] = []
    with tqdm(plans, desc="chapters", unit="chapter", file=sys.stderr, disable=not progress, ncols=90) as bar:
        for name, (nb, values) in bar:
            folder = runs_path(root, name) / (run_key(profile, values) if parameters else profile)
            try:
                result = run_one(root, name, nb, profile, values, folder, force=force, progress=progress)
            except KeyboardInterrupt:
                raise Interrupted(
                    f"interrupted in {name}: what it had done is in {folder.relative_to(root)}; {len(done)} of "
                    f"{len(plans)} chapters were done before and are kept; the same command goes on with {name}, from "
                    "its start" + (" (without --force, which runs all again)" if force else "") + _kept(folder)
                ) from None
            done.append(after(result) if after else result)
            tqdm.write(done[-1].line, file=sys.stderr)
    return done


def check_device(values: Mapping[str, Any], name: str) -> None:
    """ParameterError when the parameters want a GPU that is not there."""
    device = str(values.get("device", ""))
    if device.startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            raise ParameterError(f"{name}: device {device!r} wants a GPU, but torch sees none here")
        known = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        if device not in known:
            raise ParameterError(f"{name}: no device {device!r}; torch sees {', '.join(known)} here")


def _plan(root: Path, name: str, profile: str, extra: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    nb = bare_notebook(root, name)
    values = {**checked_profile(root, profile, name, nb), **from_here(extra)}
    check_parameters(nb, values, name)
    check_device(values, name)
    return nb, values


def run_key(profile: str, values: Mapping[str, Any]) -> str:
    """A folder's name for a profile and parameters: ten hexadecimal digits."""
    return hashlib.sha256(json.dumps([profile, values], sort_keys=True).encode()).hexdigest()[:10]


def run_one(
    root: Path,
    name: str,
    nb: Any,
    profile: str,
    values: dict[str, Any],
    folder: Path,
    *,
    force: bool = False,
    progress: bool = True,
    label: str = "",
) -> Result:
    """Run a chapter with parameters that were checked into ``folder``, unless what is there is fresh.

    Args:
        root, name, nb: the book's folder, the chapter and its bare notebook.
        profile, values: the profile's name and all overrides, its own among them.
        folder: gets ``notebook.ipynb``, ``card.json``, ``claims.json``, and the chapter's ``figures`` and ``tables``.
        force: run even what has not changed.
        progress: a bar over cells on standard error.
        label: what messages call it; the chapter's name unless given.

    An earlier run that succeeded is moved to `previous` meanwhile, and removed when this one has succeeded too. Another
    process that runs into the same folder is waited for.

    Raises:
        KeyboardInterrupt: after writing card and claims of what was done until then.
    """
    mark = fingerprint(root, name, nb, values)
    with _alone(folder, label or name):
        if not force and is_fresh(folder, mark):
            return Result(name, folder, "fresh")
        _set_aside(folder)
        return _run_into(folder, root, name, nb, profile, values, mark, label or name, progress)


def _run_into(
    folder: Path, root: Path, name: str, nb: Any, profile: str, values: dict[str, Any], mark: str, label: str,
    progress: bool,
) -> Result:  # fmt: skip
    from ntkbook.publish.execution import ChapterError, execute

    notebook = folder / "notebook.ipynb"
    start, status, error, peak = time.monotonic(), "interrupted", "", None
    state = commit(root, name)
    try:
        peak = execute(nb, notebook, values, cwd=root / "book", name=label, progress=progress)
        status = "done"
    except ChapterError as failure:
        status, error = "failed", str(failure)
    except Exception as failure:  # such as a kernel that does not start: the other chapters may run all the same
        status, error = "failed", f"{label}: {type(failure).__name__}: {failure}"
    finally:
        seconds, data, claims = time.monotonic() - start, {}, {}
        try:
            if notebook.exists():
                data, claims = collect_data(notebook), {k: asdict(v) for k, v in collect(notebook).items()}
        except Exception as failure:  # a notebook cut short, or values glued in another form
            unread = f"{label}: expected data and claims in {notebook}; {type(failure).__name__}: {failure}"
            status, error = "failed" if status == "done" else status, error or unread
        if status == "failed":
            error += _kept(folder, "\n  ")
        result = Result(name, folder, status, seconds, peak, error)
        write_json(folder / "claims.json", claims)
        write_json(
            folder / "card.json", {**run_card(result, profile, values, data, state), "fingerprint": stamp(mark, data)}
        )
    if status == "done":
        shutil.rmtree(previous(folder), ignore_errors=True)
    return result


def previous(folder: Path) -> Path:
    """Where the earlier run of a folder is while a new one runs, and until one succeeds."""
    return folder.with_name(f"{folder.name}.previous")


def _kept(folder: Path, between: str = "; ") -> str:
    return f"{between}the last run that succeeded is kept in {previous(folder)}" if previous(folder).exists() else ""


def _set_aside(folder: Path) -> None:
    """Make room for a new run: of the earlier ones, the last that succeeded is kept."""
    if read_run(folder).get("status") == "done":
        shutil.rmtree(previous(folder), ignore_errors=True)
        folder.rename(previous(folder))
    folder.mkdir(parents=True, exist_ok=True)
    for old in ("card.json", "claims.json", "notebook.ipynb"):
        (folder / old).unlink(missing_ok=True)
    results.clear(folder)


@contextmanager
def _alone(folder: Path, label: str) -> Iterator[None]:
    """One process at a time in a run's folder, as two would write into one notebook."""
    import filelock

    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"{label}: waiting for another process, which runs it into {folder}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
