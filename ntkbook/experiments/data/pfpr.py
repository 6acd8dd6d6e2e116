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
        ValueError: a file is no whole GeoTIFF of one band in EPSG:4326 with square pixels and rates in [0, 1], not
            scaled; they have different grids; no pixel is valid in all of them.
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
                scales, offsets = file.scales, file.offsets
                band = file.read(1, masked=True)
    except (RasterioError, RasterioIOError) as error:
        raise ValueError(f"{path} is no whole GeoTIFF ({error}): {AGAIN}") from error
    if count != 1:
        raise ValueError(f"expected one band, the mean rate; {path} has {count}. Take one year's mean out of it")
    if (scales, offsets) != ((1,), (0,)):
        raise ValueError(
            f"expected rates as they are; {path} has scale {scales[0]:g} and offset {offsets[0]:g}. Unpack it"
        )
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


def table(path: Path, years: tuple[int, ...]) -> Pixels:
    """The same from a gzipped CSV file with the columns longitude, latitude, year, mean, is_ng.

    Raises:
        ValueError: the file is no whole gzip file, or as `from_columns`.
    """
    return from_columns(_read(path), years, path)


def hdf5(path: Path, years: tuple[int, ...]) -> Pixels:
    """The same from the authors' file: a pandas table under the key `full`, which has std_dev, too (not read).

    HDF5 files that pandas reads may hold pickles, which can run code: open only a file that you trust.

    Raises:
        ImportError: PyTables is not installed.
        ValueError: the file is no whole HDF5 file or has no table under the key, or as `from_columns`.
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
    if not isinstance(content, pandas.DataFrame):
        raise ValueError(f"expected a table under the key 'full'; {path} has a {type(content).__name__} there: {AGAIN}")
    return from_columns({str(name): content[name].to_numpy() for name in content.columns}, years, path)


@dataclass(frozen=True)
class _Rows:
    """The rows of a table (rows,), checked: their coordinates, and `key`, a pixel's number in a raster's order."""

    longitude: np.ndarray
    latitude: np.ndarray
    year: np.ndarray
    mean: np.ndarray
    nigeria: np.ndarray
    key: np.ndarray
    step: float


def _read(path: Path) -> dict[str, np.ndarray]:
    """The columns of a gzipped CSV file."""
    import pyarrow as pa
    import pyarrow.csv

    try:
        content = pyarrow.csv.read_csv(pa.BufferReader(gzip.decompress(path.read_bytes())))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is no whole gzip file ({error}): {AGAIN}") from error
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is no table of comma-separated values ({error}): {AGAIN}") from error
    return {name: content[name].to_numpy() for name in content.column_names}


def _rows(columns: dict[str, np.ndarray], path: Path) -> _Rows:
    needed = ("longitude", "latitude", "year", "mean", "is_ng")
    missing = [name for name in needed if name not in columns]
    if missing:
        raise ValueError(f"expected the columns {', '.join(needed)}; {path} has only {', '.join(columns) or 'none'}")
    try:
        longitude, latitude, year, mean, is_ng = (np.asarray(columns[name], dtype=np.float64) for name in needed)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected numbers in the columns of {path} ({error}): {AGAIN}") from error
    if not ((np.abs(longitude) <= 180) & (np.abs(latitude) <= 90)).all():
        raise ValueError(f"expected degrees of longitude and latitude; {path} has others: {AGAIN}")
    wrong = ~np.isin(is_ng, (0, 1))
    if wrong.any():
        raise ValueError(
            f"expected is_ng of 0 or 1; {path} has {wrong.sum()} others, such as {is_ng[wrong][0]:g}. Give each row one"
        )
    _check_rate(mean[np.isfinite(mean)], path)
    steps = [grid_step(_distinct(one)) for one in (longitude, latitude)]
    if np.isnan(steps).all():
        raise ValueError(f"expected a map; {path} has no two pixels: {AGAIN}")
    step = float(np.nanmin(steps))
    row, column = cells(longitude, latitude, step)
    key, nigeria = row * (column.max() + 1) + column, is_ng == 1
    both = np.intersect1d(key[nigeria], key[~nigeria])
    if len(both):
        raise ValueError(f"expected one is_ng a pixel; {path} has {len(both)} pixels with 0 in a row and 1 in another")
    return _Rows(longitude, latitude, year, mean, nigeria, key, step)


def _distinct(values: np.ndarray) -> np.ndarray:
    """The values, sorted, each once; 1e-3 degrees is far below a pixel, and above what rounding loses."""
    values = np.unique(values)
    return values[np.diff(values, prepend=-np.inf) > 1e-3]


def from_columns(columns: dict[str, np.ndarray], years: tuple[int, ...], path: Path) -> Pixels:
    """The pixels that have a rate in all years, from the columns (rows,) of a table.

    Raises:
        NotCoveredError: the table lacks a year.
        ValueError: a column is missing, a value is not what it should be, a pixel comes twice in a year or with
            both 0 and 1 for is_ng, or no pixel has a rate in all years.
    """
    table = _rows(columns, path)
    there = sorted({int(one) for one in np.unique(table.year) if np.isfinite(one)})
    absent = [one for one in years if one not in there]
    if absent:
        has = f"{path} has the years {_all(there)}, not {_all(absent)}"
        raise NotCoveredError(f"expected rates of {_all(years)}; {has}. Take years that are there")
    rows = [np.flatnonzero(np.isfinite(table.mean) & (table.year == one)) for one in years]
    common = table.key[rows[0]]
    for one, of_year in zip(years, rows, strict=True):
        if len(np.unique(table.key[of_year])) < len(of_year):
            raise ValueError(f"{path} has a pixel twice in {one}: {AGAIN}")
        common = np.intersect1d(common, table.key[of_year])
    if not len(common):
        raise ValueError(f"expected pixels with a rate in {_all(years)}; {path} has none that has it in all of them")
    picked = [of_year[np.argsort(table.key[of_year])] for of_year in rows]
    picked = [of_year[np.isin(table.key[of_year], common)] for of_year in picked]
    first = picked[0]
    rate = np.stack([table.mean[of_year] for of_year in picked])
    return Pixels(table.longitude[first], table.latitude[first], rate, table.step, table.nigeria[first])


def in_nigeria(pixels: Pixels, path: Path) -> np.ndarray:
    """Which of a raster's `pixels` (n,) have is_ng of 1 in the table, whatever the row's year.

    Raises:
        ValueError: the table is not what it should be, its pixels do not lie on the raster's grid, or none is in both.
    """
    known = _rows(_read(path), path)
    longitude, latitude = known.longitude[known.nigeria], known.latitude[known.nigeria]
    ends = (pixels.longitude.min(), pixels.latitude.max())
    offset = [(longitude - ends[0]) / pixels.step, (ends[1] - latitude) / pixels.step]
    if any(np.abs(one - np.rint(one)).max(initial=0) > 0.1 for one in offset):
        raise ValueError(f"expected the pixels of {path} on the rasters' grid; they are not: keep one of the two")
    row, column = cells(pixels.longitude, pixels.latitude, pixels.step)
    numbers = np.rint(offset[1]).astype(np.int64) * 10**6 + np.rint(offset[0]).astype(np.int64)
    kept = np.isin(row * 10**6 + column, numbers)
    if not kept.any():
        raise ValueError(
            f"expected pixels with a rate in the rasters and is_ng of 1 in {path}; of {len(numbers)} rows with is_ng "
            "of 1, none is such a pixel. Take the table and the rasters of one map, or a box for a region"
        )
    return kept


def _all(years: Iterable[int]) -> str:
    return ", ".join(str(year) for year in years)
