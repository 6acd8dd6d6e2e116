"""Many runs of one chapter on a Dask cluster, and one table of their results."""

import itertools
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ntkbook.publish import cluster, runner
from ntkbook.publish.book import bare_notebook, checked_profile, runs_path, select
from ntkbook.publish.files import write_text
from ntkbook.publish.parameters import ParameterError, check_parameters, declared, from_here
from ntkbook.publish.runcard import ENVIRONMENT, environment
from ntkbook.publish.runner import Result

EXAMPLE = "such as 'grid: {seed: [0, 1]}' or 'jobs: [{seed: 3}]', and 'base: {...}' for what all jobs share"
CLAIM = ("claim", "criterion", "value", "low", "high", "n", "verdict", "data", "stand_in", "note")


@dataclass(frozen=True)
class Job:
    """One run of a sweep: what the sweep says of it, all its parameters, its folder and fingerprint."""

    label: str
    values: dict[str, Any]
    folder: Path
    mark: str


@dataclass(frozen=True)
class _Shared:
    """What all jobs of a sweep share; ``token`` is a file that is there while the sweep runs."""

    root: Path
    chapter: str
    nb: Any
    profile: str
    force: bool
    token: Path
    environment: dict[str, str]


def read_sweep(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a sweep's file says: the parameters that all jobs share, and each job's own, which win.

    ``grid`` maps names to lists of values, and makes a job of every combination; ``jobs`` is a list of jobs; ``base``
    is what they share.

    Raises:
        ValueError: the file is no YAML, has something else in it, or no job at all.
    """
    try:
        found = yaml.safe_load(path.read_text("utf8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if (
        not isinstance(found, dict)
        or not found.keys() <= {"grid", "jobs", "base"}
        or not found.keys() & {"grid", "jobs"}
    ):
        raise ValueError(f"{path}: expected grid, jobs or both, {EXAMPLE}; got {_short(found)}")
    grid, jobs, base = found.get("grid", {}), found.get("jobs", []), found.get("base", {})
    if not _is_named(grid) or not all(isinstance(values, list) and values for values in grid.values()):
        raise ValueError(f"{path}: grid: expected a list of values for each name, {EXAMPLE}; got {_short(grid)}")
    if not isinstance(jobs, list) or not all(_is_named(job) for job in jobs):
        raise ValueError(f"{path}: jobs: expected a list of parameters by name, {EXAMPLE}; got {_short(jobs)}")
    if not _is_named(base):
        raise ValueError(f"{path}: base: expected parameters by name, {EXAMPLE}; got {_short(base)}")
    combined = [dict(zip(grid, values)) for values in itertools.product(*grid.values())] if grid else []
    if not combined + jobs:
        raise ValueError(f"{path} has no jobs; expected some, {EXAMPLE}")
    return base, combined + jobs


def run_sweep(
    root: Path,
    chapter: str,
    path: str | Path,
    *,
    profile: str = "cpu",
    parameters: Mapping[str, Any] | None = None,
    force: bool = False,
    scheduler: str = "",
    workers: int = 0,
    progress: bool = True,
) -> list[Result]:
    """Run a chapter once for each job of a sweep, each into ``runs/<chapter>/sweep-<file>/<hash of parameters>/``
    (``sweep-<file>-<profile>`` for another profile than cpu).

    Beside the jobs' folders stands ``results.parquet``, written anew whenever a job ends: a row for each claim of each
    job, or a row without a claim for a job that failed, has none, or is pending. What succeeded before with the same
    fingerprint is not run again.

    Args:
        root: the book's folder, with ``_toc.yml``.
        chapter: one chapter as in :func:`ntkbook.publish.book.select`.
        path: the sweep's file, or the name of one in ``profiles/sweeps/``; see :func:`read_sweep`.
        profile: as in :func:`ntkbook.publish.runner.run`.
        parameters: further overrides for all jobs; none that a job sets itself.
        force: run even what has not changed.
        scheduler: the address of a running Dask scheduler, whose workers must see ``root`` under the same path.
        workers: without a scheduler, the number of workers; 0 for one a GPU or one per two cores.
        progress: a line on standard error for each job that ends.

    Returns:
        A result for each job, in the file's order; a job that comes twice runs once.

    Raises:
        ValueError, ParameterError: a wrong file, chapter, profile or parameter, or a folder of another sweep, before
            any run.
        ClusterError: no Dask, or a cluster that cannot run the jobs, before any run.
    """
    cluster.check_installed()
    if scheduler and workers:
        raise ValueError("--workers is of a cluster on this machine; a scheduler has its own workers")
    (name,) = select(root, [chapter])
    path = _find(root, Path(path))
    nb = bare_notebook(root, name)
    jobs = _plan(root, name, nb, path, profile, dict(parameters or {}), check_device=not scheduler)
    folder = jobs[0].folder.parent
    _claim(folder, path.resolve())
    table = Table(folder / "results.parquet", profile, jobs, declared(nb))
    results = {
        j.folder: Result(name, j.folder, "fresh") for j in jobs if not force and runner.is_fresh(j.folder, j.mark)
    }
    for job in jobs:
        if job.folder in results:
            table.add(job, results[job.folder])
    table.write()
    todo = [job for job in jobs if job.folder not in results]
    if progress and results:
        print(f"{len(results)} of {len(jobs)} jobs are done already", file=sys.stderr)
    if todo:
        cuda = any(str(job.values.get("device", "")).startswith("cuda") for job in todo)
        connected = cluster.remote(scheduler) if scheduler else cluster.local(len(todo), cuda=cuda, workers=workers)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".running-") as token, connected as client:
            shared = _Shared(root, name, nb, profile, force, Path(token.name), environment())
            cluster.check_workers(client, _check, shared, todo[0])
            for job, result in _as_completed(client, shared, todo):
                results[job.folder] = result
                table.add(job, result)
                table.write()
                if progress:
                    print(_line(job, list(results.values()), len(jobs)), file=sys.stderr)
    return [results[job.folder] for job in jobs]


class Table:
    """The results of a sweep, as Parquet; pyarrow's types come from the types that the chapter declares.

    Columns: ``job`` (its folder's name), ``status`` (done, failed, pending), ``error``, ``seconds``, ``peak_mib``,
    ``profile``; ``params.NAME`` for each parameter that profile or sweep set, null where a job leaves it at the
    chapter's default (lists as JSON); and the fields of a :class:`ntkbook.publish.verdicts.Record`.
    """

    def __init__(self, path: Path, profile: str, jobs: list[Job], kinds: Mapping[str, str]) -> None:
        import pyarrow as pa

        plain = {"int": pa.int64(), "float": pa.float64(), "bool": pa.bool_(), "str": pa.string()}
        names = dict.fromkeys(name for job in jobs for name in job.values)
        self.kinds = {name: kinds[name].replace(" | None", "") for name in names}
        self.as_json = {name for name, kind in self.kinds.items() if kind not in plain}
        fields = dict.fromkeys(("job", "status", "error", "seconds", "peak_mib", "profile"), pa.string())
        fields |= {f"params.{name}": plain.get(kind, pa.string()) for name, kind in self.kinds.items()}
        fields |= dict.fromkeys(CLAIM, pa.string()) | {"n": pa.int64(), "stand_in": pa.bool_()}
        fields |= dict.fromkeys(("seconds", "peak_mib", "value", "low", "high"), pa.float64())
        self.schema = pa.schema(list(fields.items()))
        self.path, self.profile = path, profile
        self.rows = {job.folder: [self._start(job, "pending")] for job in jobs}

    def add(self, job: Job, result: Result) -> None:
        """What became of a job: from its card and claims when it is done, otherwise the error."""
        start = self._start(job, "failed" if result.status == "failed" else "done")
        if result.status == "failed":
            self.rows[job.folder] = [start | {"error": result.error, "seconds": result.seconds or None}]
            return
        card, claims = (json.loads((job.folder / file).read_text("utf8")) for file in ("card.json", "claims.json"))
        start |= {"seconds": card["wall_seconds"], "peak_mib": card["peak_mib"]}
        self.rows[job.folder] = [start | {key: record[key] for key in CLAIM} for record in claims.values()] or [start]

    def write(self) -> None:
        """Write all rows; whoever reads meanwhile sees the table before or after."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [row for rows in self.rows.values() for row in rows]
        new = self.path.with_suffix(f".{os.getpid()}.tmp")
        pq.write_table(pa.Table.from_pylist(rows, schema=self.schema), new)
        new.replace(self.path)

    def _start(self, job: Job, status: str) -> dict[str, Any]:
        values = {key: json.dumps(v) if key in self.as_json else v for key, v in job.values.items()}
        parameters = {f"params.{key}": value for key, value in values.items()}
        return {"job": job.folder.name, "status": status, "profile": self.profile, **parameters}


def _find(root: Path, path: Path) -> Path:
    stored = root / "profiles" / "sweeps"
    for candidate in (path, stored / path.name):
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(p.name for p in stored.glob("*.yml"))) or "none"
    raise FileNotFoundError(f"no sweep {str(path)!r}; profiles/sweeps/ has {known}")


def _claim(folder: Path, path: Path) -> None:
    """Make a sweep's folder, which says whose it is; ValueError where it is that of another file of the same name."""
    mark = folder / ".file"
    owner = Path(mark.read_text("utf8")) if mark.exists() else path
    if owner != path and owner.exists():
        raise ValueError(f"{folder} has the results of {owner}; rename {path}, or remove that folder")
    write_text(mark, str(path))


def _plan(
    root: Path, name: str, nb: Any, path: Path, profile: str, extra: dict[str, Any], *, check_device: bool
) -> list[Job]:
    base, owns = read_sweep(path)
    folder = runs_path(root, name) / (f"sweep-{path.stem}" + ("" if profile == "cpu" else f"-{profile}"))
    jobs: dict[Path, Job] = {}
    given = checked_profile(root, profile, name, nb)
    for own in owns:
        twice = sorted(own.keys() & extra.keys())
        if twice:
            raise ParameterError(f"{twice[0]!r} is given by --params and by a job of {path}; take it out of one")
        values = {**given, **from_here({**base, **own, **extra})}
        check_parameters(nb, values, name)
        device = str(values.get("device", ""))
        if device.startswith("cuda:"):
            raise ParameterError(f"{name}: a job of a sweep sees one GPU: expected device 'cuda', got {device!r}")
        if check_device:
            runner.check_device(values, name)
        label = ", ".join(f"{key}={value}" for key, value in own.items()) or "defaults"
        place = folder / runner.run_key(profile, values)
        jobs.setdefault(place, Job(label, values, place, runner.fingerprint(root, name, nb, values)))
    return list(jobs.values())


def _check(shared: _Shared, job: Job) -> None:
    """On a worker: is it fit for the sweep's jobs?"""
    for key in ENVIRONMENT:
        os.environ.pop(key, None)
    os.environ.update(shared.environment)
    if not shared.token.exists():
        raise ValueError(f"it does not see {shared.token.parent}; a sweep needs a file system that all workers share")
    if runner.fingerprint(shared.root, shared.chapter, shared.nb, job.values) != job.mark:
        raise ValueError(
            "its ntkbook, Python, packages or requirements.lock differ from that of the sweep; install the same "
            "everywhere, and do not change files while a sweep runs"
        )


def _run(shared: _Shared, job: Job) -> Result:
    """On a worker: run a job, after a second sweep, or a worker that was given up but still runs it."""
    _check(shared, job)
    return runner.run_one(
        shared.root, shared.chapter, shared.nb, shared.profile, job.values, job.folder,
        force=shared.force, progress=False, label=f"{shared.chapter} ({job.label})",
    )  # fmt: skip


def _as_completed(client: Any, shared: _Shared, jobs: list[Job]) -> Any:
    """Pairs of job and result as jobs end; what a worker could not even start, or did not survive, has failed."""
    from distributed import as_completed

    futures = {client.submit(_run, shared, job, pure=False): job for job in jobs}
    try:
        for future, told in as_completed(futures, loop=client.loop, with_results=True, raise_errors=False):
            job = futures[future]
            if isinstance(told, Result):
                yield job, told
            else:
                why = told[1] if isinstance(told, tuple) else told
                error = f"{shared.chapter} ({job.label}): {type(why).__name__}: {why}"
                yield job, Result(shared.chapter, job.folder, "failed", error=error)
    finally:
        client.cancel(list(futures))


def _line(job: Job, results: list[Result], total: int) -> str:
    last, failed = results[-1], sum(result.status == "failed" for result in results)
    peak = f", {last.peak_mib:.0f} MiB" if last.peak_mib else ""
    counts = f"done {len(results) - failed}/{total}, failed {failed}"
    return f"{counts}: {job.label} {last.status} in {last.seconds:.0f} s{peak}"


def _is_named(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 100 else f"{text[:100]}…"
