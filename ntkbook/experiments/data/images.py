"""MNIST, KMNIST and FashionMNIST for the similarity of tasks (Figure 1 of the talk), and what stands in for them."""

import gzip
import math
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import interpolate

from .registry import REGISTRY
from .sources import DataNotFoundError, Provenance, digest, locate, obtain

SIDE = 28
CLASSES = {
    "mnist": tuple("0123456789"),
    "kmnist": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    "fashionmnist": (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ),
}  # fmt: skip
SPLITS = {"train": "train", "test": "t10k"}  # and their names in the files'
MADE_UP = 180  # images a class
_AGAIN = "delete it and get it again"


@dataclass(frozen=True)
class Images:
    """Labelled images of 28 x 28 pixels.

    Attributes:
        x: the images, flat, row by row, float32 from 0 (background) to 1.
        y: their classes, from 0 on, int64.
        classes: the classes' names.
        name: the data set asked for, "mnist", "kmnist" or "fashionmnist", whatever stands in for it.
        provenance: which data this is.
    """

    x: Float[Tensor, "n 784"]
    y: Int[Tensor, " n"]
    classes: tuple[str, ...]
    name: str
    provenance: Provenance


def load_images(
    name: str,
    split: str = "test",
    source: str = "auto",
    data_dir: str | Path | None = None,
    progress: bool = True,
) -> Images:
    """Loads images, from disk where they are, else by download, else (`source="auto"`) the embedded stand-in.

    The stand-in is taken only where neither of the split's two files could be had, and says so in its provenance: for
    "mnist" scikit-learn's 1,797 digits of 8 x 8 pixels, scaled up; for "kmnist" made-up characters of curved strokes
    and for "fashionmnist" made-up filled shapes, 1,800 each.

    A downloaded file has the md5 that torchvision knows. One found on disk must parse, and is not compared: the same
    content may be packed in other ways.

    Args:
        name: "mnist", "kmnist" or "fashionmnist".
        split: "test" (10,000 images) or "train" (60,000): only its two files are needed. The stand-ins have one split.
        source: "auto", "real" (refuses the stand-in), or "embedded" (asks for it).
        data_dir: where given, the only folder to look in; else `$NTKBOOK_DATA`, the cache, a download.
        progress: whether to show a progress bar, on stderr.

    Raises:
        ValueError: an unknown name, split or source; a file that is not what it should be, which stays where it is.
        DataNotFoundError, DownloadError: files are neither here nor to be had, as `sources.obtain`.
    """
    for what, value, known in (
        ("name", name, tuple(CLASSES)),
        ("split", split, tuple(SPLITS)),
        ("source", source, ("auto", "real", "embedded")),
    ):
        if value not in known:
            raise ValueError(f"expected {what} to be one of {', '.join(map(repr, known))}; got {value!r}")
    if source == "embedded":
        return _stand_in(name, "asked for")
    entry = REGISTRY[name]
    files = [f"{SPLITS[split]}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    try:
        paths = obtain(entry, files, data_dir, progress)
    except OSError as error:
        # An explicit wish is never answered by other data, nor is data that is partly there.
        if source == "real" or data_dir or locate(entry, files):
            raise
        offline = isinstance(error, DataNotFoundError)
        return _stand_in(
            name, "NTKBOOK_OFFLINE is set and the files are not here" if offline else "the download failed"
        )
    pixels, y = (read_idx(paths[file], dimensions) for file, dimensions in zip(files, (3, 1)))
    images, labels = (f"{paths[file]}" for file in files)
    if pixels.shape[1:] != (SIDE, SIDE):
        raise ValueError(f"{images} should have images of 28 x 28, and has {tuple(pixels.shape)}: {_AGAIN}")
    if len(pixels) != len(y):
        raise ValueError(f"{images} has {len(pixels):,} images, and {labels} {len(y):,} labels: {_AGAIN}")
    if y.max() >= len(CLASSES[name]):
        raise ValueError(f"{labels} should have labels from 0 to 9, and has {y.max().item()}: {_AGAIN}")
    description = f"{entry.title}: the {len(y):,} {'training' if split == 'train' else 'test'} images"
    address = entry.url.removesuffix("{file}")
    provenance = Provenance(
        name, "real", description, len(files), digest(paths.values()), entry.licence, entry.citation, address
    )
    return Images(pixels.flatten(1).float() / 255, y.long(), CLASSES[name], name, provenance)


def read_idx(path: Path, dimensions: int) -> Tensor:
    """The numbers of a packed idx file, uint8, by torchvision's own parser.

    Raises:
        ValueError: no whole gzip file, or no idx file of bytes in so many dimensions, whole and without a rest.
    """
    from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor  # takes seconds to import

    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is no whole gzip file ({error}): {_AGAIN}") from error
    with tempfile.TemporaryDirectory() as folder:  # the parser opens a file by its name, and unpacks nothing
        unpacked = Path(folder) / "idx"
        unpacked.write_bytes(content)
        try:
            parsed = read_sn3_pascalvincent_tensor(str(unpacked))
        except (AssertionError, LookupError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path} is no whole idx file: {_AGAIN}") from error
    if parsed.dtype != torch.uint8 or parsed.ndim != dimensions:
        got = f"{parsed.ndim} of {parsed.dtype}"
        raise ValueError(f"{path} should be an idx file of bytes in {dimensions} dimensions, and has {got}: {_AGAIN}")
    return parsed


def _stand_in(name: str, why: str) -> Images:
    if name == "mnist":
        return _digits(why)
    make, what = (_glyphs, "characters of curved strokes") if name == "kmnist" else (_shapes, "filled, textured shapes")
    pixels = np.concatenate([make(one, np.random.default_rng([len(name), one])) for one in range(10)])
    x = torch.from_numpy((pixels * 255).round().astype(np.uint8)).float().flatten(1) / 255
    kind = "glyphs" if name == "kmnist" else "shapes"
    provenance = Provenance(
        kind, "made-up", f"{len(x):,} made-up images of 10 kinds of {what} ({why})", 0, "",
        "none needed", "", "",
    )  # fmt: skip
    classes = tuple(f"{kind[:-1]} {one}" for one in range(10))
    return Images(x, torch.arange(10).repeat_interleave(MADE_UP), classes, name, provenance)


def _digits(why: str) -> Images:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise DataNotFoundError("the embedded digits come with the package scikit-learn: install it") from error
    entry = REGISTRY["digits"]
    pixels, labels = (torch.from_numpy(np.asarray(part)) for part in load_digits(return_X_y=True))
    x = interpolate(pixels.float().view(-1, 1, 8, 8) / 16, (SIDE, SIDE), mode="bilinear")
    description = f"{len(x):,} handwritten digits of 8 x 8 pixels that scikit-learn carries, scaled up ({why})"
    provenance = Provenance(entry.name, "embedded", description, 0, "", entry.licence, entry.citation, entry.url)
    return Images(x.flatten(1), labels.long(), CLASSES["mnist"], "mnist", provenance)


def _glyphs(kind: int, draw: np.random.Generator) -> np.ndarray:
    """Images (MADE_UP, 28, 28) of three quadratic Bézier strokes, the kind's own, moved and bent a little each time."""
    own = np.random.default_rng([7, kind]).uniform(5, 23, (3, 3, 2))  # strokes, control points, places
    points = own + draw.normal(0, 1, (MADE_UP, 3, 3, 2)) + draw.normal(0, 1, (MADE_UP, 1, 1, 2))
    t = np.linspace(0, 1, 20)[:, None]
    a, b, c = (points[:, :, None, i] for i in range(3))
    curves = ((1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c).reshape(MADE_UP, -1, 2)
    width = draw.uniform(1.0, 1.8, (MADE_UP, 1, 1))
    rows, columns = np.mgrid[:SIDE, :SIDE]
    apart = np.full((MADE_UP, SIDE, SIDE), np.inf)
    for place in curves.transpose(1, 0, 2)[..., None, None]:  # one point of every image's pen at a time
        apart = np.minimum(apart, np.hypot(rows - place[:, 0], columns - place[:, 1]))
    return np.clip(width + 0.5 - apart, 0, 1)


def _shapes(kind: int, draw: np.random.Generator) -> np.ndarray:
    """Images (MADE_UP, 28, 28) of one filled shape with stripes, the kind's own outline, turned and scaled a little."""
    own = np.random.default_rng([8, kind])
    wave, turn, depth = own.integers(2, 6), own.uniform(0, 2 * math.pi), own.uniform(0.1, 0.35)
    aspect, pitch, slant = own.uniform(0.6, 1.6), own.uniform(0.3, 1.5), own.uniform(0, math.pi)
    size, tilt, light, phase = (
        draw.uniform(low, high, (MADE_UP, 1, 1))
        for low, high in ((8.5, 11.5), (-0.15, 0.15), (0.5, 0.9), (0, 2 * math.pi))
    )
    rows, columns = (grid - (SIDE - 1) / 2 - draw.normal(0, 1, (MADE_UP, 1, 1)) for grid in np.mgrid[:SIDE, :SIDE])
    rows, columns = rows * math.sqrt(aspect), columns / math.sqrt(aspect)
    edge = size * (1 + depth * np.cos(wave * (np.arctan2(rows, columns) + tilt) + turn))
    inside = np.clip(edge - np.hypot(rows, columns) + 0.5, 0, 1)
    stripes = np.sin(pitch * (rows * math.cos(slant) + columns * math.sin(slant)) + phase)
    return np.clip(inside * (light + 0.2 * stripes + draw.normal(0, 0.05, inside.shape)), 0, 1)
