"""The order in which data is looked for, and what is said about it."""

import dataclasses
import gzip
import hashlib
import os
import re
import subprocess

import pytest
from data_server import serve

from ntkbook.experiments.data import sources, stations
from ntkbook.experiments.data.registry import REGISTRY
from ntkbook.experiments.data.sources import DataNotFoundError, Provenance

PANA = "USC00116579.csv.gz"
PRECIPITATION = REGISTRY["precipitation"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, no data folder, no network."""
    monkeypatch.setattr(sources, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.delenv("NTKBOOK_DATA", raising=False)
    monkeypatch.setenv("NTKBOOK_OFFLINE", "1")
    return tmp_path / "cache"


def put(root, name=PANA, content=b"x", folder="ghcnd/by_station"):
    path = root / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_the_registry_is_complete():
    for name, entry in REGISTRY.items():
        assert entry.name == name
        assert entry.title
        assert entry.licence
        assert entry.citation
        assert all(re.fullmatch(r"[0-9a-f]{64}|md5:[0-9a-f]{32}", known) for _, known in entry.hashes)


def test_the_data_folder_comes_before_the_cache(cache, tmp_path, monkeypatch):
    cached = put(cache)
    assert sources.obtain(PRECIPITATION, [PANA]) == {PANA: cached}
    monkeypatch.setenv("NTKBOOK_DATA", str(tmp_path / "data"))
    mine = put(tmp_path / "data")
    assert sources.obtain(PRECIPITATION, [PANA]) == {PANA: mine}


def test_data_dir_is_the_only_place_where_given(cache, tmp_path):
    put(cache)
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataNotFoundError, match="only it is looked in"):
        sources.obtain(PRECIPITATION, [PANA], tmp_path / "mine")
    mine = put(tmp_path / "mine")
    assert sources.obtain(PRECIPITATION, [PANA], tmp_path / "mine") == {PANA: mine}


@pytest.mark.parametrize("how", ["data_dir", "NTKBOOK_DATA"])
def test_a_folder_that_is_none(how, monkeypatch):
    monkeypatch.setenv("NTKBOOK_DATA", "/nowhere" if how == "NTKBOOK_DATA" else "")
    with pytest.raises(DataNotFoundError, match=f"{how} must be an existing folder; /nowhere"):
        sources.locate(PRECIPITATION, [PANA], "/nowhere" if how == "data_dir" else "")


def test_offline_nothing_is_downloaded_and_the_error_says_what_to_do(cache, monkeypatch):
    with serve({f"/{PANA}": b"x"}) as server:
        entry = dataclasses.replace(PRECIPITATION, url=server.url + "/{file}", hashes=((PANA, "ab" * 32),))
        with pytest.raises(DataNotFoundError) as error:
            sources.obtain(entry, [PANA, "b", "c", "d"])
        assert server.requests == []
    message = str(error.value)
    assert message.startswith("precipitation: 4 of 4 files")
    for part in (f"{server.url}/{PANA}", "ab" * 32, str(cache / "ghcnd/by_station"), "NTKBOOK_OFFLINE", "NTKBOOK_DATA"):
        assert part in message


def test_only_what_is_missing_is_downloaded_and_into_the_cache(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("NTKBOOK_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("NTKBOOK_OFFLINE", "0")
    mine = put(tmp_path / "data")
    content = gzip.compress(b"y")
    with serve({"/b.csv.gz": content}) as server:
        entry = dataclasses.replace(PRECIPITATION, url=server.url + "/{file}")
        found = sources.obtain(entry, [PANA, "b.csv.gz"], progress=False)
        assert [path for path, _ in server.requests] == ["/b.csv.gz"]
    assert found == {PANA: mine, "b.csv.gz": cache / "ghcnd/by_station/b.csv.gz"}
    assert list((tmp_path / "data").rglob("*.csv.gz")) == [mine]


def test_fetch_gets_the_stations_asked_for(cache, monkeypatch):
    monkeypatch.setenv("NTKBOOK_OFFLINE", "0")
    with serve({f"/{PANA}": gzip.compress(b"y")}) as server:
        entry = dataclasses.replace(PRECIPITATION, url=server.url + "/{file}")
        monkeypatch.setitem(REGISTRY, "precipitation", entry)
        assert sources.fetch("precipitation", ["USC00116579"], progress=False) == [cache / "ghcnd/by_station" / PANA]
    assert sources.fetch("sinusoids") == []
    assert sources.fetch("seattle") == []


def test_what_a_fetch_needs_is_known_before(cache):
    put(cache)
    need = sources.need("precipitation", [PANA[:11], "USW00094728"])
    assert (need.missing, need.wanted, need.bytes_to_download, need.bytes_on_disk) == (1, 2, 600_000, 600_000)
    assert need.bytes_free > 0
    assert need.folder == str(cache / "ghcnd" / "by_station")
    packed = sources.need("cifar10")
    assert (packed.missing, packed.bytes_to_download) == (6, 170_052_171)
    assert packed.bytes_on_disk > 170_052_171 + 6 * 30_730_000  # the archive, and the files that come out of it
    assert sources.need("sinusoids").missing == 0
    assert not (cache / "cifar-10-batches-bin").exists()


def test_fetch_of_something_unknown():
    with pytest.raises(ValueError, match=r"expected one of the data sets sinusoids, .*; got 'rain'"):
        sources.fetch("rain")


def test_status_names_the_place_and_the_sizes(cache, tmp_path, monkeypatch):
    def now():
        return {status.name: status for status in sources.status()}

    assert set(now()) == set(REGISTRY)
    assert now()["sinusoids"].where == "made here"
    assert now()["seattle"].where == "embedded"
    assert now()["precipitation"].where == "embedded"
    monkeypatch.delenv("NTKBOOK_OFFLINE")
    assert now()["precipitation"].where == "download"
    assert now()["precipitation"].bytes_to_download == 140 * PRECIPITATION.size
    monkeypatch.setenv("NTKBOOK_OFFLINE", "1")
    for station in stations.midwest():
        put(cache, f"{station}.csv.gz", b"abc")
    assert now()["precipitation"].where == "cache"
    assert now()["precipitation"].bytes_on_disk == 420
    assert now()["precipitation"].folder == str(cache / "ghcnd" / "by_station")
    assert now()["precipitation"].bytes_to_download == 0
    monkeypatch.setenv("NTKBOOK_DATA", str(tmp_path / "data"))
    put(tmp_path / "data")
    assert now()["precipitation"].where == "NTKBOOK_DATA and cache"
    for station in stations.midwest():
        put(tmp_path / "data", f"{station}.csv.gz", b"abc")
    assert now()["precipitation"].where == "NTKBOOK_DATA"


def test_digest_is_that_of_sha256sum(tmp_path):
    paths = [put(tmp_path, name, name.encode(), "") for name in ("b", "a", "c")]
    lines = "".join(f"{hashlib.sha256(name.encode()).hexdigest()}  {name}\n" for name in "abc")
    assert sources.digest(paths) == hashlib.sha256(lines.encode()).hexdigest()
    if os.name == "posix":
        result = subprocess.run("sha256sum * | sha256sum", shell=True, cwd=tmp_path, capture_output=True, text=True)
        if result.returncode == 0:
            assert sources.digest(paths) == result.stdout.split()[0]


def test_the_banner_says_which_data_and_stand_ins_say_so():
    real = Provenance(
        "rain", "real", "rain at 2 stations", 2, "0123456789abcdef", "public domain", "me", "https://x.org"
    )
    assert real.banner() == (
        "**Data (real):** rain at 2 stations. 2 files, sha256 `0123456789ab…`. Licence: public domain. [Source](https://x.org)."
    )
    assert not real.is_stand_in
    for source in ("embedded", "made-up"):
        other = dataclasses.replace(real, source=source)
        assert other.is_stand_in
        assert "no claim is evaluated" in other.banner()
        assert "\n" not in other.banner()


def test_the_midwest_stations():
    found = stations.midwest()
    assert len(found) == 140
    assert found["USC00116579"] == "Pana, IL"
    assert {name[-2:] for name in found.values()} == {"IL", "IN", "IA", "NE", "OH"}


LINES = """\
USC00116579  39.3686  -89.0867  213.4 IL PANA                               HCN
USC00116580  39.3686  -89.0867  213.4 IL SOMEWHERE ELSE
USW00094728  40.7789  -73.9692   42.7 NY NEW YORK CNTRL PRK TWR             HCN 72506
USW00012345  40.7789  -73.9692   42.7 NY SOMEWHERE                          CRN
"""


def test_all_stations_of_the_network_are_those_that_noaa_flags(cache):
    put(cache, "ghcnd-stations.txt", LINES.encode(), "ghcnd")
    assert stations.resolve("all") == {"USC00116579": "Pana, IL", "USW00094728": "New York Cntrl Prk Twr, NY"}
    put(cache, "ghcnd-stations.txt", b"<html>", "ghcnd")
    with pytest.raises(ValueError, match="expected NOAA's list"):
        stations.resolve("all")


def test_all_stations_need_the_list():
    with pytest.raises(DataNotFoundError, match=r"daily/ghcnd-stations\.txt"):
        stations.resolve("all")


@pytest.mark.parametrize("wrong", [[], "", "pana", ["USC00116579", "x"], [""], ["../../../etc"]])
def test_what_is_no_station(wrong):
    with pytest.raises(ValueError, match="or ids like"):
        stations.resolve(wrong)


def test_a_station_twice():
    with pytest.raises(ValueError, match="each station once"):
        stations.resolve(["USC00116579", "USC00116579"])


def test_one_station_or_several():
    assert stations.resolve("USC00116579") == {"USC00116579": "Pana, IL"}
    assert stations.resolve(["USW00094728", "USC00116579"]) == {"USW00094728": "USW00094728", "USC00116579": "Pana, IL"}
