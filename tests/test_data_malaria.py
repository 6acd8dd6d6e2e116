"""Malaria: rasters, table and HDF5 against each other and slow obvious versions, regions, bad input, places."""

import dataclasses
import gzip
import inspect
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio
import torch
from data_server import serve
from hypothesis import given
from hypothesis import strategies as st
from rasterio import Affine

from ntkbook.experiments.data import pfpr, regions, sources
from ntkbook.experiments.data.download import DownloadError
from ntkbook.experiments.data.malaria import Malaria, load_malaria
from ntkbook.experiments.data.registry import REGISTRY
from ntkbook.experiments.data.sources import DataNotFoundError

MIRROR = os.environ.get("NTKBOOK_DATA", "")
needs_data = pytest.mark.skipif(not MIRROR, reason="needs the real data: NTKBOOK_DATA is not set")
TABLE = REGISTRY["malaria"].instead
WEST, NORTH, STEP = 3.0, 12.0, 0.5  # of the tiny map: 8 columns from 3 to 7 degrees, 6 rows from 12 to 9
SHAPE = (6, 8)
CENTRES = [(WEST + STEP * (c + 0.5), NORTH - STEP * (r + 0.5)) for r in range(SHAPE[0]) for c in range(SHAPE[1])]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, no data folder, no network."""
    monkeypatch.setattr(sources, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.delenv("NTKBOOK_DATA", raising=False)
    monkeypatch.setenv("NTKBOOK_OFFLINE", "1")
    return tmp_path / "cache"


def rates(year, shape=SHAPE):
    """A map with one pixel of nodata, a different one each year."""
    values = np.random.default_rng(year).uniform(0.1, 0.9, shape).astype(np.float32)
    values[0, year % shape[1]] = -9999
    return values


def raster(root, year=2012, values=None, **changed):
    values = rates(year) if values is None else values
    bands = values if values.ndim == 3 else values[None]
    path = root / "malaria" / f"2015_Nature_Africa_PR.{year}.tif"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "driver": "GTiff",
        "count": len(bands),
        "height": bands.shape[1],
        "width": bands.shape[2],
        "dtype": "float32",
        "nodata": -9999,
        "crs": "EPSG:4326",
        "transform": Affine(STEP, 0, WEST, 0, -STEP, NORTH),
    }
    with rasterio.open(path, "w", **{**about, **changed}) as file:
        file.write(bands)
    return path


def columns(years=(2012, 2015), nigeria=lambda longitude, latitude: longitude > 5):
    """The rasters' pixels as rows of a table, in a scrambled order."""
    rows = [
        (*place, year, rate, int(nigeria(*place)))
        for year in years
        for place, rate in zip(CENTRES, rates(year).ravel().tolist(), strict=True)
        if rate >= 0
    ]
    order = np.random.default_rng(0).permutation(len(rows))
    return pd.DataFrame([rows[i] for i in order], columns=["longitude", "latitude", "year", "mean", "is_ng"])


def table(root, content=None):
    path = root / "malaria" / TABLE
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = columns() if content is None else content
    path.write_bytes(gzip.compress(frame if isinstance(frame, bytes) else frame.to_csv(index=False).encode()))
    return path


def hdf5(root, frame, key="full"):
    path = root / "malaria" / "malaria_df.hdf5"
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_hdf(path, key=key, mode="w")
    return path


def geojson(path, polygon, **properties):
    feature = {"type": "Feature", "properties": properties, "geometry": {"type": "Polygon", "coordinates": [polygon]}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    return path


def load(root, **how):
    return load_malaria(**{"data_dir": root, "progress": False, "region": "africa", **how})


def slow(years, kept=lambda longitude, latitude: True):
    """(longitude, latitude, rates) of the pixels that have a rate in all years, by the obvious loop."""
    maps = [rates(year).ravel().tolist() for year in years]
    each = zip(CENTRES, zip(*maps, strict=True), strict=True)
    return [(*place, *values) for place, values in each if min(values) >= 0 and kept(*place)]


def as_rows(loaded: Malaria):
    return [*zip(loaded.longitude.tolist(), loaded.latitude.tolist(), *loaded.rate.tolist(), strict=True)]


def test_rasters_are_those_pixels_that_are_valid_in_all_years(tmp_path):
    for year in (2012, 2015):
        raster(tmp_path, year)
    loaded = load(tmp_path, years=(2015, 2012))
    assert as_rows(loaded) == slow((2015, 2012))
    assert loaded.years == (2015, 2012)
    assert len(loaded.longitude) == 46
    assert loaded.step == STEP
    assert loaded.provenance.source == "real"
    assert loaded.provenance.files == 2
    assert "2015, 2012 at 46 pixels" in loaded.provenance.description
    assert "the paper's target year is 2016" in loaded.provenance.description


def test_nan_is_no_rate_either(tmp_path):
    values = rates(2012)
    values[3, 3] = np.nan
    raster(tmp_path, values=values)
    assert len(load(tmp_path, years=(2012,)).longitude) == 46


@pytest.mark.parametrize("form", ["csv", "hdf5"])
def test_a_table_is_the_same_as_the_rasters(tmp_path, form):
    frame = columns((2012, 2015, 2016))
    if form == "csv":
        table(tmp_path, frame)
        loaded = load(tmp_path, years=(2012, 2015), region="nigeria")
        expected = slow((2012, 2015), lambda longitude, _: longitude > 5)
    else:
        hdf5(tmp_path, frame.assign(std_dev=0.1))
        loaded = load(tmp_path, years=(2012, 2016), region="nigeria", release="authors")
        expected = slow((2012, 2016), lambda longitude, _: longitude > 5)
        assert loaded.provenance.name == "malaria-paper"
        assert "target year" not in loaded.provenance.description
    np.testing.assert_allclose(as_rows(loaded), expected, rtol=1e-15)
    assert loaded.step == pytest.approx(STEP, rel=1e-12)


def test_rasters_come_before_the_table_which_says_what_is_in_nigeria(tmp_path):
    raster(tmp_path, 2012)
    table(tmp_path, columns((2012, 2015)).assign(mean=0.5))
    alone = load(tmp_path, years=(2012, 2015), region="nigeria")
    assert alone.rate.unique().tolist() == [0.5]  # no raster of 2015: the table serves
    raster(tmp_path, 2015)
    loaded = load(tmp_path, years=(2012, 2015), region="nigeria")
    assert as_rows(loaded) == slow((2012, 2015), lambda longitude, _: longitude > 5)
    assert loaded.provenance.files == 3
    assert "is_ng of the table" in loaded.provenance.description


def test_without_the_table_natural_earths_border_says_what_is_in_nigeria(tmp_path, cache, monkeypatch):
    raster(cache, 2012)
    with pytest.raises(DataNotFoundError, match=r"borders: 1 of 1 files .*natural-earth-vector"):
        load_malaria((2012,), progress=False)  # the rasters are here: no reason for the stand-in
    corners = [[4, 9], [6, 9], [6, 11], [4, 11], [4, 9]]
    border = geojson(tmp_path / "border.geojson", corners, ADM0_A3="NGA")
    monkeypatch.delenv("NTKBOOK_OFFLINE")
    with serve({"/ne_50m_admin_0_countries.geojson": border.read_bytes()}) as server:
        entry = dataclasses.replace(REGISTRY["borders"], url=server.url + "/{file}", hashes=())
        monkeypatch.setitem(REGISTRY, "borders", entry)
        loaded = load_malaria((2012,), progress=False)
    assert as_rows(loaded) == slow((2012,), lambda x, y: 4 < x < 6 and 9 < y < 11)
    assert "Natural Earth" in loaded.provenance.description
    assert loaded.provenance.files == 2
    with pytest.raises(ValueError, match="at least one Polygon or MultiPolygon of GHA"):
        regions.from_geojson(border, "GHA")


def test_a_box_has_the_pixels_whose_centre_is_inside(tmp_path):
    raster(tmp_path)
    expected = slow((2012,), lambda x, y: 4 <= x <= 6.3 and 9.8 <= y <= 11)
    for box in ("4, 9.8, 6.3, 11", (4, 9.8, 6.3, 11)):
        assert as_rows(load(tmp_path, years=(2012,), region=box)) == expected
    raster_free = tmp_path / "other"
    table(raster_free)
    both = load(raster_free, years=(2012,), region="4,9.8,6.3,11")
    np.testing.assert_allclose(as_rows(both), expected, rtol=1e-15)
    with pytest.raises(ValueError, match=r"covers the box 1 to 5° east.* covers 3\.00 to 7\.00° east"):
        load(raster_free, years=(2012,), region="1,10,5,11")
    with pytest.raises(ValueError, match="covers africa"):
        load(raster_free, years=(2012,))


def test_the_edges_of_a_box_belong_to_it(tmp_path):
    raster(tmp_path)
    box = (4.25, 9.75, 5.75, 10.75)  # all four edges are centres of pixels
    loaded = load(tmp_path, years=(2012,), region=box)
    assert as_rows(loaded) == slow((2012,), lambda x, y: 4 < x < 6 and 9.5 < y < 11)
    assert len(loaded.longitude) == 12


@pytest.mark.parametrize("side", range(4))
def test_a_table_must_cover_all_sides_of_a_box(tmp_path, side):
    table(tmp_path)
    box = [3, 9, 7, 12]
    assert len(load(tmp_path, region=box).longitude) == 46
    box[side] += -0.01 if side < 2 else 0.01
    with pytest.raises(pfpr.NotCoveredError, match="expected a table that covers the box"):
        load(tmp_path, region=box)


def test_a_rounded_table_with_gaps_has_the_rasters_grid(tmp_path):
    step, shape = 1 / 24, (90, 60)
    values = np.full(shape, -9999, np.float32)
    values[:, ::2] = 0.5  # no neighbours in a row
    values[7::9] = -9999
    raster(tmp_path, values=values, transform=Affine(step, 0, WEST, 0, -step, NORTH))
    exact = load(tmp_path, years=(2012,))
    place = {"longitude": exact.longitude, "latitude": exact.latitude}
    table(tmp_path / "other", pd.DataFrame({**place, "year": 2012, "mean": 0.5, "is_ng": 1}).round(4))
    loaded = load(tmp_path / "other", years=(2012,), region="nigeria")
    # coordinates are off by up to 5e-5 degrees, at both ends of 89 steps
    assert loaded.step == pytest.approx(step, rel=0, abs=1e-4 / 89)
    image, expected = loaded.grid(loaded.rate[0]), exact.grid(exact.rate[0])
    np.testing.assert_array_equal(image.values.numpy(), expected.values.numpy())
    np.testing.assert_allclose(image.extent, expected.extent, rtol=0, atol=2e-4)  # and so is the extent


def test_a_tables_years_may_differ_in_the_last_digits_of_coordinates(tmp_path):
    # at the edges of bins of 1e-4 degrees, on different sides of them in different years
    frame = columns()
    for name in ("longitude", "latitude"):
        frame[name] += 5e-5 + np.where(frame.year == 2012, -1e-9, 1e-9)
    table(tmp_path, frame)
    loaded = load(tmp_path, region="nigeria")
    expected = np.array(slow((2012, 2015), lambda longitude, _: longitude > 5))
    expected[:, :2] += 5e-5 - 1e-9
    np.testing.assert_allclose(as_rows(loaded), expected, rtol=1e-12)
    assert loaded.step == pytest.approx(STEP, rel=1e-8)


def test_what_is_in_nigeria_does_not_depend_on_the_years_of_the_table(tmp_path):
    for year in (2012, 2015):
        raster(tmp_path, year)
    frame = columns((2011, 2012, 2015))
    table(tmp_path, frame[(frame.year != 2011) | (frame.latitude < 10.5)])
    expected = slow((2012, 2015), lambda longitude, _: longitude > 5)
    assert as_rows(load(tmp_path, region="nigeria")) == expected


@pytest.mark.parametrize("how", ["far away", "abroad", "no rate there"])
def test_rasters_without_a_pixel_that_the_table_has_in_nigeria(tmp_path, how):
    values = rates(2012)
    values[:, 4:] = -9999
    raster(tmp_path, values=values if how == "no rate there" else None)
    frame = columns()
    table(
        tmp_path,
        frame.assign(longitude=frame.longitude + 50 * (how == "far away"), is_ng=frame.is_ng * (how != "abroad")),
    )
    with pytest.raises(ValueError, match=r"a rate in the rasters and is_ng of 1 in .*csv\.gz; of \d+ rows"):
        load(tmp_path, years=(2012,), region="nigeria")


def crosses(x, y, polygon):
    """Whether (x, y) is inside, by the even-odd rule."""
    odd = False
    for (x1, y1), (x2, y2) in itertools.pairwise(polygon):
        if (y1 > y) != (y2 > y) and x < x1 + (y - y1) * (x2 - x1) / (y2 - y1):
            odd = not odd
    return odd


# corners at odd multiples of 0.013: none of the pixels' centres lies on a line between two of them
corner = st.tuples(st.integers(0, 150), st.integers(0, 110)).map(lambda at: (3 + 0.0261 * at[0], 9 + 0.0259 * at[1]))


@given(corners=st.lists(corner, min_size=3, max_size=3, unique=True))
def test_a_polygon_has_the_pixels_whose_centre_is_inside(tmp_path_factory, corners):
    root = tmp_path_factory.mktemp("data")
    polygon = [*corners, corners[0]]
    longitude, latitude = (np.array(one) for one in zip(*CENTRES, strict=True))
    area = regions.parse(geojson(root / "mine.geojson", polygon))
    kept = regions.inside(area, longitude, latitude, STEP)
    assert kept.tolist() == [crosses(x, y, polygon) for x, y in CENTRES]


def test_a_polygon_for_rasters_and_for_a_table(tmp_path):
    polygon = [[3.1, 9.1], [6.9, 9.3], [4.1, 11.9], [3.1, 9.1]]
    mine = geojson(tmp_path / "mine.geojson", polygon)
    table(tmp_path)
    from_table = load(tmp_path, years=(2012,), region=mine)
    raster(tmp_path)
    from_raster = load(tmp_path, years=(2012,), region=str(mine))
    assert as_rows(from_raster) == slow((2012,), lambda x, y: crosses(x, y, polygon))
    np.testing.assert_allclose(as_rows(from_table), as_rows(from_raster), rtol=1e-15)
    assert "mine.geojson" in from_raster.provenance.description
    away = geojson(tmp_path / "away.geojson", [[3.01, 9.01], [3.02, 9.01], [3.02, 9.02], [3.01, 9.01]])
    with pytest.raises(
        ValueError, match=r"expected pixels with a rate in the polygons of away\.geojson.*there is none"
    ):
        load(tmp_path, years=(2012,), region=away)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "expected a GeoJSON file with polygons"),
        ("[1, 2]", "expected a GeoJSON file with polygons"),
        ('{"type": "Polygon"}', "expected a GeoJSON file with polygons"),
        ('{"type": "Point", "coordinates": [1, 2]}', "with polygons only; .* it has Point"),
        ('{"type": "GeometryCollection", "geometries": []}', "with polygons only; .* it has GeometryCollection"),
        ('{"type": "Feature", "geometry": null}', "expected at least one Polygon or MultiPolygon in"),
        ('{"type": "Polygon", "coordinates": [[[4e5, 1e6], [5e5, 1e6], [5e5, 2e6], [4e5, 1e6]]]}', "Reproject it"),
    ],
)
def test_a_geojson_file_that_is_not_what_it_should_be(tmp_path, content, message):
    path = tmp_path / "mine.geojson"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        regions.parse(path)


def test_holes_and_several_polygons(tmp_path):
    square, hole = [[3, 9], [7, 9], [7, 12], [3, 12], [3, 9]], [[4, 10], [5, 10], [5, 11], [4, 11], [4, 10]]
    path = tmp_path / "mine.geojson"
    path.write_text(json.dumps({"type": "MultiPolygon", "coordinates": [[square, hole], [hole[:3] + hole[:1]]]}))
    longitude, latitude = (np.array(one) for one in zip(*CENTRES, strict=True))
    kept = regions.inside(regions.parse(path), longitude, latitude, STEP)
    in_hole = [4 < x < 5 and 10 < y < 11 for x, y in CENTRES]
    # the second polygon is the hole's lower right half; its diagonal goes through two of the four centres
    below = [inside and y < x + 6 - 1e-9 for inside, (x, y) in zip(in_hole, CENTRES, strict=True)]
    clear = [abs(y - x - 6) > 0.1 or not inside for inside, (x, y) in zip(in_hole, CENTRES, strict=True)]
    expected = [not hole or half for hole, half in zip(in_hole, below, strict=True)]
    assert [k for k, c in zip(kept, clear, strict=True) if c] == [e for e, c in zip(expected, clear, strict=True) if c]


@pytest.mark.parametrize("region", ["lagos", "nowhere.geojson", "1,2,3", "5,9,4,10", "3,11,4,9", "3,9,400,10", (1, 2)])
def test_a_bad_region(region):
    with pytest.raises(ValueError, match=r"expected (region to be|a box)") as error:
        regions.parse(region)
    assert "got" in str(error.value)


def test_unit_and_grid(tmp_path):
    raster(tmp_path, 2012)
    raster(tmp_path, 2015)
    loaded = load(tmp_path)
    unit = loaded.unit()
    assert unit.min(0).values.tolist() == [0, 0]
    assert unit.max(0).values.tolist() == [1, 1]
    scale = torch.tensor([3.5, 2.5], dtype=torch.float64)
    place = torch.stack([loaded.longitude, loaded.latitude], 1)
    torch.testing.assert_close(unit * scale + place.min(0).values, place, rtol=1e-14, atol=0)
    whole = loaded.grid(loaded.rate[1])
    expected = rates(2015).astype(np.float64)
    expected[(rates(2015) < 0) | (rates(2012) < 0)] = np.nan
    np.testing.assert_array_equal(whole.values.numpy(), expected)
    assert whole.extent == (3, 7, 9, 12)
    coarse = loaded.grid(loaded.rate[1], 4)
    blocks = [[np.nanmean(expected[r : r + 4, c : c + 4]) for c in (0, 4)] for r in (0, 4)]
    np.testing.assert_allclose(coarse.values.numpy(), blocks, rtol=1e-14)
    assert coarse.extent == (3, 7, 8, 12)
    unchecked = inspect.unwrap(Malaria.grid)  # without the tests' own check of types
    for values, coarsen in ((loaded.rate[0], 0), (loaded.rate[0][:-1], 1), (loaded.rate[0], 1.5)):
        got = rf"46 values, one a pixel, .*; got values of shape \({len(values)},\) and coarsen {coarsen}"
        with pytest.raises(ValueError, match=got):
            unchecked(loaded, values, coarsen)
    with pytest.raises(ValueError, match="several rows and columns"):
        load(tmp_path, region="3,9,7,9.4").unit()


BAD_RASTERS = {
    "two bands": (dict(values=np.full((2, *SHAPE), 0.5, np.float32)), "expected one band, the mean rate; .* has 2"),
    "wrong CRS": (dict(crs="EPSG:32632"), r"expected coordinates in EPSG:4326; .* has EPSG:32632. Reproject it"),
    "no CRS": (dict(crs=None), r"expected coordinates in EPSG:4326; .* has none"),
    "nodata": (dict(values=np.full(SHAPE, -9999, np.float32)), "every pixel of .* is nodata"),
    "percentages": (dict(values=np.full(SHAPE, 36.0, np.float32)), r"rates in \[0, 1\]; .* has 48 others, such as 36"),
    "nodata unmarked": (dict(nodata=None), r"rates in \[0, 1\]; .* has 1 others, such as -9999"),
    "oblong": (dict(transform=Affine(STEP, 0, WEST, 0, -2 * STEP, NORTH)), "square pixels with north on top"),
    "rotated": (dict(transform=Affine(STEP, 0.1, WEST, 0.1, -STEP, NORTH)), "square pixels with north on top"),
    "south on top": (dict(transform=Affine(STEP, 0, WEST, 0, STEP, 0)), "square pixels with north on top"),
}


@pytest.mark.parametrize("which", BAD_RASTERS)
def test_a_raster_that_is_not_what_it_should_be_stays_as_it_was(cache, which):
    changed, message = BAD_RASTERS[which]
    path = raster(cache, **changed)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message) as error:
        load_malaria((2012,), "africa", progress=False)
    assert str(path) in str(error.value)
    assert [(one, one.read_bytes()) for one in (cache / "malaria").iterdir()] == [(path, before)]


@pytest.mark.parametrize(("tag", "value"), [("scales", 0.01), ("offsets", 0.1)])
def test_a_raster_that_is_scaled(tmp_path, tag, value):
    path = raster(tmp_path)
    with rasterio.open(path, "r+") as file:
        setattr(file, tag, (value,))
    with pytest.raises(ValueError, match=rf"has scale .*{value}.*\. Unpack it"):
        load(tmp_path, years=(2012,))


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", None])
def test_a_truncated_raster(tmp_path, content):
    path = raster(tmp_path, values=np.full((300, 300), 0.5, np.float32), compress="deflate", predictor=3)
    path.write_bytes(path.read_bytes()[:-300] if content is None else content)
    with pytest.raises(ValueError, match=r"no whole GeoTIFF .*delete it and get it again"):
        load(tmp_path, years=(2012,))


def test_rasters_that_do_not_fit_each_other(tmp_path):
    raster(tmp_path, 2012)
    raster(tmp_path, 2015, transform=Affine(STEP, 0, WEST + 0.01, 0, -STEP, NORTH))
    with pytest.raises(ValueError, match=r"expected rasters on one grid; .*2012\.tif .*2015\.tif"):
        load(tmp_path)
    raster(tmp_path, 2015, values=rates(2015, (6, 9)))
    with pytest.raises(ValueError, match="expected rasters on one grid"):
        load(tmp_path)
    half = np.where(rates(2012) < 0, 0.5, -9999).astype(np.float32)
    raster(tmp_path, 2015, values=half)
    with pytest.raises(ValueError, match="expected pixels with a value in 2012, 2015"):
        load(tmp_path)
    raster(tmp_path, 2015)
    table(tmp_path, columns().assign(longitude=lambda frame: frame.longitude + 0.2))
    with pytest.raises(ValueError, match="on the rasters' grid; they are not"):
        load(tmp_path, region="nigeria")


def test_only_nodata_in_the_region(tmp_path):
    values = rates(2012)
    values[:, :4] = -9999
    raster(tmp_path, values=values)
    with pytest.raises(
        ValueError, match=r"in the box 3 to 5° east, 9 to 12° north; there is none. The map has pixels in"
    ):
        load(tmp_path, years=(2012,), region="3,9,5,12")


BAD_TABLES = {
    "year": (columns((2011, 2012)), "expected rates of 2012, 2015; .* has the years 2011, 2012, not 2015"),
    "column": (columns().drop(columns=["is_ng"]), "expected the columns .*is_ng; .* has only longitude, latitude"),
    "percentages": (columns().assign(mean=36.0), r"rates in \[0, 1\]; .* such as 36"),
    "degrees": (columns().assign(longitude=1e6), "degrees of longitude and latitude"),
    "is_ng": (columns().assign(is_ng=2), "is_ng of 0 or 1; .* has 94 others, such as 2"),
    "no is_ng": (columns().assign(is_ng=np.nan), "is_ng of 0 or 1; .* has 94 others, such as nan. Give each row one"),
    "both": (columns().assign(is_ng=lambda frame: frame.year == 2012), "expected one is_ng a pixel; .* has 46 pixels"),
    "text": (columns().assign(mean="much"), "expected numbers in the columns"),
    "twice": (pd.concat([columns(), columns().head(1)]), "has a pixel twice in 20"),
    "nobody": (columns().assign(mean=np.nan), "has none that has it in all of them"),
    "abroad": (columns().assign(is_ng=0), "expected pixels with is_ng of 1; .* has none"),
    "one pixel": (columns()[lambda frame: (frame.longitude == 4.75) & (frame.latitude == 9.25)], "has no two pixels"),
}


@pytest.mark.parametrize("form", ["csv", "hdf5"])
@pytest.mark.parametrize("which", BAD_TABLES)
def test_a_table_that_is_not_what_it_should_be_stays_as_it_was(cache, which, form):
    frame, message = BAD_TABLES[which]
    path = table(cache, frame) if form == "csv" else hdf5(cache, frame)
    before = path.read_bytes()
    release = "2015" if form == "csv" else "authors"
    with pytest.raises(ValueError, match=message) as error:
        load_malaria((2012, 2015), progress=False, release=release)
    assert str(path) in str(error.value)
    assert [(one, one.read_bytes()) for one in (cache / "malaria").iterdir()] == [(path, before)]


def test_broken_tables(tmp_path):
    path = table(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"no whole gzip file .*delete it and get it again"):
        load(tmp_path, region="nigeria")
    table(tmp_path, b"<html>\nnot,found</html>")
    with pytest.raises(ValueError, match="no table of comma-separated values"):
        load(tmp_path, region="nigeria")


def test_broken_hdf5_files(tmp_path, monkeypatch):
    def read():
        return load(tmp_path, region="nigeria", release="authors")

    path = hdf5(tmp_path, columns())
    whole = path.read_bytes()
    for part in (b"", b"<html>not found</html>", whole[:2000], whole[: len(whole) // 2]):
        path.write_bytes(part)
        with pytest.raises(ValueError, match=r"malaria_df\.hdf5 .*delete it and get it again"):
            read()
    hdf5(tmp_path, columns()["mean"])
    with pytest.raises(ValueError, match=r"expected a table under the key 'full'; .* has a Series there"):
        read()
    hdf5(tmp_path, columns(), key="part")
    with pytest.raises(ValueError, match="expected a table under the key 'full'"):
        read()
    path.unlink()
    with pytest.raises(DataNotFoundError, match=r"wjmaddox\.github\.io/assets/data/malaria_df\.hdf5"):
        read()
    hdf5(tmp_path, columns())
    monkeypatch.setitem(sys.modules, "tables", None)
    with pytest.raises(ImportError, match="pip install tables"):
        read()


@pytest.mark.parametrize("years", [(), (2012, 2012), [2015, 2012, 2015]])
def test_bad_years(years):
    with pytest.raises(ValueError, match="expected different years"):
        load_malaria(years)


def test_bad_parameters():
    with pytest.raises(ValueError, match=r'2000 to 2015; got \[2016\].*release="authors"'):
        load_malaria((2012, 2016))
    with pytest.raises(ValueError, match='"auto", "real" or "embedded"; got \'fake\''):
        load_malaria(source="fake")
    with pytest.raises(ValueError, match='"2015" or "authors"; got \'2020\''):
        load_malaria(release="2020")
    with pytest.raises(ValueError, match="no regions to choose"):
        load_malaria(source="embedded", region="3,9,4,10")
    with pytest.raises(ValueError, match=r'for release="2015" alone; got release=\'authors\''):
        load_malaria((2012, 2016), source="embedded", release="authors")
    with pytest.raises(ValueError, match=r"2000 to 2015; got \[1999\]"):
        load_malaria((1999, 2012), source="embedded")


@pytest.mark.parametrize("source", ["auto", "embedded"])
def test_the_stand_in_is_made_up_and_says_so(source):
    loaded = load_malaria(source=source)
    assert loaded.provenance.source == "made-up"
    assert loaded.provenance.is_stand_in
    assert "made-up" in loaded.provenance.banner()
    assert ("NTKBOOK_OFFLINE" in loaded.provenance.description) == (source == "auto")
    assert loaded.rate.shape == (2, 3740)
    assert loaded.rate.min() > 0.05
    assert loaded.rate.max() < 0.95
    change = (loaded.rate[1] - loaded.rate[0]).abs()
    assert 0.01 < change.mean() < 0.3
    image = loaded.grid(loaded.rate[0])
    assert image.values.shape == (60, 66)  # the outermost row and column have no pixel
    assert 0 < image.values.isnan().float().mean() < 0.2
    assert image.values.diff(dim=1).abs().nan_to_num(0).max() < 0.1  # smooth
    assert torch.equal(load_malaria((2015, 2012), source=source).rate, loaded.rate.flip(0))


def test_an_explicit_wish_and_data_that_is_partly_there_get_no_stand_in(cache, tmp_path):
    (tmp_path / "mine").mkdir()
    for how in ({"source": "real"}, {"region": "3,9,4,10"}, {"release": "authors"}, {"data_dir": tmp_path / "mine"}):
        with pytest.raises(DataNotFoundError, match="malaria"):
            load_malaria(progress=False, **how)
    raster(cache, 2012)
    with pytest.raises(DataNotFoundError, match=r"1 of 2 files .*PR\.2015\.tif.*subset=time\(%222015-01-01"):
        load_malaria(progress=False)


def test_downloaded_where_it_is_not_here(cache, tmp_path, monkeypatch):
    monkeypatch.delenv("NTKBOOK_OFFLINE")
    content = raster(tmp_path).read_bytes()
    error = b"<ows:ExceptionReport/>"
    with serve({"/2012?a=b": content, "/2013?a=b": error}) as server:
        entry = dataclasses.replace(REGISTRY["malaria"], url=server.url + "/{part}?a=b")
        monkeypatch.setitem(REGISTRY, "malaria", entry)
        loaded = load_malaria((2012,), "africa", progress=False)
        assert as_rows(loaded) == slow((2012,))
        assert [path for path, _ in server.requests] == ["/2012?a=b"]
        with pytest.raises(DownloadError, match="what came is no whole TIFF file"):
            load_malaria((2012, 2013), "africa", progress=False)
        table(cache, columns((2014, 2015)))  # without the year: the rasters are asked for
        with pytest.raises(DownloadError, match=r"PR\.2011\.tif: HTTP status 404"):
            load_malaria((2011,), progress=False)
        assert sorted(one.name for one in (cache / "malaria").iterdir()) == ["2015_Nature_Africa_PR.2012.tif", TABLE]
    for one in (cache / "malaria").iterdir():
        one.unlink()
    gone = load_malaria(progress=False)  # the server is away, and not one file is here
    assert "the download failed" in gone.provenance.description


@pytest.mark.parametrize("content", [b"<html>not found</html>", b"II*\0", b"truncated"])
def test_a_download_that_is_no_whole_raster_does_not_land(cache, tmp_path, monkeypatch, content):
    monkeypatch.delenv("NTKBOOK_OFFLINE")
    if content == b"truncated":
        content = raster(tmp_path, values=np.full((60, 60), 0.5, np.float32)).read_bytes()[:2000]
    kept = raster(cache, 2015).read_bytes()
    with serve({"/2012": content}) as server:
        monkeypatch.setitem(REGISTRY, "malaria", dataclasses.replace(REGISTRY["malaria"], url=server.url + "/{part}"))
        with pytest.raises(DownloadError, match=r"2012\.tif: what came is no whole TIFF file"):
            load_malaria((2012, 2015), "africa", progress=False)
    assert [(one.name[-8:], one.read_bytes()) for one in (cache / "malaria").iterdir()] == [("2015.tif", kept)]


def test_a_big_endian_raster_is_as_good(cache, tmp_path, monkeypatch):
    monkeypatch.delenv("NTKBOOK_OFFLINE")
    content = raster(tmp_path, ENDIANNESS="BIG").read_bytes()
    assert content.startswith(b"MM")
    with serve({"/2012": content}) as server:
        monkeypatch.setitem(REGISTRY, "malaria", dataclasses.replace(REGISTRY["malaria"], url=server.url + "/{part}"))
        assert as_rows(load_malaria((2012,), "africa", progress=False)) == slow((2012,))


def test_a_page_in_place_of_the_authors_file_does_not_land(cache, tmp_path, monkeypatch):
    monkeypatch.delenv("NTKBOOK_OFFLINE")
    page = b"<html>moved</html>"
    with serve({"/malaria_df.hdf5": page}) as server:
        entry = dataclasses.replace(REGISTRY["malaria-paper"], url=server.url + "/{file}")
        monkeypatch.setitem(REGISTRY, "malaria-paper", entry)
        with pytest.raises(DownloadError, match=r"what came is no HDF5 file \(it begins with b'<html>mo'"):
            load_malaria((2012, 2016), release="authors", progress=False)
        assert [*(cache / "malaria").iterdir()] == []
        server.files["/malaria_df.hdf5"] = hdf5(tmp_path, columns((2012, 2016))).read_bytes()
        loaded = load_malaria((2012, 2016), release="authors", progress=False)
    assert loaded.rate.shape == (2, 23)


def test_status_and_fetch(cache, monkeypatch):
    def now():
        return next(status for status in sources.status() if status.name == "malaria")

    assert (now().where, now().files_wanted) == ("embedded", 2)
    table(cache)
    assert (now().where, now().files, now().files_wanted, now().bytes_to_download) == ("cache", 1, 1, 0)
    raster(cache, 2012)
    raster(cache, 2015)
    assert (now().where, now().files, now().files_wanted) == ("cache", 2, 2)
    assert [path.name[-8:] for path in sources.fetch("malaria", progress=False)] == ["2012.tif", "2015.tif"]


def test_ntkbook_and_this_module_import_neither_rasterio_nor_pytables():
    code = (
        "import sys, ntkbook, ntkbook.experiments.data.malaria; "
        "print({'rasterio', 'tables', 'pandas'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@needs_data
def test_real_rasters_and_table_agree():
    loaded = load_malaria(source="real", data_dir=MIRROR, progress=False)
    assert loaded.rate.shape == (2, 43_154)
    assert loaded.rate.mean(1).tolist() == pytest.approx([0.361, 0.349], abs=5e-4)  # as published, three digits
    known = pfpr.table(Path(MIRROR) / "malaria" / TABLE, (2012, 2015))
    known = known.select(known.nigeria)
    # the table has six significant digits
    np.testing.assert_allclose(loaded.longitude.numpy(), known.longitude, rtol=0, atol=5.1e-5)
    np.testing.assert_allclose(loaded.latitude.numpy(), known.latitude, rtol=0, atol=5.1e-5)
    np.testing.assert_allclose(loaded.rate.numpy(), known.rate, rtol=5.1e-6, atol=0)


@needs_data
def test_real_africa():
    loaded = load_malaria(source="real", region="africa", data_dir=MIRROR, progress=False)
    assert loaded.rate.shape == (2, 890_764)
    image = loaded.grid(loaded.rate[0], 8)
    assert image.values.numel() < 50_000
    assert image.values.nanmean().item() == pytest.approx(loaded.rate[0].mean().item(), abs=0.02)  # unequal blocks
