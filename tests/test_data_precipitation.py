"""Precipitation: reading and averaging against a slow obvious version, the kept averages, and where it comes from."""

import calendar
import csv
import dataclasses
import gzip
import io
import math
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from data_server import serve
from hypothesis import given
from hypothesis import strategies as st

from ntkbook.experiments.data import observations, sources, stations
from ntkbook.experiments.data.download import DownloadError
from ntkbook.experiments.data.precipitation import Precipitation, load_precipitation
from ntkbook.experiments.data.registry import REGISTRY
from ntkbook.experiments.data.sources import DataNotFoundError

MIRROR = os.environ.get("NTKBOOK_DATA", "")
needs_data = pytest.mark.skipif(not MIRROR, reason="needs the real data: NTKBOOK_DATA is not set")
A, B = "USC00110001", "USC00110002"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, no data folder, no network."""
    monkeypatch.setattr(sources, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.delenv("NTKBOOK_DATA", raising=False)
    monkeypatch.setenv("NTKBOOK_OFFLINE", "1")
    return tmp_path / "cache"


def text(rows, station=A):
    return "".join(
        f"{station},{date},{element},{value},{m},{q},{s},{time}\n" for date, element, value, m, q, s, time in rows
    )


def put(root, rows, station=A):
    path = root / "ghcnd" / "by_station" / f"{station}.csv.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(rows if isinstance(rows, bytes) else text(rows, station).encode()))
    return path


def row(date, value, element="PRCP", q=""):
    return (date, element, value, "", q, "7", "0700")


def every_day(years, seed=0):
    draw = np.random.default_rng(seed)
    return [
        row(f"{year}{month:02}{day:02}", int(draw.integers(0, 500)))
        for year in years
        for month in range(1, 13)
        for day in range(1, calendar.monthrange(year, month)[1] + 1)
    ]


def slow_averages(content: str, years):
    """The obvious way: each row with the csv module, each calendar day's values in a list."""
    days = [(m, d) for m in range(1, 13) for d in range(1, calendar.monthrange(2001, m)[1] + 1)]
    values = {day: [] for day in days}
    for _, date, element, value, _, q_flag, *_ in csv.reader(io.StringIO(content)):
        day = (int(date[4:6]), int(date[6:8]))
        wanted = years[0] <= int(date[:4]) <= years[1] and day != (2, 29)
        if element == "PRCP" and q_flag == "" and value != "-9999" and wanted:
            values[day].append(float(value) / 10)
    means = [sum(v) / len(v) if v else math.nan for v in values.values()]
    return np.array(means), np.array([len(v) for v in values.values()])


dates = st.dates(min_value=calendar.datetime.date(1997, 1, 1), max_value=calendar.datetime.date(2004, 12, 31))
leap = st.sampled_from([calendar.datetime.date(2000, 2, 29), calendar.datetime.date(2004, 2, 29)])
rows_of_a_file = st.lists(
    st.tuples(
        (dates | leap).map(lambda date: date.strftime("%Y%m%d")),
        st.sampled_from(["PRCP", "PRCP", "PRCP", "TMAX", "SNOW"]),
        st.integers(0, 3000) | st.just(-9999),
        st.sampled_from(["", "T", "P"]),
        st.sampled_from(["", "", "", "D", "X"]),
        st.sampled_from(["", "7", "0"]),
        st.sampled_from(["", "0700", "2400"]),
    ),
    min_size=1,
    max_size=200,
    unique_by=lambda one: (one[0], one[1]),
)


@given(rows=rows_of_a_file, first=st.integers(1996, 2005), more=st.integers(0, 8))
def test_averages_are_those_of_the_slow_version(tmp_path_factory, rows, first, more):
    path = put(tmp_path_factory.mktemp("data"), rows)
    years = (first, first + more)
    mm, n_years = observations.average(observations.daily(path, years))
    slow_mm, slow_n = slow_averages(text(rows), years)
    np.testing.assert_array_equal(n_years, slow_n)
    np.testing.assert_allclose(mm, slow_mm, rtol=1e-12, atol=0)


def test_days_are_where_they_belong_in_leap_years_too(tmp_path):
    path = put(tmp_path, [row("20000228", 1), row("20000229", 2), row("20000301", 3), row("20001231", 4)])
    (mm,) = observations.daily(path, (2000, 2000))
    assert {i: mm[i] for i in np.flatnonzero(~np.isnan(mm))} == {58: 0.1, 59: 0.3, 364: 0.4}


def test_other_elements_may_be_negative_and_flagged_values_are_dropped(tmp_path):
    rows = [row("20010101", -55, "TMIN"), row("20010101", 10), row("20010102", 9000, q="X"), row("20010103", -9999)]
    (mm,) = observations.daily(put(tmp_path, rows), (2001, 2001))
    assert mm[0] == 1.0
    assert np.isnan(mm[1:]).all()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row("20010101", -1)], "PRCP >= 0; got 20010101, -1"),
        ([row("20010230", 1)], "expected dates YYYYMMDD"),
        ([row("20011301", 1)], "expected dates YYYYMMDD"),
        ([row("20010101", 1), row("20010101", 2)], "has a day twice"),
        (text([row("20010101", 1)], B).encode(), f"should have rows of {A} only"),
        (b"<html>not found</html>", "no GHCN-Daily by_station file"),
        (b"", "no GHCN-Daily by_station file"),
    ],
)
def test_a_file_that_is_not_what_it_should_be(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        observations.daily(put(tmp_path, rows), (2001, 2001))


def test_a_truncated_file(tmp_path):
    path = put(tmp_path, every_day([2001]))
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"no whole gzip file .*delete it and get it again"):
        observations.daily(path, (2001, 2001))


def test_stations_come_in_the_order_asked_for(tmp_path):
    data = {A: every_day([2001, 2002], 1), B: every_day([2001], 2)}
    for station, rows in data.items():
        put(tmp_path, rows, station)
    loaded = load_precipitation([B, A], (2001, 2002), data_dir=tmp_path, progress=False)
    assert loaded.ids == [B, A]
    for i, station in enumerate(loaded.ids):
        mm, n = slow_averages(text(data[station]), (2001, 2002))
        np.testing.assert_allclose(loaded.mm[i].numpy(), mm, rtol=1e-12)
        np.testing.assert_array_equal(loaded.n_years[i].numpy(), n)
    assert loaded.day.tolist() == [float(day) for day in range(1, 366)]
    assert loaded.provenance.source == "real"
    assert loaded.provenance.files == 2
    assert "2 stations" in loaded.provenance.description
    assert "2001 to 2002" in loaded.provenance.description


def test_the_averages_are_kept_until_the_files_or_the_years_change(tmp_path, cache, monkeypatch):
    path = put(tmp_path, every_day([2001, 2002]))
    read = []
    original = observations.daily
    monkeypatch.setattr(observations, "daily", lambda *args: read.append(args) or original(*args))

    def load(years=(2001, 2002)):
        return load_precipitation([A], years, data_dir=tmp_path, progress=False)

    first, second = load(), load()
    assert len(read) == 1
    assert torch.equal(first.mm, second.mm)
    assert torch.equal(first.n_years, second.n_years)
    assert first.provenance == second.provenance
    load((2001, 2001))
    assert len(read) == 2
    os.utime(path, (1, 1))
    load()
    assert len(read) == 3
    put(tmp_path, [row("20010101", 7)])
    assert load().mm[0, 0] == 0.7
    for table in (cache / "tables").glob("*.parquet"):
        table.write_bytes(b"broken")
    assert load().mm[0, 0] == 0.7
    assert len(read) == 5
    assert [path.suffix for path in (cache / "tables").iterdir()] == [".parquet", ".parquet"]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, cache):
    put(tmp_path, every_day([2001]))
    cache.write_text("a file where the folder should be")
    loaded = load_precipitation([A], (2001, 2001), data_dir=tmp_path, progress=False)
    assert not loaded.mm.isnan().any()


def test_missing_days_are_nan_and_split_says_who_has_too_few(tmp_path):
    put(tmp_path, every_day([2001])[10:])
    put(tmp_path, [row("20010105", 3), row("20011230", 4)], B)
    loaded = load_precipitation([A, B], (2001, 2001), data_dir=tmp_path, progress=False)
    assert loaded.mm[0, :10].isnan().all()
    assert (loaded.n_years[0, :10] == 0).all()
    with pytest.raises(ValueError, match=f"not so at {B}"):
        loaded.split()
    split = loaded.select([A]).split()
    seen = split.y_train[0, 10:]
    assert split.y_train[0, :10].isnan().all()
    assert seen.mean().item() == pytest.approx(0, abs=1e-12)
    assert seen.std().item() == pytest.approx(1)


def test_split_is_standardised_by_the_training_days_and_goes_back_to_mm(tmp_path):
    put(tmp_path, every_day([2001], 1))
    put(tmp_path, every_day([2001], 2), B)
    loaded = load_precipitation([A, B], (2001, 2001), data_dir=tmp_path, progress=False)
    split = loaded.split(300)
    assert split.x_train.shape == (300, 1)
    assert split.x_test.shape == (65, 1)
    assert split.y_train.shape == (2, 300)
    assert split.y_test.shape == (2, 65)
    for values in (split.x_train, split.y_train[0], split.y_train[1]):
        assert values.mean().item() == pytest.approx(0, abs=1e-12)
        assert values.std().item() == pytest.approx(1)
    both = torch.cat([split.to_mm(split.y_train), split.to_mm(split.y_test)], 1)
    torch.testing.assert_close(both, loaded.mm, rtol=1e-12, atol=1e-12)
    days = torch.cat([split.x_train, split.x_test])[:, 0] * split.day_scale + split.day_mean
    torch.testing.assert_close(days, loaded.day)
    for wrong in (1, 365):
        with pytest.raises(ValueError, match="2 to 364"):
            loaded.split(wrong)
    with pytest.raises(ValueError, match="among the 2 stations loaded"):
        loaded.select(["USC00119999"])


@pytest.mark.parametrize("years", [(), (2001,), (2002, 2001), (2001, 2002, 2003), (1, 2)])
def test_bad_years(years):
    with pytest.raises(ValueError, match=r"expected years as \(first, last\)"):
        load_precipitation(years=years)


def test_years_and_stations_without_observations(tmp_path):
    put(tmp_path, every_day([2001]))
    put(tmp_path, [row("19500101", 1)], B)
    for station in stations.midwest():
        put(tmp_path, every_day([2001]) if station > "USC0012" else [row("19500101", 1)], station)
    with pytest.raises(ValueError, match=rf"expected precipitation in 2001 to 2001; none at {B}"):
        load_precipitation([A, B], (2001, 2001), data_dir=tmp_path, progress=False)
    midwest = load_precipitation("midwest", (2001, 2001), data_dir=tmp_path, progress=False)
    assert len(midwest.ids) == len(midwest.names) == len(midwest.mm) == 107
    assert "107 stations" in midwest.provenance.description
    assert "33 more have no observation" in midwest.provenance.description
    with pytest.raises(ValueError, match="expected precipitation in 1960 to 1970"):
        load_precipitation("midwest", (1960, 1970), data_dir=tmp_path, progress=False)


def test_bad_source_and_stations():
    with pytest.raises(ValueError, match='"auto", "real" or "embedded"; got \'fake\''):
        load_precipitation(source="fake")
    with pytest.raises(ValueError, match="or ids like"):
        load_precipitation(["nowhere"])
    with pytest.raises(ValueError, match="no stations to choose"):
        load_precipitation([A], source="embedded")


def test_a_data_dir_without_files(tmp_path):
    with pytest.raises(DataNotFoundError, match=r"140 of 140 files .*only it is looked in"):
        load_precipitation(data_dir=tmp_path)


@pytest.mark.parametrize("source", ["auto", "embedded"])
def test_the_embedded_data_is_seattles(source):
    loaded = load_precipitation(source=source)
    assert isinstance(loaded, Precipitation)
    assert loaded.ids == ["SEATTLE-2012", "SEATTLE-2013", "SEATTLE-2014", "SEATTLE-2015"]
    assert loaded.mm.shape == (4, 365)
    assert (loaded.n_years == 1).all()
    assert not loaded.mm.isnan().any()
    assert loaded.provenance.is_stand_in
    assert loaded.provenance.source == "embedded"
    assert ("NTKBOOK_OFFLINE" in loaded.provenance.description) == (source == "auto")
    with open(observations.embedded_file(), newline="") as file:
        rows = [(one["date"], float(one["precipitation"])) for one in csv.DictReader(file)]
    assert loaded.mm.flatten().tolist() == [value for date, value in rows if date[5:] != "02/29"]
    loaded.split()


def test_a_changed_embedded_file_is_not_taken(tmp_path):
    other = tmp_path / "seattle-weather.csv"
    other.write_bytes(observations.embedded_file().read_bytes() + b"\n")
    with pytest.raises(ValueError, match=r"should have sha256 .*vega_datasets==0\.9\.0"):
        observations.seattle(other, REGISTRY["seattle"].known_hash(other.name))


def test_real_refuses_the_stand_in_and_so_does_an_explicit_wish():
    with pytest.raises(DataNotFoundError, match=r"by_station/USC00110072\.csv\.gz"):
        load_precipitation(source="real")
    with pytest.raises(DataNotFoundError):
        load_precipitation(["USC00116579"])


def test_data_that_is_partly_there_is_no_reason_for_the_stand_in(cache):
    put(cache, every_day([2001]), "USC00116579")
    with pytest.raises(DataNotFoundError, match="139 of 140"):
        load_precipitation()


def test_downloaded_where_it_is_not_here(cache, monkeypatch):
    monkeypatch.delenv("NTKBOOK_OFFLINE")
    with serve({f"/{A}.csv.gz": gzip.compress(text(every_day([2001])).encode())}) as server:
        entry = dataclasses.replace(REGISTRY["precipitation"], url=server.url + "/{file}")
        monkeypatch.setitem(REGISTRY, "precipitation", entry)
        loaded = load_precipitation([A], (2001, 2001), progress=False)
        assert loaded.mm.shape == (1, 365)
        with pytest.raises(DownloadError, match=rf"(?s)1 of 1 files.*{B}\.csv\.gz: HTTP status 404"):
            load_precipitation([A, B], (2001, 2001), progress=False)
    gone = load_precipitation("midwest", progress=False)  # the server is away, and none of these files is here
    assert "the download failed" in gone.provenance.description
    with pytest.raises(DownloadError, match="can't be reached"):
        load_precipitation("midwest", source="real", progress=False)


@needs_data
def test_the_mirror_loads_fast_and_as_the_slow_version_says():
    start = time.perf_counter()
    loaded = load_precipitation(source="real", data_dir=MIRROR, progress=False)
    middle = time.perf_counter()
    again = load_precipitation(source="real", data_dir=MIRROR, progress=False)
    end = time.perf_counter()
    assert middle - start < 10
    assert end - middle < 2
    assert torch.equal(loaded.mm, again.mm)
    assert loaded.mm.shape == (140, 365)
    assert not loaded.mm.isnan().any()
    for station in ("USC00116579", "USC00339312"):
        content = gzip.decompress((Path(MIRROR) / "ghcnd" / "by_station" / f"{station}.csv.gz").read_bytes()).decode()
        mm, n_years = slow_averages(content, (1985, 2014))
        i = loaded.ids.index(station)
        np.testing.assert_allclose(loaded.mm[i].numpy(), mm, rtol=1e-12)
        np.testing.assert_array_equal(loaded.n_years[i].numpy(), n_years)
    split = loaded.split()
    assert split.y_train.isfinite().all()
    assert split.y_test.isfinite().all()


def test_few_are_eight_of_the_midwest_with_the_target():
    few, midwest = stations.resolve("few"), stations.resolve("midwest")
    assert len(few) == 8
    assert few.items() <= midwest.items()
    assert few["USC00116579"] == "Pana, IL"


def test_few_fall_back_to_the_stand_in_as_the_others_do(monkeypatch, tmp_path):
    monkeypatch.setenv("NTKBOOK_OFFLINE", "1")
    monkeypatch.setenv("NTKBOOK_DATA", str(tmp_path))
    monkeypatch.setattr("ntkbook.experiments.data.sources.cache_dir", lambda: tmp_path / "cache")
    assert load_precipitation("few", progress=False).provenance.is_stand_in
