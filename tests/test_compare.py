"""What two runs of a chapter differ in."""

import json
import shutil
from pathlib import Path

import pytest

from ntkbook.publish import compare


@pytest.fixture
def copied(toybook, tmp_path):
    """The toy book, with a run `other` that differs from `quick` in known ways."""
    root = Path(shutil.copytree(toybook, tmp_path / "book"))
    runs = root / "runs" / "01_toy"
    shutil.copytree(runs / "quick", runs / "other")
    change(runs / "other" / "card.json", wall_seconds=99.5, commit="f" * 40 + "+changes")
    change(runs / "other" / "card.json", parameters={"profile": "quick", "seed": 4})
    change(runs / "other" / "claims.json", **{"toy-mean": claim(runs) | {"high": 7.0, "verdict": "partly"}})
    return root


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text("utf8")) | values), "utf8")


def claim(runs):
    return json.loads((runs / "quick" / "claims.json").read_text("utf8"))["toy-mean"]


def test_only_what_differs(copied):
    one = compare.find(copied, "1/quick")
    two = compare.find(copied, "other", one.card["chapter"])
    found = compare.compare(one, two)
    before = claim(copied / "runs" / "01_toy")
    assert found["parameters"] == {"seed": [0, 4], "size": [5, 50]}  # defaults: seed of the first, size of the second
    assert found["run"] == {"commit": [one.card["commit"], "f" * 40 + "+changes"]}
    assert found["versions"] == found["data"] == {}
    ((first, second),) = found["claims"].values()
    assert (first["high"], second["high"]) == (before["high"], 7.0)
    assert (first["verdict"], second["verdict"]) == ("not evaluated", "partly")
    assert found["times"]["wall_seconds"] == [one.card["wall_seconds"], 99.5]
    text = compare.as_text(one, two)
    assert "parameters seed" in text
    assert "ffffffffffff+changes" in text
    assert "f" * 13 not in text
    assert text.endswith("0 of 1 claims are the same")


def test_a_run_and_itself(copied):
    one = compare.find(copied, str(copied / "runs" / "01_toy" / "quick"))
    found = compare.compare(one, one)
    assert not any(found[key] for key in ("run", "parameters", "versions", "data", "claims"))
    assert compare.as_text(one, one).endswith("1 of 1 claims are the same")


def test_digits_that_are_not_shown(copied):
    runs = copied / "runs" / "01_toy"
    change(runs / "other" / "claims.json", **{"toy-mean": claim(runs) | {"value": claim(runs)["value"] + 1e-12}})
    one, two = compare.find(copied, "1/quick"), compare.find(copied, "1/other")
    assert compare.as_text(one, two).endswith("1 of 1 claims are the same, 1 of them but for digits that are not shown"
                                              " (--json has them)")  # fmt: skip


def test_the_stored_run(copied):
    found = compare.compare(compare.find(copied, "01_toy/stored"), compare.find(copied, "1/quick"))
    assert found["parameters"] == {"profile": ["cpu", "quick"], "size": [50, 5]}
    assert found["claims"]["toy-mean"][0]["verdict"] == "reproduced"


def test_data_and_versions(copied):
    card = copied / "runs" / "01_toy" / "other" / "card.json"
    change(card, versions={"torch": "0"}, data={"draws": {"sha256": "abc", "description": ""}})
    found = compare.compare(compare.find(copied, "1/quick"), compare.find(copied, "1/other"))
    assert found["versions"]["torch"][1] == "0"
    assert found["versions"]["python"][1] is None
    assert found["data"]["draws"] == ["Draws of a normal distribution.", "abc"]


def test_mistakes_are_told(copied):
    runs = "01_toy/cpu.* 01_toy/other.* 01_toy/quick.* 01_toy/stored"  # and those that other tests made
    with pytest.raises(FileNotFoundError, match=f"no run '1/fast'; there are {runs}, and any folder"):
        compare.find(copied, "1/fast")
    with pytest.raises(FileNotFoundError, match="no run '1'"):
        compare.find(copied, "1")
    (copied / "book" / "01_toy.ipynb").unlink()
    with pytest.raises(FileNotFoundError, match=r"01_toy is not stored: .*; run `ntkbook store 01_toy`"):
        compare.find(copied, "1/stored")
    with pytest.raises(ValueError, match="no chapter '3'"):
        compare.find(copied, "3/quick")
    with pytest.raises(ValueError, match="two runs of one chapter, got 01_toy and 07_scorecard"):
        compare.compare(compare.find(copied, "1/quick"), compare.find(copied, "7/quick"))
