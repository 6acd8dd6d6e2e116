"""CIFAR-10: the binary layout byte by byte, the archive that is downloaded and unpacked, and what stands in for it."""

import dataclasses
import gzip
import hashlib
import io
import json
import os
import tarfile

import numpy as np
import pytest
import torch
from data_server import serve
from hypothesis import given
from hypothesis import strategies as st

from ntkbook.experiments.data import cifar, sources
from ntkbook.experiments.data.cifar import CLASSES, ColourImages, load_cifar, standardised
from ntkbook.experiments.data.download import DownloadError
from ntkbook.experiments.data.registry import REGISTRY
from ntkbook.experiments.data.sources import DataNotFoundError

MIRROR = os.environ.get("NTKBOOK_DATA", "")
needs_data = pytest.mark.skipif(not MIRROR, reason="needs the real data: NTKBOOK_DATA is not set")
FOLDER, ARCHIVE = "cifar-10-batches-bin", "cifar-10-binary.tar.gz"
TRAIN, TEST = [f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin"
FEW = 4  # images a file here


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, no data folder, no network, and files of four images."""
    monkeypatch.setattr(sources, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(cifar, "BATCH", FEW)
    monkeypatch.delenv("NTKBOOK_DATA", raising=False)
    monkeypatch.setenv("NTKBOOK_OFFLINE", "1")
    return tmp_path / "cache"


def some(seed=0):
    draw = np.random.default_rng(seed)
    return draw.integers(0, 256, (FEW, 3, 32, 32)).astype(np.uint8), draw.integers(0, 10, FEW)


def binary(pixels, labels):
    """A file as its format says: a byte of label, 1,024 of red, 1,024 of green, 1,024 of blue; then the next image."""
    return b"".join(bytes([label]) + b"".join(c.tobytes() for c in image) for image, label in zip(pixels, labels))


ALL = {name: binary(*some(seed)) for seed, name in enumerate([*TRAIN, TEST])}


def put(root, *names, **changed):
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(changed.get(name.removesuffix(".bin"), ALL[name]))
    return folder


def packed(members):
    """A .tar.gz with these members: contents, or where a link goes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


WHOLE = packed({f"{FOLDER}/{name}": content for name, content in {**ALL, "readme.html": b"x"}.items()})


def everything(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} if root.exists() else {}


def server_of(monkeypatch, server, content):
    """The registry's entry, as if `content` were the archive and it came from the server."""
    monkeypatch.delenv("NTKBOOK_OFFLINE", raising=False)
    hashes = ((ARCHIVE, f"md5:{hashlib.md5(content).hexdigest()}"),)
    entry = dataclasses.replace(REGISTRY["cifar10"], url=server.url + "/{file}", hashes=hashes)
    monkeypatch.setitem(REGISTRY, "cifar10", entry)


def test_the_registrys_entry():
    entry = REGISTRY["cifar10"]
    assert set(entry.files) == {*TRAIN, TEST}
    for file in entry.files:
        assert entry.address(file) == f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}"
        assert entry.known_hash(file) == "md5:c32a1d4ab5d03f1284b67883e8d873af"


@given(seed=st.integers(0, 99), split=st.sampled_from(["train", "test"]))
def test_pixels_and_labels_are_those_of_the_file(tmp_path_factory, seed, split):
    root = tmp_path_factory.mktemp("data")
    pixels, labels = some(seed)
    name = TRAIN[2] if split == "train" else TEST
    put(root, name, **{name.removesuffix(".bin"): binary(pixels, labels)})
    before = everything(root)
    loaded = load_cifar(split, data_dir=root)
    assert isinstance(loaded, ColourImages)
    assert (loaded.x.dtype, loaded.y.dtype) == (torch.float32, torch.int64)
    np.testing.assert_array_equal(loaded.x.numpy(), pixels.astype(np.float32) / np.float32(255))
    np.testing.assert_array_equal(loaded.y.numpy(), labels)
    assert loaded.classes == CLASSES
    assert loaded.provenance.source == "real"
    assert everything(root) == before


def test_some_of_the_training_files_are_enough_and_it_is_said(cache, monkeypatch):
    put(cache, TRAIN[3], TRAIN[0])
    with serve({f"/{ARCHIVE}": WHOLE}) as server:
        server_of(monkeypatch, server, WHOLE)
        loaded = load_cifar()
        assert server.requests == []
    assert loaded.y.tolist() == [*some(0)[1], *some(3)[1]]
    assert "8 of the 20 training images (2 of the 5 files are here)" in loaded.provenance.description
    assert loaded.provenance.files == 2
    assert loaded.provenance.sha256 == sources.digest([cache / FOLDER / TRAIN[0], cache / FOLDER / TRAIN[3]])


@pytest.mark.parametrize(("n", "files"), [(1, 1), (4, 1), (5, 2), (20, 5), (100, 5)])
def test_the_first_n(cache, n, files):
    put(cache, *TRAIN)
    whole, loaded = load_cifar(), load_cifar(n=n)
    assert torch.equal(loaded.x, whole.x[:n])
    assert torch.equal(loaded.y, whole.y[:n])
    assert loaded.provenance.files == files
    assert f"{min(n, 20)} of the 20 training images" in loaded.provenance.description
    assert "are here" not in loaded.provenance.description


def test_downloaded_unpacked_and_not_again(cache, monkeypatch):
    with serve({f"/{ARCHIVE}": WHOLE}) as server:
        server_of(monkeypatch, server, WHOLE)
        put(cache, TEST)
        loaded = load_cifar(progress=False)
        assert torch.equal(load_cifar(progress=False).x, loaded.x)
        assert len(load_cifar("test", progress=False).x) == FEW
        assert [path for path, _ in server.requests] == [f"/{ARCHIVE}"]
    assert loaded.y.tolist() == [label for seed in range(5) for label in some(seed)[1]]
    assert everything(cache / FOLDER) == {cache / FOLDER / name: content for name, content in ALL.items()}
    assert [path.name for path in (cache / FOLDER).iterdir() if path.is_dir()] == []
    (line,) = (cache / "manifest.jsonl").read_text().splitlines()
    assert json.loads(line)["sha256"] == hashlib.sha256(WHOLE).hexdigest()
    assert json.loads(line)["file"] == f"{FOLDER}/{ARCHIVE}"


def test_fetch_gets_what_is_missing_and_leaves_what_is_here(cache, tmp_path, monkeypatch):
    folder = put(tmp_path / "data", TRAIN[0])
    monkeypatch.setenv("NTKBOOK_DATA", str(tmp_path / "data"))
    mine = put(cache, TRAIN[1], data_batch_1=b"", data_batch_2=b"mine")
    with serve({f"/{ARCHIVE}": WHOLE}) as server:
        server_of(monkeypatch, server, WHOLE)
        paths = sources.fetch("cifar10", progress=False)
        assert sources.fetch("cifar10", progress=False) == paths
        assert len(server.requests) == 1
    assert paths == [folder / TRAIN[0], *(cache / FOLDER / name for name in (*TRAIN[1:], TEST))]
    assert (mine / TRAIN[1]).read_bytes() == b"mine"
    assert everything(tmp_path / "data") == {folder / TRAIN[0]: ALL[TRAIN[0]]}


def test_an_archive_that_was_not_unpacked_is_not_downloaded_again(cache, monkeypatch):
    """A process killed between the two, or a file put there by hand."""
    (cache / FOLDER / f"{ARCHIVE}.unpacking").mkdir(parents=True)
    (cache / FOLDER / f"{ARCHIVE}.unpacking" / TRAIN[0]).write_bytes(b"half")
    (cache / FOLDER / ARCHIVE).write_bytes(WHOLE)
    with serve({}) as server:
        server_of(monkeypatch, server, WHOLE)
        assert len(load_cifar(progress=False).x) == 20
        assert server.requests == []
    assert {path.name for path in (cache / FOLDER).iterdir()} == set(TRAIN)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (WHOLE[: len(WHOLE) // 2], "no whole gzip file"),
        (gzip.compress(gzip.decompress(WHOLE)[:5000]), "no archive with data_batch_1.bin"),
        (gzip.compress(b"no archive at all" * 100), "no archive with data_batch_1.bin"),
        (b"<html>not found</html>", "no whole gzip file"),
        (packed({f"{FOLDER}/{n}": c for n, c in ALL.items() if n != TRAIN[3]}), "data_batch_4.bin' not found"),
        (packed({f"other/{n}": c for n, c in ALL.items()}), "not found"),
        (packed({f"{FOLDER}/{n}": "/etc/passwd" if n == TRAIN[3] else c for n, c in ALL.items()}), "data_batch_4.bin"),
    ],
    ids=["half", "half inside", "no archive", "a page", "a file less", "another folder", "a link"],
)
def test_a_broken_archive_leaves_the_cache_as_it_was(cache, monkeypatch, content, message):
    """Each with the md5 that it should have, so that only the unpacking can find out."""
    put(cache, TEST)
    (cache / FOLDER / "notes.txt").write_text("mine")
    before = everything(cache)
    with serve({f"/{ARCHIVE}": content}) as server:
        server_of(monkeypatch, server, content)
        with pytest.raises(DownloadError, match=f"(?s){message}.*get {server.url}/{ARCHIVE}"):
            load_cifar(source="real", progress=False)
        assert load_cifar(progress=False).provenance.is_stand_in
    assert {path: content for path, content in everything(cache).items() if path.name != ".lock"} == before
    assert [path for path in (cache / FOLDER).iterdir() if path.is_dir()] == []


def test_a_wrong_md5_leaves_the_cache_as_it_was(cache, monkeypatch):
    with serve({f"/{ARCHIVE}": packed({f"{FOLDER}/{TEST}": b"x"})}) as server:
        server_of(monkeypatch, server, WHOLE)
        with pytest.raises(DownloadError, match=r"(?s)1 of 1 files could not be downloaded.*md5"):
            load_cifar("test", source="real", progress=False)
    assert [path.name for path in everything(cache)] == [".lock"]


def test_nothing_is_written_outside_whatever_the_archive_has(cache, tmp_path, monkeypatch):
    evil = {"../outside": b"x", f"{FOLDER}/../../outside": b"x", str(tmp_path / "absolute"): b"x", FOLDER: "/etc"}
    content = packed({**evil, **{f"{FOLDER}/{name}": content for name, content in ALL.items()}})
    with serve({f"/{ARCHIVE}": content}) as server:
        server_of(monkeypatch, server, content)
        assert len(load_cifar(progress=False).x) == 20
    landed = {path.relative_to(tmp_path).as_posix() for path in everything(tmp_path)}
    assert landed == {"cache/.lock", "cache/manifest.jsonl", *(f"cache/{FOLDER}/{name}" for name in TRAIN)}


def test_without_a_server_the_stand_in_or_the_error(monkeypatch):
    with serve({}) as server:
        server_of(monkeypatch, server, WHOLE)
    assert "the download failed" in load_cifar(progress=False).provenance.description
    with pytest.raises(DownloadError, match="can't be reached"):
        load_cifar(source="real", progress=False)


WHOLE_FILE = ALL[TRAIN[0]]
BAD = {
    "truncated": (WHOLE_FILE[:-1], "4 records of 3,073 bytes, 12,292 in all, and has 12,291"),
    "a record short": (WHOLE_FILE[:-3073], "and has 9,219"),
    "too long": (WHOLE_FILE + b"x", "and has 12,293"),
    "empty": (b"", "and has 0"),
    "another label": (binary(some()[0], [0, 1, 10, 2]), "labels from 0 to 9, and has 10"),
}


@pytest.mark.parametrize("wrong", BAD)
def test_files_that_are_not_what_they_should_be(cache, wrong):
    content, message = BAD[wrong]
    put(cache, *TRAIN, data_batch_2=content)
    before = everything(cache)
    with pytest.raises(ValueError, match=f"data_batch_2.bin should have .*{message}: delete it and get it again"):
        load_cifar()
    assert everything(cache) == before


def test_real_refuses_the_stand_in_and_so_does_a_data_dir(cache, tmp_path):
    match = r"cifar10: 5 of 5 files .*md5:c32a1d4a\w+\) and unpack its files into \S+cifar-10-batches-bin"
    with pytest.raises(DataNotFoundError, match=match):
        load_cifar(source="real")
    with pytest.raises(DataNotFoundError, match="only it is looked in"):
        load_cifar(data_dir=tmp_path)
    with pytest.raises(DataNotFoundError, match="data_dir must be an existing folder"):
        load_cifar(data_dir=tmp_path / "nowhere")


def test_a_data_folder_that_is_none_is_no_reason_for_the_stand_in(monkeypatch):
    monkeypatch.setenv("NTKBOOK_DATA", "/nowhere")
    with pytest.raises(DataNotFoundError, match="NTKBOOK_DATA must be an existing folder"):
        load_cifar()


def test_a_test_file_that_is_missing(cache):
    put(cache, *TRAIN)
    assert load_cifar().provenance.source == "real"
    assert load_cifar("test").provenance.source == "made-up"
    with pytest.raises(DataNotFoundError, match=r"cifar10: 1 of 1 files .*test_batch.bin"):
        load_cifar("test", source="real")


def test_status(cache, monkeypatch):
    def now():
        return {status.name: status for status in sources.status()}["cifar10"]

    assert (now().where, now().files, now().files_wanted) == ("embedded", 0, 6)
    monkeypatch.delenv("NTKBOOK_OFFLINE")
    assert (now().where, now().bytes_to_download) == ("download", 170_052_171)
    put(cache, *TRAIN[:2])
    assert (now().where, now().files, now().bytes_on_disk) == ("cache", 2, 2 * FEW * 3073)
    assert now().bytes_to_download == 170_052_171
    put(cache, *TRAIN, TEST)
    assert (now().where, now().files, now().bytes_to_download) == ("cache", 6, 0)


@pytest.mark.parametrize("source", ["auto", "embedded"])
def test_the_stand_in(source):
    train, test = load_cifar(source=source), load_cifar("test", source=source)
    for loaded in (train, test):
        assert loaded.x.shape == (2000, 3, 32, 32)
        assert loaded.y.bincount().tolist() == [200] * 10
        assert len(loaded.classes) == 10
        assert loaded.y[:50].bincount(minlength=10).min() > 0  # in random order
        assert (loaded.x.min(), loaded.x.max()) == (0, 1)
        torch.testing.assert_close(loaded.x * 255, (loaded.x * 255).round(), rtol=0, atol=1e-4)  # float32
        assert (loaded.provenance.source, loaded.provenance.files) == ("made-up", 0)
        assert "no claim is evaluated" in loaded.provenance.banner()
        assert ("NTKBOOK_OFFLINE" in loaded.provenance.description) == (source == "auto")
    assert torch.equal(train.x, load_cifar(source="embedded").x)
    both = torch.cat([train.x, test.x]).flatten(1)
    assert len(torch.unique(both, dim=0)) == 4000
    few = load_cifar(n=7, source="embedded")
    assert torch.equal(few.x, train.x[:7])
    assert few.provenance.description.startswith("7 made-up")


def test_the_stand_in_can_be_learnt_and_not_by_mean_colours_alone():
    train, test = load_cifar(source="embedded"), load_cifar("test", source="embedded")

    def accuracy(feature):
        nearest = torch.cdist(feature(test.x), feature(train.x)).argmin(1)
        return (train.y[nearest] == test.y).double().mean()

    assert accuracy(lambda x: x.flatten(1)) > 0.9
    assert accuracy(lambda x: x.mean((2, 3))) < 0.75


def test_standardised():
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(5, 3, 4, 4, generator=draw, dtype=torch.float64) * torch.tensor([1.0, 2, 3])[:, None, None]
    z = standardised(x)
    channels = z.transpose(0, 1).flatten(1)
    torch.testing.assert_close(channels.mean(1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(channels.square().mean(1), torch.ones(3, dtype=torch.float64), rtol=1e-13, atol=0)
    new = torch.rand(2, 3, 6, 6, generator=draw, dtype=torch.float64)
    for channel, values in enumerate(x.transpose(0, 1).flatten(1).numpy()):
        expected = (new[:, channel].numpy() - values.mean()) / values.std()
        np.testing.assert_allclose(standardised(new, by=x)[:, channel].numpy(), expected, rtol=1e-12, atol=1e-12)
    x[:, 1] = 0.5
    with pytest.raises(ValueError, match="every channel must vary"):
        standardised(x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("validation",), "expected split to be one of 'train', 'test'; got 'validation'"),
        (("train", None, "fake"), "expected source to be one of 'auto', 'real', 'embedded'; got 'fake'"),
        (("train", 0), "expected n to be a positive number of images, or None for all; got 0"),
    ],
)
def test_arguments_that_are_none(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_cifar(*arguments)


@needs_data
def test_the_real_images(monkeypatch):
    monkeypatch.setattr(cifar, "BATCH", 10_000)
    folder = sources.Path(MIRROR) / FOLDER
    here = sorted(path.name for path in folder.glob("data_batch_*.bin"))
    if not here:
        pytest.skip("CIFAR-10 is not in NTKBOOK_DATA")
    loaded = load_cifar(n=10_000, source="real", data_dir=MIRROR)
    assert loaded.x.shape == (10_000, 3, 32, 32)
    assert loaded.y.bincount().min() > 900
    with (folder / here[0]).open("rb") as file:
        file.seek(9999 * 3073)
        last = file.read()
    assert loaded.y[-1] == last[0]
    for channel, row, column in ((0, 0, 0), (1, 3, 31), (2, 17, 5)):
        assert round(loaded.x[-1, channel, row, column].item() * 255) == last[1 + 1024 * channel + 32 * row + column]
    names = folder / "batches.meta.txt"
    if names.is_file():
        assert tuple(names.read_text().split()) == CLASSES
    # the training set's well-known mean colour
    torch.testing.assert_close(loaded.x.mean((0, 2, 3)), torch.tensor([0.491, 0.482, 0.447]), rtol=0, atol=0.005)
