"""Downloads against a local server that breaks off, forbids, lies and forgets."""

import gzip
import hashlib
import json
import random
import shutil
import socket
from types import SimpleNamespace

import pytest
from data_server import serve

from ntkbook.experiments.data import download as module
from ntkbook.experiments.data.download import DownloadError, Job, download

BODY = random.Random(0).randbytes(300_000)  # more than one piece, and incompressible


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 0.0)


def job(server, root, name, sha256=None):
    return Job(f"{server.url}/{name}", root / "folder" / name, sha256, 1000)


def landed(root):
    return sorted(path.name for path in (root / "folder").iterdir())


def test_files_land_whole_and_are_recorded(tmp_path):
    files = {f"/{n}.csv.gz": gzip.compress(f"{n},".encode() * 100) for n in range(12)}
    with serve(dict(files)) as server:
        download([job(server, tmp_path, name[1:]) for name in files], tmp_path, progress=False)
        assert server.most_at_once <= module.CONNECTIONS
    assert {f"/{path.name}": path.read_bytes() for path in (tmp_path / "folder").iterdir()} == files
    records = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert {record["file"]: record["sha256"] for record in records} == {
        f"folder{name}": hashlib.sha256(content).hexdigest() for name, content in files.items()
    }
    assert all(record["last_modified"].startswith("Mon, 01 Jan 2024") and record["bytes"] for record in records)


def test_progress_is_on_stderr(tmp_path, capsys):
    with serve({"/a": BODY}) as server:
        download([job(server, tmp_path, "a")], tmp_path)
    out, err = capsys.readouterr()
    assert out == ""
    assert "1 files: 100%" in err


def test_what_is_there_is_not_downloaded_again(tmp_path):
    with serve({"/a": BODY}) as server:
        download([job(server, tmp_path, "a")], tmp_path, progress=False)
        download([job(server, tmp_path, "a")], tmp_path, progress=False)
        assert len(server.requests) == 1


def test_a_broken_connection_is_continued(tmp_path):
    with serve({"/a": BODY}) as server:
        server.breaks["/a"] = [100_000, 50_000]
        download([job(server, tmp_path, "a")], tmp_path, progress=False)
        assert [asked for _, asked in server.requests] == [None, "bytes=100000-", "bytes=150000-"]
    assert (tmp_path / "folder" / "a").read_bytes() == BODY
    assert landed(tmp_path) == ["a"]


def test_the_next_run_goes_on_where_the_last_one_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ATTEMPTS", 1)
    with serve({"/a": BODY}) as server:
        server.breaks["/a"] = [100_000]
        with pytest.raises(DownloadError, match="the connection broke") as error:
            download([job(server, tmp_path, "a")], tmp_path, progress=False)
        assert list(error.value.failed) == ["a"]
        assert landed(tmp_path) == ["a.part", "a.part.tag"]
        download([job(server, tmp_path, "a")], tmp_path, progress=False)
        assert server.requests[-1] == ("/a", "bytes=100000-")
    assert (tmp_path / "folder" / "a").read_bytes() == BODY
    assert landed(tmp_path) == ["a"]


@pytest.mark.parametrize("how", ["changed", "no ranges"])
def test_begins_again_where_going_on_is_not_possible(tmp_path, monkeypatch, how):
    monkeypatch.setattr(module, "ATTEMPTS", 1)
    with serve({"/a": BODY}) as server:
        server.breaks["/a"] = [100_000]
        with pytest.raises(DownloadError):
            download([job(server, tmp_path, "a")], tmp_path, progress=False)
        if how == "changed":
            server.files["/a"] = BODY[::-1]
        else:
            server.ranges = False
        download([job(server, tmp_path, "a")], tmp_path, progress=False)
    assert (tmp_path / "folder" / "a").read_bytes() == server.files["/a"]


def test_a_partial_file_that_is_already_whole(tmp_path):
    with serve({"/a": BODY}) as server:
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "a.part").write_bytes(BODY)
        (tmp_path / "folder" / "a.part.tag").write_text(f'"{hash(BODY)}"')
        download([job(server, tmp_path, "a")], tmp_path, progress=False)
    assert (tmp_path / "folder" / "a").read_bytes() == BODY
    assert landed(tmp_path) == ["a"]


def test_a_busy_server_is_asked_again_and_a_missing_file_is_not(tmp_path):
    with serve({"/a": BODY, "/b": BODY}) as server:
        server.status["/a"] = [503, 429]
        with pytest.raises(DownloadError, match=r"(?s)1 of 3 files.*gone: HTTP status 404.*gone.*put it into") as error:
            download([job(server, tmp_path, name) for name in ("a", "gone", "b")], tmp_path, progress=False)
        assert list(error.value.failed) == ["gone"]
        assert f"{server.url}/gone" in str(error.value)
        assert [path for path, _ in server.requests].count("/a") == 3
        assert [path for path, _ in server.requests].count("/gone") == 1
    assert landed(tmp_path) == ["a", "b"]  # what could be had is kept


@pytest.mark.parametrize(
    "content", [gzip.compress(BODY)[:-100], b"<html>", gzip.compress(BODY)[:-8] + b"12345678", b""]
)
def test_what_is_no_whole_gzip_file_does_not_land(tmp_path, content):
    with serve({"/a.gz": content}) as server:
        if not content:
            server.status["/a.gz"] = [200]
        with pytest.raises(DownloadError, match=r"a\.gz: what came is no whole gzip file"):
            download([job(server, tmp_path, "a.gz")], tmp_path, progress=False)
    assert landed(tmp_path) == []
    assert not (tmp_path / "manifest.jsonl").exists()


def test_a_fixed_hash_is_checked(tmp_path):
    with serve({"/a": BODY, "/b": BODY}) as server:
        right = hashlib.sha256(BODY).hexdigest()
        jobs = [job(server, tmp_path, "a", right), job(server, tmp_path, "b", "0" * 64)]
        with pytest.raises(DownloadError, match=r"b: SHA256 hash.*does not match") as error:
            download(jobs, tmp_path, progress=False)
        assert f"hash: {'0' * 64}" in str(error.value)
    assert landed(tmp_path) == ["a"]


def test_without_a_server_one_attempt_tells_for_all(tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    jobs = [Job(f"http://127.0.0.1:{port}/{n}", tmp_path / "folder" / str(n), None, 10) for n in range(20)]
    with pytest.raises(DownloadError, match="can't be reached") as error:
        download(jobs, tmp_path, progress=False)
    reasons = list(error.value.failed.values())
    assert len(reasons) == 20
    assert sum("not tried" in reason for reason in reasons) >= 20 - module.CONNECTIONS


def test_a_disk_that_is_too_small_is_told_before_anything_is_downloaded(tmp_path, monkeypatch):
    with serve({"/a": b"x" * 100}) as server:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5_000_000))
        whole = Job(f"{server.url}/a", tmp_path / "a", None, 6_000_000)
        with pytest.raises(DownloadError, match=r"1 files need about 6 MB of disk, and 5 MB are free at .*Make room"):
            download([whole], tmp_path, progress=False)
        packed = Job(f"{server.url}/a", tmp_path / "a", None, 3_000_000, ("b",))  # there with its files for a moment
        with pytest.raises(DownloadError, match="need about 7 MB"):
            download([packed], tmp_path, progress=False)
        assert server.requests == []
        (tmp_path / "a.part").write_bytes(b"x" * 1_500_000)  # what is here already needs no room
        assert whole.bytes_to_download() == 4_500_000
        (tmp_path / "a.part").unlink()
        download([Job(f"{server.url}/a", tmp_path / "a", None, 4_000_000)], tmp_path, progress=False)
        assert (tmp_path / "a").read_bytes() == b"x" * 100
