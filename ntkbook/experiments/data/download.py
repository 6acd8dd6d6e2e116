"""Polite downloads that can be broken off: four connections, partial files continued, each file whole or not there.
An archive is unpacked where it landed, and removed.

pooch checks a file's hash and moves it into place; what it lacks, going on where a broken download stopped, is in
`Transfer`. Every file that lands is recorded with its sha256 in `manifest.jsonl` at the cache's root.
"""

import gzip
import json
import os
import shutil
import tarfile
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock
import pooch
import requests
import urllib3
from tqdm import tqdm

CONNECTIONS = 4
ATTEMPTS = 4  # a file, while the server answers
PAUSE = 0.5  # seconds before the second attempt, then doubled
TIMEOUT = (5, 30)  # seconds to connect, and between two pieces of an answer
BUSY = {429, 500, 502, 503, 504}
UNPACKED = 1.2  # bytes that an archive's files take for each of its own: those here are images, which hardly shrink


@dataclass(frozen=True)
class Job:
    """One file to get: from `url` to `target`, with its size, about, and its hash (pooch's form) where it is fixed.

    Where `members` names files, `target` is a .tar.gz that has them in a folder of the same name as its own: they are
    unpacked beside it, and it is removed.
    """

    url: str
    target: Path
    hash: str | None
    size: int
    members: tuple[str, ...] = ()

    def is_done(self) -> bool:
        """True where all that this is to bring is on disk."""
        return all((self.target.parent / name).is_file() for name in self.members or (self.target.name,))

    def bytes_to_download(self) -> int:
        """What is still to come, about: a download that was broken off goes on."""
        part = self.target.with_name(self.target.name + ".part")
        return max(self.size - part.stat().st_size, 0) if part.is_file() else self.size

    def bytes_on_disk(self) -> int:
        """The room that this still takes, about; an archive is there together with its files for a moment."""
        return self.bytes_to_download() + (round(UNPACKED * self.size) if self.members else 0)


class DownloadError(OSError):
    """Files could not be downloaded. `failed` maps their names to the reasons; all others have landed."""

    def __init__(self, message: str, failed: dict[str, str]):
        super().__init__(message)
        self.failed = failed


class _TransferError(Exception):
    """One file's failure, with `again` where another attempt may help."""

    def __init__(self, message: str, again: bool = False):
        super().__init__(message)
        self.again = again


def download(jobs: list[Job], root: Path, progress: bool = True) -> None:
    """Gets all files, several at a time; a file that fails does not stop the others.

    One process at a time writes to a cache: the next one waits, and then finds the files there.

    Args:
        jobs: what to get, all of it into folders under `root`.
        root: the cache's folder, made where it is not there.
        progress: whether to show a progress bar, on stderr.

    Raises:
        DownloadError: before anything is downloaded, where the disk has not the room; at the end, naming the files that
            failed, the reasons and what to do by hand.
    """
    root.mkdir(parents=True, exist_ok=True)
    _check_room(root, [job for job in jobs if not job.is_done()])
    pooch.get_logger().setLevel("WARNING")  # a line a file would break the progress bar
    failed: dict[str, str] = {}
    bar = tqdm(total=0, unit="B", unit_scale=True, desc=f"{len(jobs)} files", disable=not progress)
    with filelock.FileLock(root / ".lock"), requests.Session() as session, bar:
        session.headers.update({"User-Agent": "ntkbook", "Accept-Encoding": "identity"})
        transfer = Transfer(session, bar)
        pool = ThreadPoolExecutor(CONNECTIONS)
        try:
            running = {pool.submit(transfer.get, job): job for job in jobs if not job.is_done()}
            bar.total = sum(job.size for job in running.values())
            for future in as_completed(running):
                job = running[future]
                try:
                    modified = future.result()
                    if job.members:
                        _unpack(job)
                    _record(root, job, modified)
                    bar.total += job.target.stat().st_size - job.size  # from here on known, not guessed
                    if job.members:
                        job.target.unlink()
                except (_TransferError, ValueError, OSError) as error:  # ValueError: pooch's, on a wrong hash
                    failed[job.target.name] = str(error)
        finally:
            pool.shutdown(cancel_futures=True)
    if failed:
        some = "; ".join(f"{name}: {reason}" for name, reason in sorted(failed.items())[:5])
        first = next(job for job in jobs if job.target.name in failed)
        raise DownloadError(
            f"{len(failed)} of {len(jobs)} files could not be downloaded, the rest is kept in {root}. {some}"
            f"{'; ...' if len(failed) > 5 else ''}. Run it again to go on where it stopped, or get {first.url} "
            f"(hash: {first.hash or 'not fixed, the file changes upstream'}) and put it into {first.target.parent}",
            failed,
        )


def _check_room(root: Path, jobs: list[Job]) -> None:
    need, free = sum(job.bytes_on_disk() for job in jobs), shutil.disk_usage(root).free
    if need > free:
        raise DownloadError(
            f"{len(jobs)} files need about {need / 1e6:.0f} MB of disk, and {free / 1e6:.0f} MB are free at {root}. "
            "Make room there, or put the files into another folder and name it in NTKBOOK_DATA",
            {job.target.name: "no room on the disk" for job in jobs},
        )


def _record(root: Path, job: Job, modified: str) -> None:
    """Appends one line to the manifest: what was got, from where, when, and its hash."""
    entry = {
        "file": job.target.relative_to(root).as_posix(),
        "url": job.url,
        "sha256": pooch.file_hash(str(job.target)),
        "bytes": job.target.stat().st_size,
        "retrieved": datetime.now(UTC).isoformat(timespec="seconds"),
        "last_modified": modified,
    }
    with (root / "manifest.jsonl").open("a", encoding="utf-8") as manifest:
        manifest.write(json.dumps(entry) + "\n")


def _unpack(job: Job) -> None:
    """Unpacks the members, all or none; removes an archive that is not what it should be.

    Nothing is written but files of exactly the names wanted, whatever else the archive has.
    """
    folder = job.target.parent
    aside = folder / f"{job.target.name}.unpacking"
    shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
    aside.mkdir()
    try:
        with tarfile.open(job.target, "r:gz") as archive:
            for name in job.members:
                content = archive.extractfile(f"{folder.name}/{name}")
                if content is None:
                    raise KeyError(f"{name} is no file in it")
                with content, (aside / name).open("wb") as file:
                    shutil.copyfileobj(content, file)
        for name in job.members:
            os.replace(aside / name, folder / name)
    except (EOFError, KeyError, tarfile.TarError, gzip.BadGzipFile, zlib.error) as error:
        job.target.unlink()
        raise _TransferError(f"what came is no archive with {', '.join(job.members)} ({error})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


class Transfer:
    """What the threads of one `download` share: session, progress bar, and whether any server has answered yet."""

    def __init__(self, session: requests.Session, bar: Any):
        self.session = session
        self.bar = bar
        self.lock = threading.Lock()
        self.answered = threading.Event()
        self.unreachable = threading.Event()

    def get(self, job: Job) -> str:
        """Downloads one file into its place and returns the server's date for it."""
        modified = ""

        def downloader(url: str, output_file: str, _: object) -> None:
            nonlocal modified
            part = job.target.with_name(job.target.name + ".part")
            modified = self._until_whole(job, part)
            os.replace(part, output_file)

        take: Any = downloader  # pooch's own type for it names its arguments otherwise than pooch's documentation
        pooch.retrieve(job.url, job.hash, job.target.name, job.target.parent, downloader=take)
        return modified

    def _until_whole(self, job: Job, part: Path) -> str:
        """Attempts until `part` is the whole file; what broken attempts got stays in it, for the next one or run."""
        for attempt in range(ATTEMPTS):
            if self.unreachable.is_set():  # without a network, waiting for each of many files would take minutes
                raise _TransferError("not tried, since the server can't be reached")
            try:
                modified = self._attempt(job, part)
                break
            except _TransferError as error:
                if not error.again or attempt == ATTEMPTS - 1:
                    raise
            time.sleep(PAUSE * 2**attempt)
        else:
            raise AssertionError("the last attempt either succeeds or raises")
        _tag(part).unlink(missing_ok=True)
        if job.target.suffix == ".gz":
            _check_gzip(part)
        if job.target.suffix == ".tif":
            _check_tiff(part)
        if job.target.suffix == ".hdf5":
            _check_hdf5(part)
        return modified

    def _attempt(self, job: Job, part: Path) -> str:
        """`_request`, with the library's errors told as ours."""
        try:
            return self._request(job, part)
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            if self.answered.is_set():
                raise _TransferError(f"the connection broke ({type(error).__name__})", again=True) from error
            self.unreachable.set()
            raise _TransferError(f"the server can't be reached ({type(error).__name__})") from error

    def _request(self, job: Job, part: Path) -> str:
        """One request, for what `part` lacks; returns the server's date for the file."""
        # Going on is safe only with the server's mark of the very file that was begun: upstream files change daily.
        tag = _tag(part).read_text(encoding="utf-8") if _tag(part).is_file() else ""
        have = part.stat().st_size if part.is_file() and tag else 0
        headers = {"Range": f"bytes={have}-", "If-Range": tag} if have else {}
        with self.session.get(job.url, headers=headers, timeout=TIMEOUT, stream=True) as answer:
            self.answered.set()
            if answer.status_code == 416:  # nothing after what we have: begin again
                part.unlink(missing_ok=True)
                raise _TransferError("the server refused to go on with the partial file", again=True)
            if answer.status_code not in (200, 206):
                busy = answer.status_code in BUSY
                raise _TransferError(f"HTTP status {answer.status_code} {answer.reason}", again=busy)
            if answer.status_code == 200:
                have = 0
                part.unlink(missing_ok=True)  # before the new mark: never the mark of one file beside another's bytes
            elif not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                part.unlink()
                raise _TransferError("the server went on from another place than asked", again=True)
            etag, modified = answer.headers.get("ETag", ""), answer.headers.get("Last-Modified", "")
            _tag(part).write_text(etag if etag and not etag.startswith("W/") else modified, encoding="utf-8")
            with part.open("ab" if have else "wb") as file:
                # not decoded: a .gz file stays one, whatever the server calls its encoding
                for piece in answer.raw.stream(1 << 16, decode_content=False):
                    file.write(piece)
                    with self.lock:
                        self.bar.update(len(piece))
        return modified


def _tag(part: Path) -> Path:
    return part.with_name(part.name + ".tag")


def _check_gzip(part: Path) -> None:
    """Removes what is not a whole gzip file, with an error."""
    try:
        if not part.stat().st_size:  # which gzip takes for a file without content
            raise EOFError("it is empty")
        with gzip.open(part) as file:
            while file.read(1 << 20):
                pass
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        part.unlink()
        raise _TransferError(f"what came is no whole gzip file ({error})") from error


def _check_tiff(part: Path) -> None:
    """Removes what is no whole TIFF file, such as a map server's page that says what went wrong, with an error."""
    import rasterio
    from rasterio.errors import RasterioError

    try:
        with rasterio.open(part, driver="GTiff") as file:
            file.read(1)
    except RasterioError as error:
        part.unlink()
        raise _TransferError(f"what came is no whole TIFF file ({error})") from error


def _check_hdf5(part: Path) -> None:
    """Removes what does not begin as an HDF5 file does, with an error."""
    with part.open("rb") as file:
        start = file.read(8)
    if start != b"\x89HDF\r\n\x1a\n":
        part.unlink()
        raise _TransferError(f"what came is no HDF5 file (it begins with {start!r})")
