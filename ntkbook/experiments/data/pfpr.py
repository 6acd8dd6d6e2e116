"""Reading maps of the parasite rate PfPR2-10: GeoTIFF rasters, a table, or the paper's authors' HDF5 file.

All of them become pixels: their centres in degrees (EPSG:4326) in the order of a raster's rows, north first.
"""

import gzip
import warnings
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .regions import cells, grid_step

AGAIN = "delete it and get it again"


class NotCoveredError(ValueError):
    """A sound table that lacks a year, or does not reach as far as the region."""


@dataclass(frozen=True)
class Pixels:
    """n pixels in Y years: `longitude`, `latitude` (n,) and `rate` (Y, n), float64; `step` is degrees a pixel.

    `nigeria` (n,) says which of them are in Nigeria, where the source does (a table).
    """

    longitude: np.ndarray
    latitude: np.ndarray
    rate: np.ndarray
    step: float
    nigeria: np.ndarray | None = None

    def select(self, kept: np.ndarray) -> "Pixels":
        """Those of the pixels where `kept` (n,) is true."""
        nigeria = None if self.nigeria is None else self.nigeria[kept]
        return Pixels(self.longitude[kept], self.latitude[kept], self.rate[:, kept], self.step, nigeria)


def rasters(paths: dict[int, Path]) -> Pixels:
    """The pixels that are valid in all years, from one GeoTIFF a year.

    Raises:
        ValueError: a file is no whole GeoTIFF of one band in EPSG:4326 with square pixels and rates in [0, 1]; they
            have different grids; no pixel is valid in all of them.
    """
    years = list(paths)
    bands, places = zip(*(_band(paths[year]) for year in years), strict=True)
    for year, place in zip(years, places, strict=True):
        if place != places[0]:
            raise ValueError(
                f"expected rasters on one grid; {paths[years[0]]} has {places[0][1]} pixels and the transform "
                f"{tuple(places[0][0])[:6]}, {paths[year]} has {place[1]} and {tuple(place[0])[:6]}. Get both from "
                "one release"
            )
    valid = np.logical_and.reduce([~np.isnan(band) for band in bands])
    if not valid.any():
        raise ValueError(f"expected pixels with a value in {_all(years)}; no pixel of {paths[years[0]].parent} has one")
    transform = places[0][0]
    row, column = np.nonzero(valid)
    longitude = transform.c + (column + 0.5) * transform.a
    latitude = transform.f + (row + 0.5) * transform.e
    return Pixels(longitude, latitude, np.stack([band[valid] for band in bands]).astype(np.float64), transform.a)


def _band(path: Path):
    """The one band of a GeoTIFF, float32 with NaN for nodata, and its (transform, shape)."""
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning, RasterioError, RasterioIOError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)  # it is refused below, with a reason
            with rasterio.open(path, driver="GTiff") as file:
                count, crs, transform, shape = file.count, file.crs, file.transform, file.shape
                band = file.read(1, masked=True)
    except (RasterioError, RasterioIOError) as error:
        raise ValueError(f"{path} is no whole GeoTIFF ({error}): {AGAIN}") from error
    if count != 1:
        raise ValueError(f"expected one band, the mean rate; {path} has {count}. Take one year's mean out of it")
    if crs is None or crs.to_epsg() != 4326:
        raise ValueError(f"expected coordinates in EPSG:4326; {path} has {crs or 'none'}. Reproject it (rio warp)")
    if transform.b or transform.d or not np.isclose(transform.a, -transform.e, rtol=1e-6) or transform.a <= 0:
        raise ValueError(f"expected square pixels with north on top; {path} has the transform {tuple(transform)[:6]}")
    values = band.astype(np.float32).filled(np.nan)
    if np.isnan(values).all():
        raise ValueError(f"expected rates; every pixel of {path} is nodata: {AGAIN}")
    _check_rate(values[~np.isnan(values)], path)
    return values, (transform, shape)


def _check_rate(rate: np.ndarray, path: Path) -> None:
    wrong = ~((rate >= 0) & (rate <= 1))
    if wrong.any():
        raise ValueError(
            f"expected rates in [0, 1]; {path} has {wrong.sum()} others, such as {rate[wrong][0]:g}. A share, not a "
            "percentage, and nodata marked as such, is what is read here"
        )


def table(path: Path, years: tuple[int, ...] = ()) -> Pixels:
    """The same from a gzipped CSV file with the columns longitude, latitude, year, mean, is_ng; () is all its years.

    Raises:
        ValueError: the file is no whole gzip file, or as `from_columns`.
    """
    import pyarrow as pa
    import pyarrow.csv

    try:
        content = pyarrow.csv.read_csv(pa.BufferReader(gzip.decompress(path.read_bytes())))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is no whole gzip file ({error}): {AGAIN}") from error
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is no table of comma-separated values ({error}): {AGAIN}") from error
    return from_columns({name: content[name].to_numpy() for name in content.column_names}, years, path)


def hdf5(path: Path, years: tuple[int, ...]) -> Pixels:
    """The same from the authors' file: a pandas table under the key `full`, which has std_dev, too (not read).

    HDF5 files that pandas reads may hold pickles, which can run code: open only a file that you trust.

    Raises:
        ImportError: PyTables is not installed.
        ValueError: the file is no whole HDF5 file or lacks the key, or as `from_columns`.
    """
    import pandas

    try:
        content: Any = pandas.read_hdf(path, key="full")
    except ImportError as error:
        raise ImportError("HDF5 files are read through PyTables: pip install tables") from error
    except KeyError as error:
        raise ValueError(f"expected a table under the key 'full'; {path} has none: {AGAIN}") from error
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError) as error:  # PyTables' own are RuntimeErrors
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise ValueError(f"{path} is no whole HDF5 file that pandas wrote ({reason[0]}): {AGAIN}") from error
    return from_columns({str(name): content[name].to_numpy() for name in content.columns}, years, path)


def from_columns(columns: dict[str, np.ndarray], years: tuple[int, ...], path: Path) -> Pixels:
    """The pixels that have a rate in all years, from the columns (rows,) of a table; () is all its years.

    Raises:
        NotCoveredError: the table lacks a year.
        ValueError: a column is missing, a value is not what it should be, a pixel comes twice in a year, or
            no pixel has a rate in all years.
    """
    needed = ("longitude", "latitude", "year", "mean", "is_ng")
    missing = [name for name in needed if name not in columns]
    if missing:
        raise ValueError(f"expected the columns {', '.join(needed)}; {path} has only {', '.join(columns) or 'none'}")
    try:
        longitude, latitude, year, mean, is_ng = (np.asarray(columns[name], dtype=np.float64) for name in needed)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected numbers in the columns of {path} ({error}): {AGAIN}") from error
    there = sorted({int(one) for one in np.unique(year) if np.isfinite(one)})
    absent = [one for one in years if one not in there]
    if absent:
        has = f"{path} has the years {_all(there)}, not {_all(absent)}"
        raise NotCoveredError(f"expected rates of {_all(years)}; {has}. Take years that are there")
    years = years or tuple(there)
    if not ((np.abs(longitude) <= 180) & (np.abs(latitude) <= 90) & np.isin(is_ng, (0, 1))).all():
        raise ValueError(f"expected degrees of longitude and latitude, and is_ng of 0 or 1; {path} has others: {AGAIN}")
    seen = np.isfinite(mean)
    _check_rate(mean[seen], path)
    # a pixel's key, in the order of a raster's rows: 1e-4 degrees is far below a pixel, and above what rounding loses
    key = np.rint((90 - latitude) * 1e4).astype(np.int64) * 10**8 + np.rint((longitude + 180) * 1e4).astype(np.int64)
    rows = [np.flatnonzero(seen & (year == one)) for one in years]
    common = key[rows[0]]
    for one, of_year in zip(years, rows, strict=True):
        if len(np.unique(key[of_year])) < len(of_year):
            raise ValueError(f"{path} has a pixel twice in {one}: {AGAIN}")
        common = np.intersect1d(common, key[of_year])
    if not len(common):
        raise ValueError(f"expected pixels with a rate in {_all(years)}; {path} has none that has it in all of them")
    picked = [of_year[np.argsort(key[of_year])] for of_year in rows]
    picked = [of_year[np.isin(key[of_year], common)] for of_year in picked]
    first = picked[0]
    steps = [grid_step(np.unique(np.rint(one[first] * 1e4))) / 1e4 for one in (longitude, latitude)]
    if np.isnan(steps).all():
        raise ValueError(f"expected a map; {path} has one pixel only: {AGAIN}")
    return Pixels(
        longitude[first],
        latitude[first],
        np.stack([mean[of_year] for of_year in picked]),
        float(np.nanmin(steps)),
        is_ng[first] == 1,
    )


def in_nigeria(pixels: Pixels, path: Path, known: Pixels) -> np.ndarray:
    """Which of a raster's `pixels` (n,) are those that the table `known`, read from `path`, has in Nigeria.

    Raises:
        ValueError: the table's pixels do not lie on the raster's grid.
    """
    assert known.nigeria is not None  # it is a table
    wanted = known.select(known.nigeria)
    ends = (pixels.longitude.min(), pixels.latitude.max())
    offset = [(wanted.longitude - ends[0]) / pixels.step, (ends[1] - wanted.latitude) / pixels.step]
    if any(np.abs(one - np.rint(one)).max(initial=0) > 0.1 for one in offset):
        raise ValueError(f"expected the pixels of {path} on the rasters' grid; they are not: keep one of the two")
    row, column = cells(pixels.longitude, pixels.latitude, pixels.step)
    numbers = np.rint(offset[1]).astype(np.int64) * 10**6 + np.rint(offset[0]).astype(np.int64)
    return np.isin(row * 10**6 + column, numbers)


def _all(years: Iterable[int]) -> str:
    return ", ".join(str(year) for year in years)
