"""The rate of infection with Plasmodium falciparum, mapped (Section 3 and Appendix F of the paper, Figure 3).

PfPR2-10 is the share of children of 2 to 10 years that carry the parasite: a model's mean a pixel and year, by the
Malaria Atlas Project. The paper's target year is 2016. The public maps of its kind here end in 2015.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from . import pfpr, regions
from .registry import REGISTRY
from .sources import DataNotFoundError, Provenance, digest, locate, obtain, offline

RELEASE_YEARS = range(2000, 2016)
RELEASES = {"2015": "malaria", "authors": "malaria-paper"}


class Image(NamedTuple):
    """A map as an image: row 0 is north, NaN where there is no pixel; `extent` is (west, east, south, north)."""

    values: Float[Tensor, "rows columns"]
    extent: tuple[float, float, float, float]


@dataclass(frozen=True)
class Malaria:
    """PfPR2-10 at the n pixels that have a value in all of Y years, in the order of a raster's rows, north first.

    Attributes:
        longitude, latitude: of the pixels' centres, in degrees.
        years: the years, in the order asked for.
        rate: the rate, a share in [0, 1].
        step: width and height of a pixel, in degrees.
        provenance: which data this is.
    """

    longitude: Float[Tensor, " n"]
    latitude: Float[Tensor, " n"]
    years: tuple[int, ...]
    rate: Float[Tensor, "years n"]
    step: float
    provenance: Provenance

    def unit(self) -> Float[Tensor, "n 2"]:
        """Longitude and latitude of the pixels, each scaled by its limits, which all years share, to [0, 1].

        Raises:
            ValueError: all pixels lie in one row or one column.
        """
        place = torch.stack([self.longitude, self.latitude], 1)
        low, high = place.min(0).values, place.max(0).values
        if not (high > low).all():
            raise ValueError("expected pixels in several rows and columns, to scale by their limits; take more of them")
        return (place - low) / (high - low)

    def grid(self, values: Float[Tensor, " n"], coarsen: int = 1) -> Image:
        """One value a pixel as an image; with `coarsen` = k, the mean of each k by k block's pixels that are there.

        Raises:
            ValueError: `coarsen` is no whole number of at least 1, or there is not one value a pixel.
        """
        if not isinstance(coarsen, int) or coarsen < 1 or values.shape != self.longitude.shape:
            raise ValueError(
                f"expected {len(self.longitude)} values, one a pixel, and a whole coarsen of at least 1; got values of "
                f"shape {tuple(values.shape)} and coarsen {coarsen!r}"
            )
        place = regions.cells(self.longitude.numpy(), self.latitude.numpy(), self.step)
        row, column = (torch.from_numpy(one) // coarsen for one in place)
        rows, columns = int(row.max()) + 1, int(column.max()) + 1
        cell, size = row * columns + column, rows * columns
        total = torch.bincount(cell, values.detach().double().cpu(), size)
        mean = (total / torch.bincount(cell, minlength=size)).reshape(rows, columns)  # 0/0: NaN
        west, north = self.longitude.min().item() - self.step / 2, self.latitude.max().item() + self.step / 2
        side = self.step * coarsen
        return Image(mean, (west, west + columns * side, north - rows * side, north))


def load_malaria(
    years: Sequence[int] = (2012, 2015),
    region: str | Path | Sequence[float | int] = "nigeria",
    source: str = "auto",
    data_dir: str | Path | None = None,
    progress: bool = True,
    release: str = "2015",
) -> Malaria:
    """Loads maps of the parasite rate, from disk where they are, else by download, else (`source="auto"`) made up.

    The release "2015" is one raster a year; where they are not on disk, a table beside them that has these years and
    covers the region serves as well. The release "authors" is the HDF5 table of the paper's authors, with its 2016.
    What is in Nigeria is for the tables' column is_ng to say; for rasters, by the same table where it is on disk, and
    by Natural Earth's border where it is not. The made-up stand-in is taken only for "nigeria" and "africa" of the
    release "2015", only where not one file could be had, and says so in its provenance.

    Args:
        years: which years; only pixels that have a value in all of them are kept.
        region: "nigeria", "africa" (all of the rasters), a box "west,south,east,north" in degrees (or four numbers),
            or the path of a GeoJSON file with polygons. A pixel is in it where its centre is.
        source: "auto", "real" (refuses the stand-in), or "embedded" (asks for it, and looks in no folder).
        data_dir: where given, the only folder to look in; else `$NTKBOOK_DATA`, the cache, a download.
        progress: whether to show progress bars, on stderr.
        release: "2015" or "authors".

    Raises:
        ValueError: bad parameters; a file that is not what it should be; a year or region without a pixel.
        ImportError: for "authors", PyTables is not installed.
        DataNotFoundError, DownloadError: files are neither here nor to be had, as `sources.obtain`.
    """
    if source not in ("auto", "real", "embedded"):
        raise ValueError(f'expected source to be "auto", "real" or "embedded"; got {source!r}')
    if release not in RELEASES:
        raise ValueError(f'expected release to be "2015" or "authors"; got {release!r}')
    wanted = _check_years(years, release)
    area = regions.parse(region)
    named = area.bounds is None
    if source == "embedded":
        if not named:
            raise ValueError(f'the made-up data has no regions to choose; got {region!r} instead of "nigeria"')
        if release != "2015":
            raise ValueError(f'the made-up data stands in for release="2015" alone; got release={release!r}')
        return _made_up(wanted, "asked for")
    try:
        if release == "authors":
            return _authors(wanted, area, data_dir, progress)
        return _release_2015(wanted, area, data_dir, progress)
    except OSError as error:
        # An explicit wish is never answered by other data, nor is data that is partly there.
        entry = REGISTRY["malaria"]
        explicit = source == "real" or data_dir or not named or release == "authors"
        if explicit or locate(entry, [*_raster_names(wanted), entry.instead]):
            raise
        is_offline = isinstance(error, DataNotFoundError)
        why = "NTKBOOK_OFFLINE is set and the files are not here" if is_offline else "the download failed"
        return _made_up(wanted, why)


def _check_years(years: Sequence[int], release: str) -> tuple[int, ...]:
    ok = not isinstance(years, str) and all(isinstance(y, int | np.integer) for y in years)
    if not ok or not len(years) or len(set(years)) < len(years):
        raise ValueError(f"expected different years, such as (2012, 2015); got {years!r}")
    wanted = tuple(int(year) for year in years)
    absent = [year for year in wanted if year not in RELEASE_YEARS]
    if absent and release == "2015":
        raise ValueError(
            f"the release of 2015 has the years {RELEASE_YEARS[0]} to {RELEASE_YEARS[-1]}; got {absent}. The paper's "
            '2016 is in its authors\' file: release="authors"'
        )
    return wanted


def _raster_names(years: tuple[int, ...]) -> list[str]:
    return [f"2015_Nature_Africa_PR.{year}.tif" for year in years]


def _release_2015(years: tuple[int, ...], area: regions.Region, data_dir: str | Path | None, progress: bool) -> Malaria:
    """From the rasters, or from the table where only it is on disk."""
    entry = REGISTRY["malaria"]
    names = _raster_names(years)
    path = locate(entry, [entry.instead], data_dir).get(entry.instead)
    if path is not None and len(locate(entry, names, data_dir)) < len(names):
        try:
            return _from_table(pfpr.table(path, years), years, area, path, release="2015")
        except pfpr.NotCoveredError:
            if data_dir or offline():  # no rasters to be had: what the table has is what to tell
                raise
    paths = dict(zip(years, obtain(entry, names, data_dir, progress).values(), strict=True))
    pixels, used = pfpr.rasters(paths), list(paths.values())
    if area.label == "africa":
        return _real(pixels, years, "Africa", used, "2015")
    if area.label != "nigeria":
        return _real(_inside(pixels, area), years, area.label, used, "2015")
    if path is not None:
        pixels = pixels.select(pfpr.in_nigeria(pixels, path))
        return _real(pixels, years, "Nigeria (is_ng of the table beside them)", [*used, path], "2015")
    (border,) = obtain(REGISTRY["borders"], REGISTRY["borders"].files, data_dir, progress).values()
    pixels = _inside(pixels, regions.from_geojson(border, regions.NIGERIA))
    return _real(pixels, years, "Nigeria (Natural Earth's border)", [*used, border], "2015")


def _authors(years: tuple[int, ...], area: regions.Region, data_dir: str | Path | None, progress: bool) -> Malaria:
    entry = REGISTRY["malaria-paper"]
    (path,) = obtain(entry, entry.files, data_dir, progress).values()
    return _from_table(pfpr.hdf5(path, years), years, area, path, release="authors")


def _from_table(pixels: pfpr.Pixels, years: tuple[int, ...], area: regions.Region, path: Path, release: str) -> Malaria:
    """The part of a table that was asked for, where the table covers it."""
    half = pixels.step / 2
    west, east = pixels.longitude.min() - half, pixels.longitude.max() + half
    south, north = pixels.latitude.min() - half, pixels.latitude.max() + half
    if area.label == "nigeria":
        assert pixels.nigeria is not None  # all tables say it
        pixels = pixels.select(pixels.nigeria)
        if not len(pixels.longitude):
            raise ValueError(f"expected pixels with is_ng of 1; {path} has none: delete it and get it again")
        return _real(pixels, years, "Nigeria (the table's is_ng)", [path], release)
    if area.bounds is None or not (
        west <= area.bounds[0] and south <= area.bounds[1] and area.bounds[2] <= east and area.bounds[3] <= north
    ):
        raise pfpr.NotCoveredError(
            f"expected a table that covers {area.label}; {path} covers {west:.2f} to {east:.2f}° east, {south:.2f} to "
            f"{north:.2f}° north. Take a smaller region, or the rasters of Africa"
        )
    return _real(_inside(pixels, area), years, area.label, [path], release)


def _inside(pixels: pfpr.Pixels, area: regions.Region) -> pfpr.Pixels:
    kept = regions.inside(area, pixels.longitude, pixels.latitude, pixels.step)
    if not kept.any():
        west, east, south, north = (
            limit(one) for one in (pixels.longitude, pixels.latitude) for limit in (np.min, np.max)
        )
        raise ValueError(
            f"expected pixels with a rate in {area.label}{f' ({area.path})' if area.path else ''}; there is none. The "
            f"map has pixels in {west:.2f} to {east:.2f}° east, {south:.2f} to {north:.2f}° north"
        )
    return pixels.select(kept)


def _real(pixels: pfpr.Pixels, years: tuple[int, ...], where: str, used: list[Path], release: str) -> Malaria:
    entry = REGISTRY[RELEASES[release]]
    note = "; the paper's target year is 2016" if 2016 not in years else ""
    of = "the release of 2015" if release == "2015" else "the file of the paper's authors"
    span = ", ".join(str(year) for year in years)
    description = f"PfPR2-10 of {span} at {len(pixels.longitude):,} pixels, {of}, {where}{note}"
    return Malaria(
        longitude=torch.from_numpy(pixels.longitude),
        latitude=torch.from_numpy(pixels.latitude),
        years=years,
        rate=torch.from_numpy(pixels.rate),
        step=pixels.step,
        provenance=Provenance(
            entry.name, "real", description, len(used), digest(used), entry.licence, entry.citation, entry.page
        ),
    )


def _made_up(years: tuple[int, ...], why: str) -> Malaria:
    """The stand-in: a smooth map that changes smoothly over the years, without any data behind it."""
    entry = REGISTRY["malaria-made-up"]
    step = 0.16
    column, row = np.meshgrid(np.arange(68), np.arange(62))
    u, v = column / 33.5 - 1, 1 - row / 30.5  # -1 to 1, v to the north
    kept = u**4 + v**4 <= 1  # so that the map has an edge that is no box, as a country's
    u, v = u[kept], v[kept]
    draw = np.random.default_rng(0)
    waves = []
    for _ in range(2):  # the map, and how it changes
        (a, b), phase = draw.uniform(-6, 6, (2, 8, 1)), draw.uniform(0, 2 * np.pi, (8, 1))
        waves.append(np.cos(a * u + b * v + phase).mean(axis=0))
    logit = [-0.6 + 2 * waves[0] + (year - 2012) / 3 * (waves[1] - 0.1) for year in years]
    return Malaria(
        longitude=torch.from_numpy(3 + step * column[kept].astype(np.float64)),
        latitude=torch.from_numpy(14 - step * row[kept].astype(np.float64)),
        years=years,
        rate=torch.from_numpy(1 / (1 + np.exp(-np.stack(logit)))),
        step=step,
        provenance=Provenance(
            entry.name,
            "made-up",
            f"a made-up smooth map of {len(u):,} pixels that changes between the years ({why})",
            0,
            "",
            entry.licence,
            entry.citation,
            entry.url,
        ),
    )
