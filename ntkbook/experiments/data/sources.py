"""Where data comes from: one order of places to look in, for what is in `registry`, and a record of what was used.

A file is looked for in `$NTKBOOK_DATA`, then in the user's cache, then downloaded into that cache. What a data set
does when none of these has it (an embedded stand-in, or an error) is for its loader to say: see `precipitation`.
`NTKBOOK_OFFLINE=1` never touches the network. All folders have the same layout, which `DataSet.folder` names.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pooch

from .registry import HAVE_STAND_INS, REGISTRY, DataSet


@dataclass(frozen=True)
class Provenance:
    """Which data was used: shown at the top of a chapter and beside every claim.

    `source` is "real" (what the paper used, or made by the paper's own process), "embedded" (real, but other data than
    the paper's, which an installed package carries) or "made-up". `sha256` is one digest over all `files`, see
    `digest`; empty where there are none.
    """

    name: str
    source: str
    description: str
    files: int
    sha256: str
    licence: str
    citation: str
    url: str

    @property
    def is_stand_in(self) -> bool:
        """True where the data is not the paper's kind of data, so that no claim may be judged on it."""
        return self.source != "real"

    def banner(self) -> str:
        """One line of Markdown that says which data this is."""
        number = f"{self.files} file{'s' if self.files != 1 else ''}"
        files = f" {number}, sha256 `{self.sha256[:12]}…`." if self.files else ""
        link = f" [Source]({self.url})." if self.url else ""
        verdict = " A stand-in: **no claim is evaluated on it.**" if self.is_stand_in else ""
        kind = self.source if self.files or self.is_stand_in else "generated"
        return f"**Data ({kind}):** {self.description}.{files} Licence: {self.licence}.{link}{verdict}"


@dataclass(frozen=True)
class Status:
    """Where one data set would come from now.

    `where` is "NTKBOOK_DATA", "cache", "NTKBOOK_DATA and cache", "download", "embedded" (a stand-in, made up or not),
    "made here" or "missing".
    """

    name: str
    title: str
    where: str
    folder: str
    files: int
    files_wanted: int
    bytes_on_disk: int
    bytes_to_download: int


@dataclass(frozen=True)
class Need:
    """What `fetch` would do: files that are missing of those wanted, and bytes, about, that it downloads, that it takes
    of the disk at most meanwhile, and that are free where it puts them, in `folder`."""

    missing: int
    wanted: int
    bytes_to_download: int
    bytes_on_disk: int
    bytes_free: int
    folder: str


class DataNotFoundError(FileNotFoundError):
    """Files are in no place that may be looked in. The message names URL, hash and the folder to put them in."""


def cache_dir() -> Path:
    """The user's cache folder: where downloads land."""
    return Path(pooch.os_cache("ntkbook"))


def offline() -> bool:
    """True where `NTKBOOK_OFFLINE` forbids the network."""
    return os.environ.get("NTKBOOK_OFFLINE", "") not in ("", "0")


def data_folders(data_dir: str | Path | None = None) -> list[Path]:
    """The folders to look in, in order: `data_dir` alone where given, else `$NTKBOOK_DATA` and the cache.

    Raises:
        DataNotFoundError: `data_dir` or `$NTKBOOK_DATA` is no folder.
    """
    given = data_dir or os.environ.get("NTKBOOK_DATA", "")
    if given and not Path(given).is_dir():
        what = "data_dir" if data_dir else "NTKBOOK_DATA"
        raise DataNotFoundError(f"{what} must be an existing folder; {given} is none. Correct it, or leave it empty")
    if data_dir:
        return [Path(data_dir)]
    return ([Path(given)] if given else []) + [cache_dir()]


def locate(dataset: DataSet, files: Iterable[str], data_dir: str | Path | None = None) -> dict[str, Path]:
    """File name -> path, for those of `files` that are on disk; never touches the network."""
    folders = [folder / dataset.folder for folder in data_folders(data_dir)]
    found: dict[str, Path] = {}
    for file in files:
        path = next((folder / file for folder in folders if (folder / file).is_file()), None)
        if path is not None:
            found[file] = path
    return found


def obtain(
    dataset: DataSet, files: Iterable[str], data_dir: str | Path | None = None, progress: bool = True
) -> dict[str, Path]:
    """File name -> path for all `files`: from disk where they are, else downloaded into the cache.

    Raises:
        DataNotFoundError: some are not on disk, and `data_dir` was given or `NTKBOOK_OFFLINE` is set.
        DownloadError: some could not be downloaded; those that could are kept.
    """
    files = list(files)
    found = locate(dataset, files, data_dir)
    missing = [file for file in files if file not in found]
    if missing and (data_dir or offline()):
        raise DataNotFoundError(_missing(dataset, missing, len(files), data_dir))
    if missing:
        from .download import download

        download(_jobs(dataset, missing), root=cache_dir(), progress=progress)
        found |= {file: cache_dir() / dataset.folder / file for file in missing}
    return {file: found[file] for file in files}


def _jobs(dataset: DataSet, missing: list[str]) -> list[Any]:
    from .download import Job  # needs requests: only where something is downloaded

    target = cache_dir() / dataset.folder
    if missing and dataset.archive:
        address, known = dataset.address(dataset.archive), dataset.known_hash(dataset.archive)
        return [Job(address, target / dataset.archive, known, dataset.size, tuple(missing))]
    return [Job(dataset.address(f), target / f, dataset.known_hash(f), dataset.size) for f in missing]


def _missing(dataset: DataSet, missing: list[str], wanted: int, data_dir: str | Path | None) -> str:
    first = missing[0]
    folder = Path(data_dir or cache_dir()) / dataset.folder
    why = f"data_dir is {data_dir}, and only it is looked in" if data_dir else "NTKBOOK_OFFLINE forbids the download"
    also = "" if data_dir else f", or under {dataset.folder} in a folder that NTKBOOK_DATA names"
    put = "unpack its files" if dataset.archive else "put it"
    return (
        f"{dataset.name}: {len(missing)} of {wanted} files are not on this machine ({', '.join(missing[:3])}"
        f"{', ...' if len(missing) > 3 else ''}), and {why}. Get {dataset.address(first)} (hash: "
        f"{dataset.known_hash(first) or 'not fixed, the file changes upstream'}) and {put} into {folder}{also}"
    )


def digest(paths: Iterable[Path]) -> str:
    """One sha256 over files: that of `sha256sum`'s lines for them, in the order of their names."""
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in paths]
    return hashlib.sha256("".join(sorted(lines, key=lambda line: line[66:])).encode()).hexdigest()


def fetch(name: str, stations: str | list[str] | None = None, progress: bool = True) -> list[Path]:
    """Makes sure that the files of a data set are on this machine, and returns their paths.

    Args:
        name: a key of `REGISTRY`. What is generated, or carried by a package, has no files: nothing happens.
        stations: for "precipitation": "midwest" (where None), "all" or station ids.

    Raises:
        ValueError: there is no such data set, or no such station.
        DataNotFoundError, DownloadError: as `obtain`.
    """
    dataset, files = _wanted(name, stations, progress)
    return list(obtain(dataset, files, progress=progress).values())


def need(name: str, stations: str | list[str] | None = None) -> Need:
    """What `fetch` with the same arguments would download, and what room it needs; raises ValueError as it does.

    All stations are known from their list alone, which is downloaded for this where it is not here (11 MB).
    """
    dataset, files = _wanted(name, stations, progress=False)
    found = locate(dataset, files)
    missing = [file for file in files if file not in found]
    jobs, folder = _jobs(dataset, missing), cache_dir() / dataset.folder
    there = next(place for place in (folder, *folder.parents) if place.is_dir())
    return Need(
        missing=len(missing),
        wanted=len(files),
        bytes_to_download=sum(job.bytes_to_download() for job in jobs),
        bytes_on_disk=sum(job.bytes_on_disk() for job in jobs),
        bytes_free=shutil.disk_usage(there).free,
        folder=str(folder),
    )


def status() -> list[Status]:
    """Where each data set would come from now, with its size; never touches the network."""
    return [_status(name) for name in REGISTRY]


def _wanted(name: str, stations: str | list[str] | None, progress: bool) -> tuple[DataSet, list[str]]:
    from .stations import resolve  # stations.py itself gets its list from here

    if name not in REGISTRY:
        raise ValueError(f"expected one of the data sets {', '.join(REGISTRY)}; got {name!r}")
    dataset = REGISTRY[name]
    if name == "precipitation":
        return dataset, [f"{station}.csv.gz" for station in resolve(stations or "midwest", progress=progress)]
    return dataset, list(dataset.files)


def _status(name: str) -> Status:
    dataset, files = _wanted(name, None, progress=False)
    found = locate(dataset, files)
    if len(found) < len(files) and dataset.instead and (other := locate(dataset, [dataset.instead])):
        files, found = [dataset.instead], other
    cached = sum(path.is_relative_to(cache_dir()) for path in found.values())
    places = (["NTKBOOK_DATA"] if cached < len(found) else []) + (["cache"] if cached else [])
    missing = len(files) - len(found)
    if not missing or (found and dataset.some_are_enough):
        where = " and ".join(places) or ("embedded" if dataset.size else "made here")
    elif offline():
        where = "embedded" if name in HAVE_STAND_INS and not found else "missing"
    else:
        where = "download"
    folder = str(next(iter(found.values()), cache_dir() / dataset.folder / "x").parent) if files else ""
    size = sum(path.stat().st_size for path in found.values()) if files else dataset.size
    downloads = min(missing, 1) if dataset.archive else missing
    return Status(name, dataset.title, where, folder, len(found), len(files), size, downloads * dataset.size)
