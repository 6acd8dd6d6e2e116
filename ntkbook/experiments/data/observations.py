"""Reading GHCN-Daily `by_station` files, averaging them to one value a calendar day, and keeping the averages.

A file's columns, without a header: id, YYYYMMDD, element, value (for PRCP in tenths of mm), M-, Q- and S-flag, time.
"""

import contextlib
import gzip
import hashlib
import json
import logging
import os
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet
from tqdm import tqdm

from . import sources

MONTH_LENGTH = np.array([31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31])
MONTH_START = np.concatenate([[0], np.cumsum(MONTH_LENGTH)[:-1]])
COLUMNS = ["id", "date", "element", "value", "m_flag", "q_flag", "s_flag", "time"]
USED = {"id": pa.string(), "date": pa.int32(), "element": pa.string(), "value": pa.int32(), "q_flag": pa.string()}
pc: Any = pyarrow.compute  # makes its functions as it is imported, which a type checker does not see
FORMAT = 1  # of the columnar cache: to be raised when what is kept, or how it is computed, changes
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Table:
    """Averages of S stations: `mm` and `n_years` are (S, 365) float64 and int64; `sha256` is over the files read."""

    mm: np.ndarray
    n_years: np.ndarray
    sha256: str


def daily(path: Path, years: tuple[int, int]) -> np.ndarray:
    """Precipitation (years, 365) in mm from one station's file; NaN where missing or flagged for its quality.

    29 February is left out: index 58 is 28 February and 59 is 1 March in every year.

    Raises:
        ValueError: the file is no whole gzip file, or not a GHCN-Daily file of the station it is named after.
    """
    station = path.name.split(".")[0]
    try:
        data = gzip.decompress(path.read_bytes())
        table = pyarrow.csv.read_csv(
            pa.BufferReader(data),
            read_options=pyarrow.csv.ReadOptions(column_names=COLUMNS),
            convert_options=pyarrow.csv.ConvertOptions(column_types=USED, include_columns=list(USED)),
        )
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is no whole gzip file ({error}): delete it and get it again") from error
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is no GHCN-Daily by_station file ({error}): delete it and get it again") from error
    if table.num_rows and pc.unique(table["id"]).to_pylist() != [station]:
        raise ValueError(f"{path} should have rows of {station} only: delete it and get it again")
    # upstream files have all elements of a century or more: strings are compared by Arrow, the few rows left by numpy
    table = table.filter(pc.and_(pc.equal(table["element"], "PRCP"), pc.equal(table["q_flag"], "")))
    date, value = table["date"].to_numpy(), table["value"].to_numpy()
    year, month, day = date // 10000, date // 100 % 100, date % 100
    usable = (year >= years[0]) & (year <= years[1]) & (date % 10000 != 229) & (value != -9999)  # -9999: missing
    date, value, year, month, day = (column[usable] for column in (date, value, year, month, day))
    ok = (month >= 1) & (month <= 12)
    ok[ok] &= (day[ok] >= 1) & (day[ok] <= MONTH_LENGTH[month[ok] - 1])
    if not ok.all() or (value < 0).any():
        row = int(np.argmin(ok & (value >= 0)))
        raise ValueError(f"{path}: expected dates YYYYMMDD and PRCP >= 0; got {date[row]}, {value[row]}")
    n_years = years[1] - years[0] + 1
    cell = (year - years[0]) * 365 + MONTH_START[month - 1] + day - 1
    if len(np.unique(cell)) < len(cell):
        raise ValueError(f"{path} has a day twice: delete it and get it again")
    mm = np.full(n_years * 365, np.nan)
    mm[cell] = value / 10
    return mm.reshape(n_years, 365)


def average(mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (365,) over the years (rows) that have the day, NaN where none has, and how many have it (365,)."""
    seen = ~np.isnan(mm)
    n_years = seen.sum(axis=0)
    total = np.where(seen, mm, 0.0).sum(axis=0)
    return np.divide(total, n_years, out=np.full(mm.shape[1], np.nan), where=n_years > 0), n_years


def load(paths: list[Path], years: tuple[int, int], progress: bool = True) -> Table:
    """Averages of one file a station, in the order given; the second time from a columnar file in the user's cache.

    The columnar file is made anew when a name, size or time of change of the files differs.

    Raises:
        ValueError: as `daily`.
    """
    about = [[str(path.resolve()), years] for path in paths]
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    kept = sources.cache_dir() / "tables" / f"precipitation-{key}.parquet"
    state = json.dumps([FORMAT, [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]])
    table = _read(kept, state)
    if table is None:
        with ThreadPoolExecutor() as pool:  # threads: unpacking and parsing hold no lock of Python's
            each = pool.map(lambda path: average(daily(path, years)), paths)
            hidden = None if progress else True  # None: only where stderr is a terminal
            averages = list(tqdm(each, total=len(paths), desc="stations", disable=hidden, leave=False))
        mm, n_years = (np.stack(part) for part in zip(*averages, strict=True))
        table = Table(mm, n_years, sources.digest(paths))
        _write(kept, state, table)
    return table


def _read(kept: Path, state: str) -> Table | None:
    """What `_write` kept, if it is there, whole, and of the same files."""
    try:
        columns = pyarrow.parquet.read_table(kept)
    except (OSError, pa.ArrowInvalid):  # not there, or not whole: it is only a cache
        return None
    metadata = columns.schema.metadata or {}
    if metadata.get(b"state") != state.encode():
        return None
    # copies: Arrow's own memory is read-only, which torch does not take
    mm, n_years = (columns[name].to_numpy().reshape(-1, 365).copy() for name in ("mm", "n_years"))
    return Table(mm, n_years, metadata[b"sha256"].decode())


def _write(kept: Path, state: str, table: Table) -> None:
    columns = pa.table({"mm": table.mm.ravel(), "n_years": table.n_years.ravel()})
    columns = columns.replace_schema_metadata({"state": state, "sha256": table.sha256})
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=kept.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                pyarrow.parquet.write_table(columns, file)
            os.replace(temporary, kept)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
    except OSError as error:
        log.info("the averages could not be kept for the next time in %s: %s", kept, error)


def embedded_file() -> Path:
    """The Seattle weather file that the installed package vega_datasets carries.

    Raises:
        DataNotFoundError: the package is not installed.
    """
    try:
        package = resources.files("vega_datasets")
    except ModuleNotFoundError as error:
        raise sources.DataNotFoundError(
            "the embedded precipitation data comes with the package vega_datasets: pip install vega_datasets==0.9.0"
        ) from error
    return Path(str(package / "_data" / "seattle-weather.csv"))


def seattle(path: Path, sha256: str | None) -> dict[int, np.ndarray]:
    """Year -> precipitation (365,) in mm of `embedded_file`, without 29 February.

    Raises:
        ValueError: the file's hash is not `sha256`.
    """
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{path} should have sha256 {sha256}: install vega_datasets==0.9.0, whose file it is")
    table = pyarrow.csv.read_csv(pa.BufferReader(data))
    mm: dict[int, list[float]] = {}
    for date, value in zip(table["date"].to_pylist(), table["precipitation"].to_pylist(), strict=True):
        if not date.endswith("/02/29"):
            mm.setdefault(int(date[:4]), []).append(value)
    return {year: np.array(values) for year, values in mm.items()}
