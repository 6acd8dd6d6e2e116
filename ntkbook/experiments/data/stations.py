"""The stations of the US Historical Climatology Network: the committed Midwest ones, or all from NOAA's list."""

import csv
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from .registry import REGISTRY
from .sources import obtain

NAMED = ("midwest", "few", "all")


def midwest() -> dict[str, str]:
    """Id -> name of the 140 USHCN stations in Illinois, Indiana, Iowa, Nebraska and Ohio that the book uses."""
    text = resources.files("ntkbook.experiments.data").joinpath("midwest_stations.csv").read_text(encoding="utf-8")
    return {row["id"]: f"{row['name'] or row['id']}, {row['state']}" for row in csv.DictReader(text.splitlines())}


def few() -> dict[str, str]:
    """Eight of `midwest`, Pana among them: one in twenty, for runs that must be quick."""
    names = midwest()
    kept = {"USC00116579", *list(names)[::20]}
    return {one: name for one, name in names.items() if one in kept}


def network(path: Path) -> dict[str, str]:
    """Id -> name of all stations that NOAA's list marks as part of the network (flag HCN)."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    # fixed columns: 1-11 id, 39-40 state, 42-71 name, 77-79 flag
    found = {s[:11]: f"{s[41:71].strip().title()}, {s[38:40]}" for s in lines if s[76:79] == "HCN"}
    if not found:
        raise ValueError(f"expected NOAA's list of stations with flag HCN in columns 77-79; {path} has none")
    return found


def resolve(stations: str | Sequence[str], data_dir: str | Path | None = None, progress: bool = True) -> dict[str, str]:
    """Id -> name of the stations asked for.

    Args:
        stations: "midwest", "few" of these, "all" (of NOAA's list, downloaded where needed), one id or several.
        data_dir, progress: as for `sources.obtain`.

    Raises:
        ValueError: no station, one twice, or what can be no station's id.
        DataNotFoundError, DownloadError: for "all", as `sources.obtain`.
    """
    if isinstance(stations, str) and stations == "midwest":
        return midwest()
    if isinstance(stations, str) and stations == "few":
        return few()
    if isinstance(stations, str) and stations == "all":
        (path,) = obtain(REGISTRY["stations"], REGISTRY["stations"].files, data_dir, progress).values()
        return network(path)
    ids = [stations] if isinstance(stations, str) else list(stations)
    wrong = [one for one in ids if not re.fullmatch(r"[A-Z]{2}[A-Z0-9_-]{9}", str(one))]
    if wrong or not ids:
        got = wrong or stations
        raise ValueError(f'expected "midwest", "few", "all" or ids like "USC00116579" (11 characters); got {got!r}')
    if len(set(ids)) < len(ids):
        raise ValueError(f"expected each station once; got {ids}")
    known = midwest()
    return {one: known.get(one, one) for one in ids}
