"""Precipitation a calendar day, averaged over years (Section 3 and Appendix F of the paper).

The paper's data is of the US Historical Climatology Network; its counts (300 training and 65 test points at each
of 1,209 locations) imply one value a day of the year, an average over years, which it does not name. 29 February
is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from . import observations
from .registry import REGISTRY
from .sources import DataNotFoundError, Provenance, digest, locate, obtain
from .stations import NAMED, resolve


@dataclass(frozen=True)
class Split:
    """The first days of the year for training and the rest for testing, standardised as Appendix F says.

    Attributes:
        x_train, x_test: the days, standardised by the training days' mean and standard deviation.
        y_train, y_test: precipitation, each station standardised by its own training days; NaN where not observed.
        mean, scale: what each station was standardised by, in mm a day.
        day_mean, day_scale: what the days were standardised by.
    """

    x_train: Float[Tensor, "train 1"]
    x_test: Float[Tensor, "test 1"]
    y_train: Float[Tensor, "stations train"]
    y_test: Float[Tensor, "stations test"]
    mean: Float[Tensor, " stations"]
    scale: Float[Tensor, " stations"]
    day_mean: float
    day_scale: float

    def to_mm(self, y: Float[Tensor, "stations days"]) -> Float[Tensor, "stations days"]:
        """Standardised values back in mm a day; errors and standard deviations need only `scale`."""
        return y * self.scale[:, None] + self.mean[:, None]


@dataclass(frozen=True)
class Precipitation:
    """Mean precipitation a calendar day at S stations.

    Attributes:
        day: 1 to 365, without 29 February.
        mm: mean over the years that observed the day, in mm a day; NaN where none did.
        n_years: how many years that was.
        ids, names: of the stations.
        provenance: which data this is.
    """

    day: Float[Tensor, "365"]
    mm: Float[Tensor, "stations 365"]
    n_years: Int[Tensor, "stations 365"]
    ids: list[str]
    names: list[str]
    provenance: Provenance

    def select(self, ids: Sequence[str]) -> "Precipitation":
        """The same data of these stations alone, in this order."""
        unknown = [one for one in ids if one not in self.ids]
        if unknown or not ids:
            raise ValueError(f"expected ids among the {len(self.ids)} stations loaded; got {unknown or 'none'}")
        rows = [self.ids.index(one) for one in ids]
        names = [self.names[row] for row in rows]
        return replace(self, mm=self.mm[rows], n_years=self.n_years[rows], ids=list(ids), names=names)

    def split(self, n_train: int = 300) -> Split:
        """The first `n_train` days for training, the others for testing, standardised (n - 1 in the deviations).

        Raises:
            ValueError: `n_train` leaves no two days to train on or none to test on, or a station's training days
                have no two different values to standardise by.
        """
        if not 2 <= n_train < 365:
            raise ValueError(f"expected 2 to 364 training days; got {n_train}")
        train = self.mm[:, :n_train]
        seen = ~train.isnan()
        count = seen.sum(1)
        mean = train.nansum(1) / count
        scale = (torch.where(seen, train - mean[:, None], 0.0).square().sum(1) / (count - 1)).sqrt()
        bad = [one for one, s in zip(self.ids, scale.tolist(), strict=True) if not 0 < s < float("inf")]
        if bad:
            raise ValueError(
                f"expected two different values among the first {n_train} days of each station, to standardise by; "
                f"not so at {', '.join(bad[:5])}. Leave out what is not so with select(), or take more years"
            )
        days = self.day[:n_train]
        x = ((self.day - days.mean()) / days.std())[:, None]
        y = (self.mm - mean[:, None]) / scale[:, None]
        return Split(
            x[:n_train], x[n_train:], y[:, :n_train], y[:, n_train:], mean, scale, days.mean().item(), days.std().item()
        )


def load_precipitation(
    stations: str | Sequence[str] = "midwest",
    years: Sequence[int] = (1985, 2014),
    source: str = "auto",
    data_dir: str | Path | None = None,
    progress: bool = True,
) -> Precipitation:
    """Loads precipitation, from disk where it is, else by download, else (`source="auto"`) the embedded stand-in.

    The stand-in, daily precipitation in Seattle with each of the years 2012 to 2015 a task, is taken only for
    "midwest", "few" or "all", only where not one of the files could be had, and says so in its provenance.

    Args:
        stations: "midwest" (the 140 of the book), "few" (eight of them), "all" (the whole network), or ids.
        years: the first and the last one to average over. Does not apply to the embedded data.
        source: "auto", "real" (refuses the stand-in), or "embedded" (asks for it).
        data_dir: where given, the only folder to look in; else `$NTKBOOK_DATA`, the cache, a download.
        progress: whether to show progress bars, on stderr.

    Raises:
        ValueError: bad years, source or ids; a file that is not what it should be; no observation in these years.
        DataNotFoundError, DownloadError: files are neither here nor to be had, as `sources.obtain`.
    """
    first, last = _check_years(years)
    if source not in ("auto", "real", "embedded"):
        raise ValueError(f'expected source to be "auto", "real" or "embedded"; got {source!r}')
    named = isinstance(stations, str) and stations in NAMED
    if source == "embedded":
        if not named:
            raise ValueError(f'the embedded data has no stations to choose; got {stations!r} instead of "midwest"')
        return _seattle("asked for")
    entry = REGISTRY["precipitation"]
    files: list[str] = []
    try:
        names = resolve(stations, data_dir, progress)
        files = [f"{station}.csv.gz" for station in names]
        paths = obtain(entry, files, data_dir, progress)
    except OSError as error:
        # An explicit wish is never answered by other data, nor is data that is partly there.
        if source == "real" or data_dir or not named or locate(entry, files):
            raise
        offline = isinstance(error, DataNotFoundError)
        return _seattle("NTKBOOK_OFFLINE is set and the files are not here" if offline else "the download failed")
    table = observations.load(list(paths.values()), (first, last), progress)
    return _real(names, table, (first, last), named)


def _check_years(years: Sequence[int]) -> tuple[int, int]:
    ok = not isinstance(years, str) and len(years) == 2 and all(isinstance(y, int | np.integer) for y in years)
    if not ok or not 1700 <= years[0] <= years[1] <= 2200:
        raise ValueError(f"expected years as (first, last), such as (1985, 2014); got {years!r}")
    return int(years[0]), int(years[1])


def _real(names: dict[str, str], table: observations.Table, years: tuple[int, int], named: bool) -> Precipitation:
    entry = REGISTRY["precipitation"]
    ids = list(names)
    seen = table.n_years.sum(axis=1) > 0
    without = [one for one, some in zip(ids, seen, strict=True) if not some]
    span = f"{years[0]} to {years[1]}"
    if without and (not named or len(without) == len(ids)):
        some = ", ".join(without[:5])
        raise ValueError(f"expected precipitation in {span}; none at {some}. Take other years or stations")
    kept = [one for one, some in zip(ids, seen, strict=True) if some]
    states = sorted({name.rsplit(", ", 1)[-1] for name in names.values() if ", " in name})
    place = f" in {', '.join(states)}" if 0 < len(states) <= 5 else ""
    left_out = f" ({len(without)} more have no observation in these years)" if without else ""
    description = (
        f"daily precipitation at {len(kept)} station{'s' if len(kept) > 1 else ''} of GHCN-Daily{place}{left_out}, "
        f"averaged over {span} to one value a calendar day"
    )
    return Precipitation(
        day=torch.arange(1, 366, dtype=torch.float64),
        mm=torch.from_numpy(table.mm[seen]),
        n_years=torch.from_numpy(table.n_years[seen]),
        ids=kept,
        names=[names[one] for one in kept],
        provenance=Provenance(
            entry.name,
            "real",
            description,
            len(ids),
            table.sha256,
            "US government, public domain",
            entry.citation,
            entry.url.format(file=""),
        ),
    )


def _seattle(why: str) -> Precipitation:
    """The stand-in: each of the years 2012 to 2015 in Seattle, Washington, is a task."""
    entry = REGISTRY["seattle"]
    path = observations.embedded_file()
    sha256 = digest([path])
    values = observations.seattle(path, entry.known_hash(path.name))
    return Precipitation(
        day=torch.arange(1, 366, dtype=torch.float64),
        mm=torch.from_numpy(np.stack(list(values.values()))),
        n_years=torch.ones(len(values), 365, dtype=torch.int64),
        ids=[f"SEATTLE-{year}" for year in values],
        names=[f"Seattle, WA, {year}" for year in values],
        provenance=Provenance(
            entry.name,
            "embedded",
            f"daily precipitation in Seattle, each year of 2012 to 2015 a task, not averaged ({why})",
            1,
            sha256,
            entry.licence,
            entry.citation,
            entry.url,
        ),
    )
