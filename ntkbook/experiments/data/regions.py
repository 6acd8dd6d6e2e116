"""Parts of a map: a box, or the polygons of a GeoJSON file; a pixel belongs to them where its centre does."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

NAMED = ("nigeria", "africa")
NIGERIA = "NGA"  # in Natural Earth's column ADM0_A3


@dataclass(frozen=True)
class Region:
    """What of the map was asked for.

    Attributes:
        label: how to call it.
        bounds: (west, south, east, north) in degrees; None for one of `NAMED`.
        polygons: GeoJSON geometries; empty for one of `NAMED` and for a box.
        path: the GeoJSON file, where it came from one.
    """

    label: str
    bounds: tuple[float, float, float, float] | None = None
    polygons: tuple[dict[str, Any], ...] = ()
    path: Path | None = None


def parse(region: str | Path | Sequence[float | int]) -> Region:
    """The region that a chapter's parameter means: a name, "west,south,east,north", four numbers, or a GeoJSON file.

    Raises:
        ValueError: it is none of these, or not a box or polygons in degrees.
    """
    if isinstance(region, str) and region in NAMED:
        return Region(region)
    if isinstance(region, Path) or (isinstance(region, str) and Path(region).is_file()):
        return from_geojson(Path(region))
    try:
        parts = region.split(",") if isinstance(region, str) else list(region)
        west, south, east, north = (float(part) for part in parts)
    except (TypeError, ValueError) as error:
        raise ValueError(
            'expected region to be "nigeria", "africa", a box "west,south,east,north" in degrees, or the path of a '
            f"GeoJSON file that is there; got {region!r}"
        ) from error
    if not (-180 <= west < east <= 180 and -90 <= south < north <= 90):
        raise ValueError(
            f"expected a box west,south,east,north in degrees, west < east and south < north; got {region}"
        )
    label = f"the box {west:g} to {east:g}° east, {south:g} to {north:g}° north"
    return Region(label, (west, south, east, north))


def from_geojson(path: Path, country: str | None = None) -> Region:
    """The polygons of a GeoJSON file; with `country`, of its features with that ADM0_A3 alone.

    Raises:
        ValueError: the file is no GeoJSON, has other geometries than polygons, or none in degrees.
    """
    try:
        content = json.loads(path.read_bytes())
        features = content.get("features", [content])
        kept = [one for one in features if country is None or one["properties"].get("ADM0_A3") == country]
        geometries = [one["geometry"] if one["type"] == "Feature" else one for one in kept]
        polygons = tuple(one for one in geometries if one)
        others = sorted({one["type"] for one in polygons} - {"Polygon", "MultiPolygon"})
        if others:
            raise ValueError(f"it has {', '.join(others)}")
        corners = np.array([corner[:2] for one in polygons for corner in _corners(one)], dtype=float)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"expected a GeoJSON file with polygons only; {path} is none ({reason})") from error
    if not len(corners):
        of = f" of {country}" if country else ""
        raise ValueError(f"expected at least one Polygon or MultiPolygon{of} in {path}; it has none")
    (west, south), (east, north) = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
    if not (-180 <= west <= east <= 180 and -90 <= south <= north <= 90):
        raise ValueError(
            f"expected longitude and latitude in degrees, as GeoJSON has them; {path} has coordinates {west:g} to "
            f"{east:g} and {south:g} to {north:g}. Reproject it to EPSG:4326"
        )
    return Region(f"the polygons of {path.name}", (west, south, east, north), polygons, path)


def _corners(geometry: dict[str, Any]) -> list[Any]:
    parts = geometry["coordinates"] if geometry["type"] == "MultiPolygon" else [geometry["coordinates"]]
    return [corner for part in parts for ring in part for corner in ring]


def cells(longitude: np.ndarray, latitude: np.ndarray, step: float) -> tuple[np.ndarray, np.ndarray]:
    """Row and column (n,) of pixel centres on their own grid of `step` degrees: row 0 is the most northern one."""
    row = np.rint((latitude.max() - latitude) / step).astype(np.int64)
    column = np.rint((longitude - longitude.min()) / step).astype(np.int64)
    return row, column


def inside(region: Region, longitude: np.ndarray, latitude: np.ndarray, step: float) -> np.ndarray:
    """Which of the pixels (n,) have their centre in the region's polygons, or in its box, edges included."""
    if region.bounds is None:
        raise ValueError(f"expected a box or polygons; {region.label} is a name")
    west, south, east, north = region.bounds
    kept = (longitude >= west) & (longitude <= east) & (latitude >= south) & (latitude <= north)
    if not region.polygons or not kept.any():
        return kept
    from rasterio import Affine
    from rasterio.features import geometry_mask

    row, column = cells(longitude, latitude, step)
    origin = Affine(step, 0, longitude.min() - step / 2, 0, -step, latitude.max() + step / 2)
    outside = geometry_mask(list(region.polygons), (int(row.max()) + 1, int(column.max()) + 1), origin)
    return ~outside[row, column]


def grid_step(values: np.ndarray) -> float:
    """Distance of neighbours on the grid that the sorted, distinct values (k,) were taken from; NaN for one value."""
    if len(values) < 2:
        return math.nan
    near = float(np.median(np.diff(values)))
    whole = float(values[-1] - values[0])
    return whole / round(whole / near)  # rounded coordinates: over the whole width their error is least
