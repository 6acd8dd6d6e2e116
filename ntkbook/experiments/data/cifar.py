"""CIFAR-10 in its binary layout, for the networks of Figures 5 and 6, and the made-up images that stand in for it."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from .registry import REGISTRY
from .sources import DataNotFoundError, Provenance, digest, locate, obtain

SIDE = 32
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FILES = {"train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)), "test": ("test_batch.bin",)}
BATCH = 10_000  # images a file
RECORD = 1 + 3 * SIDE * SIDE  # bytes an image: its label, then its red, green and blue pixels, row by row
MADE_UP = 200  # images a class
_AGAIN = "delete it and get it again"


@dataclass(frozen=True)
class ColourImages:
    """Labelled colour images of 32 x 32 pixels.

    Attributes:
        x: the images, float32 from 0 to 1, the channels red, green, blue; see `standardised`.
        y: their classes, from 0 on, int64.
        classes: the classes' names.
        provenance: which data this is.
    """

    x: Float[Tensor, "n 3 32 32"]
    y: Int[Tensor, " n"]
    classes: tuple[str, ...]
    provenance: Provenance


def load_cifar(
    split: str = "train",
    n: int | None = None,
    source: str = "auto",
    data_dir: str | Path | None = None,
    progress: bool = True,
) -> ColourImages:
    """Loads CIFAR-10, from disk where it is, else by download, else (`source="auto"`) 2,000 made-up images.

    Some of the five training files are enough: where not all are on disk, those that are there are taken, nothing is
    downloaded, and the provenance says how many. `sources.fetch("cifar10")` gets the others. The made-up images are
    taken only where none of the split's files could be had.

    Args:
        split: "train" (50,000 images in five files) or "test" (10,000 in one). The made-up images have both, of one
            size.
        n: at most so many images, the first ones, which are in random order; None for all.
        source: "auto", "real" (refuses the made-up images), or "embedded" (asks for them).
        data_dir: where given, the only folder to look in; else `$NTKBOOK_DATA`, the cache, a download.
        progress: whether to show a progress bar, on stderr.

    Raises:
        ValueError: an unknown split or source, n below 1; a file that is not what it should be, which stays where it
            is.
        DataNotFoundError, DownloadError: no file is here nor to be had, as `sources.obtain`.
    """
    for what, value, known in (("split", split, tuple(FILES)), ("source", source, ("auto", "real", "embedded"))):
        if value not in known:
            raise ValueError(f"expected {what} to be one of {', '.join(map(repr, known))}; got {value!r}")
    if n is not None and n < 1:
        raise ValueError(f"expected n to be a positive number of images, or None for all; got {n}")
    if source == "embedded":
        return _made_up(split, n, "asked for")
    entry, files = REGISTRY["cifar10"], FILES[split]
    paths = locate(entry, files, data_dir)
    if not paths:
        try:
            paths = obtain(entry, files, data_dir, progress)
        except OSError as error:
            if source == "real" or data_dir:  # an explicit wish is never answered by other data
                raise
            offline = isinstance(error, DataNotFoundError)
            return _made_up(
                split, n, "NTKBOOK_OFFLINE is set and the files are not here" if offline else "the download failed"
            )
    used = list(paths.values())[: None if n is None else math.ceil(n / BATCH)]
    records = np.concatenate([read_batch(path) for path in used])[:n]
    y = torch.from_numpy(records[:, 0].astype(np.int64))
    x = torch.from_numpy(records[:, 1:]).view(-1, 3, SIDE, SIDE).float() / 255
    kind = "training" if split == "train" else "test"
    here = f"{len(y):,} of the {len(FILES[split]) * BATCH:,} {kind} images"
    if len(paths) < len(files):
        here += f" ({len(paths)} of the {len(files)} files are here)"
    provenance = Provenance(
        entry.name, "real", f"{entry.title}: {here}", len(used), digest(used), entry.licence, entry.citation, entry.page
    )
    return ColourImages(x, y, CLASSES, provenance)


def read_batch(path: Path) -> np.ndarray:
    """The records of one file, uint8 (10000, 3073): label first, then the pixels.

    Raises:
        ValueError: the file has another size, or a label above 9.
    """
    content = np.fromfile(path, np.uint8)
    if content.size != BATCH * RECORD:
        raise ValueError(
            f"{path} should have {BATCH:,} records of {RECORD:,} bytes, {BATCH * RECORD:,} in all, and has "
            f"{content.size:,}: {_AGAIN}"
        )
    records = content.reshape(BATCH, RECORD)
    if records[:, 0].max() >= len(CLASSES):
        raise ValueError(f"{path} should have labels from 0 to 9, and has {records[:, 0].max()}: {_AGAIN}")
    return records


def standardised(x: Float[Tensor, "n 3 h w"], by: Float[Tensor, "m 3 h2 w2"] | None = None) -> Float[Tensor, "n 3 h w"]:
    """Images with each channel's mean taken off and divided by its standard deviation, over all pixels of `by`.

    Args:
        x: images.
        by: the images whose mean and standard deviation are taken: the training images, also for a test; None for x.

    Raises:
        ValueError: a channel of `by` is constant.
    """
    variance, mean = torch.var_mean(x if by is None else by, dim=(0, 2, 3), correction=0)
    if not (variance > 0).all():
        raise ValueError(f"every channel must vary to be standardised, and their variances are {variance.tolist()}")
    return (x - mean[:, None, None]) / variance.sqrt()[:, None, None]


def _made_up(split: str, n: int | None, why: str) -> ColourImages:
    draw = np.random.default_rng([10, split == "test"])
    pixels = np.concatenate([_textured_shapes(kind, draw) for kind in range(10)])
    order = draw.permutation(len(pixels))[:n]
    x = torch.from_numpy((pixels[order] * 255).round().astype(np.uint8)).float() / 255
    provenance = Provenance(
        "colour-shapes", "made-up", f"{len(x):,} made-up colour images of 10 kinds of shapes and textures ({why})", 0,
        "", "none needed", "", "",
    )  # fmt: skip
    classes = tuple(f"shape {kind}" for kind in range(10))
    return ColourImages(x, torch.from_numpy(order // MADE_UP), classes, provenance)


def _textured_shapes(kind: int, draw: np.random.Generator) -> np.ndarray:
    """Images (MADE_UP, 3, 32, 32): one of five outlines, striped or chequered, in about the kind's own colours."""
    own = np.random.default_rng([11, kind])
    waves, turn, colours = kind // 2 + 1, own.uniform(0, 2 * math.pi), own.uniform(0.15, 0.85, (2, 3))
    pitch, slant = own.uniform(0.7, 1.4), own.uniform(0, math.pi)
    size, tilt, phase, other = (
        draw.uniform(low, high, (MADE_UP, 1, 1))
        for low, high in ((9, 12), (-0.3, 0.3), (0, 2 * math.pi), (0, 2 * math.pi))
    )
    rows, columns = (grid - (SIDE - 1) / 2 - draw.normal(0, 1.5, (MADE_UP, 1, 1)) for grid in np.mgrid[:SIDE, :SIDE])
    edge = size * (1 + 0.35 * np.cos(waves * (np.arctan2(rows, columns) + tilt) + turn))
    inside = np.clip(edge - np.hypot(rows, columns) + 0.5, 0, 1)
    along, across = (rows * math.cos(a) + columns * math.sin(a) for a in (slant, slant + math.pi / 2))
    texture = np.sin(pitch * along + phase) * (np.sin(pitch * across + other) if kind % 2 else 1)
    shape, ground = np.clip(colours[:, None] + draw.normal(0, 0.12, (2, MADE_UP, 3)), 0, 1)[..., None, None]
    image = ground + (shape - ground) * inside[:, None] + 0.25 * (inside * texture)[:, None]
    return np.clip(image + draw.normal(0, 0.05, image.shape), 0, 1)
