"""MNIST and its kin: idx files against a reader of its own, what is wrong with files, and what stands in for them."""

import dataclasses
import gzip
import hashlib
import os
import struct
import tempfile

import numpy as np
import pytest
import torch
from data_server import serve
from hypothesis import given
from hypothesis import strategies as st
from torchvision.datasets import KMNIST, MNIST, FashionMNIST

from ntkbook.experiments.data import sources
from ntkbook.experiments.data.download import DownloadError
from ntkbook.experiments.data.images import CLASSES, Images, load_images, read_idx
from ntkbook.experiments.data.registry import REGISTRY
from ntkbook.experiments.data.sources import DataNotFoundError

MIRROR = os.environ.get("NTKBOOK_DATA", "")
needs_data = pytest.mark.skipif(not MIRROR, reason="needs the real data: NTKBOOK_DATA is not set")
NAMES = ["mnist", "kmnist", "fashionmnist"]
IMAGES, LABELS = "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, no data folder, no network."""
    monkeypatch.setattr(sources, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.delenv("NTKBOOK_DATA", raising=False)
    monkeypatch.setenv("NTKBOOK_OFFLINE", "1")
    return tmp_path / "cache"


def idx(array, magic=None):
    """An idx file as its format says: two zero bytes, 8 for bytes, the number of dimensions, the sizes, the bytes."""
    header = struct.pack(">I", 0x0800 + array.ndim if magic is None else magic)
    return header + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()


def some(n=5, seed=0):
    draw = np.random.default_rng(seed)
    return draw.integers(0, 256, (n, 28, 28)), np.arange(n) % 10


def put(root, images=None, labels=None, name="MNIST", prefix="t10k"):
    """Writes what is given, bytes as they are, into a folder like torchvision's."""
    folder = root / name / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    for content, kind in ((images, "images-idx3"), (labels, "labels-idx1")):
        if content is not None:
            packed = content if isinstance(content, bytes) else gzip.compress(idx(content))
            (folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(packed)
    return folder


def everything(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} if root.exists() else {}


@pytest.mark.parametrize("name", NAMES)
def test_addresses_hashes_and_classes_are_torchvisions(name):
    theirs = {"mnist": MNIST, "kmnist": KMNIST, "fashionmnist": FashionMNIST}[name]
    entry = REGISTRY[name]
    assert entry.url.removesuffix("{file}") in theirs.mirrors
    assert {file: known.removeprefix("md5:") for file, known in entry.hashes} == dict(theirs.resources)
    assert entry.folder == f"{theirs.__name__}/raw"
    assert set(entry.files) == {IMAGES, LABELS}
    assert CLASSES[name] == tuple(one.split(" - ")[0] for one in theirs.classes)


@given(
    n=st.integers(1, 12), seed=st.integers(0, 99), name=st.sampled_from(NAMES), split=st.sampled_from(["test", "train"])
)
def test_pixels_and_labels_are_those_of_the_files(tmp_path_factory, n, seed, name, split):
    root = tmp_path_factory.mktemp("data")
    pixels, labels = some(n, seed)
    put(root, pixels, labels, REGISTRY[name].folder.split("/")[0], "train" if split == "train" else "t10k")
    before = everything(root)
    loaded = load_images(name, split, data_dir=root)
    assert isinstance(loaded, Images)
    assert loaded.x.dtype == torch.float32
    np.testing.assert_array_equal(loaded.x.numpy(), pixels.reshape(n, 784).astype(np.float32) / np.float32(255))
    np.testing.assert_array_equal(loaded.y.numpy(), labels)
    assert (loaded.name, loaded.classes) == (name, CLASSES[name])
    assert loaded.provenance.source == "real"
    assert f"the {n} {'training' if split == 'train' else 'test'} images" in loaded.provenance.description
    assert loaded.provenance.files == 2
    assert everything(root) == before  # nothing unpacked is left


def test_nothing_is_left_in_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    put(tmp_path, *some())
    load_images("mnist", data_dir=tmp_path)
    put(tmp_path, gzip.compress(b"no idx"))
    with pytest.raises(ValueError, match="no whole idx file"):
        load_images("mnist", data_dir=tmp_path)
    assert list((tmp_path / "temporary").iterdir()) == []


PIXELS, TARGETS = some()
BAD = {
    "truncated gzip": (gzip.compress(idx(PIXELS))[:-20], TARGETS, r"t10k-images\S+ is no whole gzip file"),
    "no gzip": (b"<html>not found</html>", TARGETS, "is no whole gzip file"),
    "empty file": (b"", TARGETS, "is no whole idx file"),
    "nothing inside": (gzip.compress(b""), TARGETS, "is no whole idx file"),
    "truncated idx": (gzip.compress(idx(PIXELS)[:-1]), TARGETS, r"t10k-images\S+ is no whole idx file"),
    "header alone": (gzip.compress(idx(PIXELS)[:9]), TARGETS, "is no whole idx file"),
    "more than it says": (gzip.compress(idx(PIXELS) + b"x"), TARGETS, "is no whole idx file"),
    "no idx": (gzip.compress(idx(PIXELS, magic=0xFFFFFFFF)), TARGETS, "is no whole idx file"),
    "unknown type": (gzip.compress(idx(PIXELS, magic=0x0A03)), TARGETS, "is no whole idx file"),
    "signed": (gzip.compress(idx(PIXELS, magic=0x0903)), TARGETS, r"bytes in 3 dimensions, and has 3 of torch\.int8"),
    "labels for images": (TARGETS, TARGETS, r"bytes in 3 dimensions, and has 1 of torch\.uint8"),
    "images for labels": (PIXELS, PIXELS, r"t10k-labels\S+ should be an idx file of bytes in 1 dimensions"),
    "truncated labels": (PIXELS, gzip.compress(idx(TARGETS)[:-1]), r"t10k-labels\S+ is no whole idx file"),
    "other lengths": (PIXELS, TARGETS[:-1], "has 5 images, and .* 4 labels"),
    "other size": (PIXELS[:, 1:], TARGETS, r"should have images of 28 x 28, and has \(5, 27, 28\)"),
    "no images": (PIXELS[:0], TARGETS[:0], "is no whole idx file"),
    "other labels": (PIXELS, TARGETS + 6, "should have labels from 0 to 9, and has 10"),
}


@pytest.mark.parametrize("wrong", BAD)
def test_files_that_are_not_what_they_should_be(cache, wrong):
    images, labels, message = BAD[wrong]
    put(cache, images, labels)
    before = everything(cache)
    with pytest.raises(ValueError, match=f"(?s){message}.*delete it and get it again"):
        load_images("mnist")
    assert everything(cache) == before


@given(
    content=st.binary(max_size=40) | st.binary(min_size=1, max_size=9).map(lambda b: idx(np.frombuffer(b, np.uint8)))
)
def test_no_content_whatsoever_gives_another_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("data") / "x.gz"
    path.write_bytes(gzip.compress(content))
    whole = len(content) > 8 and content == idx(np.frombuffer(content[8:], np.uint8))
    if whole:
        assert read_idx(path, 1).tolist() == list(content[8:])
    else:
        with pytest.raises(ValueError, match="delete it and get it again"):
            read_idx(path, 1)


def server_of(monkeypatch, server, packed, name="mnist"):
    """The registry's entry, as if its files were those of `packed` at the server."""
    hashes = tuple((file, f"md5:{hashlib.md5(content).hexdigest()}") for file, content in packed.items())
    monkeypatch.delenv("NTKBOOK_OFFLINE", raising=False)
    monkeypatch.setitem(REGISTRY, name, dataclasses.replace(REGISTRY[name], url=server.url + "/{file}", hashes=hashes))


def test_downloaded_with_its_md5_and_not_again(cache, monkeypatch):
    packed = dict(zip((IMAGES, LABELS), (gzip.compress(idx(part)) for part in some())))
    with serve({f"/{file}": content for file, content in packed.items()}) as server:
        server_of(monkeypatch, server, packed)
        loaded = load_images("mnist", progress=False)
        assert len(load_images("mnist", progress=False).x) == len(loaded.x) == 5
        assert sorted(path for path, _ in server.requests) == [f"/{IMAGES}", f"/{LABELS}"]
    assert loaded.provenance.source == "real"
    assert {path.name for path in (cache / "MNIST" / "raw").iterdir()} == {IMAGES, LABELS}


def test_a_wrong_md5_lands_nowhere(cache, monkeypatch):
    packed = dict(zip((IMAGES, LABELS), (gzip.compress(idx(part)) for part in some())))
    other = gzip.compress(idx(some(seed=1)[0]))
    with serve({f"/{IMAGES}": other, f"/{LABELS}": packed[LABELS]}) as server:
        server_of(monkeypatch, server, packed)
        # the labels came, and the images did not: no reason for the stand-in
        with pytest.raises(DownloadError, match=r"(?s)1 of 2 files could not be downloaded.*MD5|md5"):
            load_images("mnist", progress=False)
    assert [path.name for path in (cache / "MNIST" / "raw").iterdir()] == [LABELS]


def test_without_a_server_the_stand_in_or_the_error(monkeypatch):
    with serve({}) as server:
        server_of(monkeypatch, server, {})
    loaded = load_images("mnist", progress=False)  # the server is away
    assert "the download failed" in loaded.provenance.description
    with pytest.raises(DownloadError, match="can't be reached"):
        load_images("mnist", source="real", progress=False)


def test_fetch_gets_the_test_images(cache, monkeypatch):
    packed = dict(zip((IMAGES, LABELS), (gzip.compress(idx(part)) for part in some())))
    with serve({f"/{file}": content for file, content in packed.items()}) as server:
        server_of(monkeypatch, server, packed, "kmnist")
        assert sources.fetch("kmnist", progress=False) == [cache / "KMNIST" / "raw" / file for file in (IMAGES, LABELS)]
    assert {status.name: status.where for status in sources.status()}["kmnist"] == "cache"


def test_status_of_the_stand_ins(cache):
    now = {status.name: status for status in sources.status()}
    assert [now[name].where for name in (*NAMES, "digits")] == ["embedded"] * 4
    put(cache, PIXELS)
    assert {status.name: status.where for status in sources.status()}["mnist"] == "missing"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("source", ["auto", "embedded"])
def test_the_stand_ins(name, source):
    loaded = load_images(name, source=source)
    counts = loaded.y.bincount()
    assert len(counts) == len(loaded.classes) == 10
    assert counts.min() >= 170
    assert loaded.name == name
    assert (loaded.x.min(), loaded.x.max()) == (0, 1)
    assert loaded.provenance.is_stand_in
    assert loaded.provenance.source == ("embedded" if name == "mnist" else "made-up")
    assert ("NTKBOOK_OFFLINE" in loaded.provenance.description) == (source == "auto")
    again = load_images(name, "train", source="embedded")
    assert torch.equal(loaded.x, again.x)
    assert torch.equal(loaded.y, again.y)


@pytest.mark.parametrize("name", NAMES)
def test_the_stand_ins_can_be_learnt_and_not_by_their_order(name):
    """One half labels the other by its nearest image; each pixel quantised as in an idx file."""
    loaded = load_images(name, source="embedded")
    if name != "mnist":
        torch.testing.assert_close(loaded.x * 255, (loaded.x * 255).round(), rtol=0, atol=1e-4)
    order = torch.randperm(len(loaded.x), generator=torch.Generator().manual_seed(0))
    one, other = order[::2], order[1::2]
    nearest = torch.cdist(loaded.x[other], loaded.x[one]).argmin(1)
    accuracy = (loaded.y[one][nearest] == loaded.y[other]).double().mean()
    assert accuracy > 0.9
    assert len(torch.unique(loaded.x, dim=0)) == len(loaded.x)


def test_the_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    theirs, loaded = load_digits(), load_images("mnist", source="embedded")
    np.testing.assert_array_equal(loaded.y.numpy(), theirs.target)
    images = torch.tensor(theirs.images / 16).float()[:, None]
    scaled = torch.nn.functional.interpolate(images, (28, 28), mode="bilinear", align_corners=False)
    torch.testing.assert_close(loaded.x, scaled.flatten(1), rtol=0, atol=0)


def test_real_refuses_the_stand_in_and_so_does_a_data_dir(tmp_path):
    with pytest.raises(DataNotFoundError, match=r"kmnist: 2 of 2 files .*md5:5c965bf0"):
        load_images("kmnist", source="real")
    with pytest.raises(DataNotFoundError, match="only it is looked in"):
        load_images("kmnist", data_dir=tmp_path)


def test_data_that_is_partly_there_is_no_reason_for_the_stand_in(cache):
    put(cache, PIXELS)
    with pytest.raises(DataNotFoundError, match=r"1 of 2 files .*t10k-labels"):
        load_images("mnist")


def test_the_other_split_alone_is_enough(cache):
    put(cache, PIXELS, TARGETS, prefix="train")
    assert load_images("mnist", "train").provenance.source == "real"
    assert load_images("mnist", "test").provenance.source == "embedded"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cifar",), "expected name to be one of 'mnist', 'kmnist', 'fashionmnist'; got 'cifar'"),
        (("mnist", "validation"), "expected split to be one of 'train', 'test'; got 'validation'"),
        (("mnist", "test", "fake"), "expected source to be one of 'auto', 'real', 'embedded'; got 'fake'"),
    ],
)
def test_arguments_that_are_none(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_images(*arguments)


@needs_data
@pytest.mark.parametrize("name", NAMES)
def test_the_real_test_images(name):
    before = everything(sources.Path(MIRROR) / REGISTRY[name].folder)
    loaded = load_images(name, source="real", data_dir=MIRROR)
    assert loaded.x.shape == (10_000, 784)
    assert loaded.y.bincount().min() > 800
    folder = sources.Path(MIRROR) / REGISTRY[name].folder
    raw = np.frombuffer(gzip.decompress((folder / IMAGES).read_bytes()), np.uint8)[16:].reshape(10_000, 784)
    np.testing.assert_array_equal((loaded.x.double() * 255).round().numpy(), raw)
    labels = np.frombuffer(gzip.decompress((folder / LABELS).read_bytes()), np.uint8)[8:]
    np.testing.assert_array_equal(loaded.y.numpy(), labels)
    assert everything(folder) == before
