"""What the command line lists of chapters, parameters and claims."""

import json
import re

import pytest

from ntkbook.publish import listing, scorecard
from ntkbook.publish.verdicts import Claim

TOY = (Claim("toy-mean", "01_toy", "Section 0", "The mean is large.", "mean", ">", -1.0),)
NOWHERE = Claim("nowhere", "01_toy", "Section 0", "Nobody looked.", "x", "<", 0.0, "no more than 3")


def test_chapters_with_titles_and_profiles(toybook):
    lines = listing.chapters_text(toybook).splitlines()
    assert [re.split(r"\s{2,}", line) for line in lines] == [
        ["chapter", "title", "profiles"],
        ["01_toy", "A toy chapter", "cpu, quick"],
        ["07_scorecard", "Scorecard", "cpu"],
    ]
    assert len({line.find(cell) for line, cell in zip(lines, ("profiles", "cpu", "cpu"))}) == 1


def test_parameters_with_type_default_comment_and_profiles(toybook):
    lines = listing.parameters_text(toybook, "1").splitlines()
    assert lines[0] == "01_toy: A toy chapter"
    assert lines[lines.index("size: int = 50") :][:3] == ["size: int = 50", "    draws", "    quick: 5"]
    assert lines[lines.index("sizes: list[int] = [1, 2]") :][:2] == ["sizes: list[int] = [1, 2]", "    not used"]
    with pytest.raises(ValueError, match="no chapter '2'"):
        listing.parameters_text(toybook, "2")


def test_claims_as_data(toybook, monkeypatch):
    monkeypatch.setattr("ntkbook.publish.claims.CLAIMS", (*TOY, NOWHERE))
    found = json.loads(json.dumps(listing.claims_data(toybook, scorecard.gather(toybook / "book"))))
    assert found["summary"] == "1 of 2 claims are reproduced"
    toy, nowhere = found["claims"]
    assert toy.keys() == nowhere.keys()
    stored = scorecard.gather(toybook / "book", TOY)[0][1]
    assert stored is not None
    assert [toy[key] for key in ("place", "criterion", "value", "low", "high", "verdict")] == [
        "Section 0", "> -1", stored.value, stored.low, stored.high, "reproduced",
    ]  # fmt: skip
    card = json.loads((toybook / "book" / "results" / "01_toy.card.json").read_text("utf8"))
    assert toy["hardware"] == card["device"]
    assert toy["data"] == "Draws of a normal distribution."
    assert toy["link"] == "01_toy.html"  # the toy chapter has no sections
    assert toy["cell"] == 7
    assert [nowhere[key] for key in ("value", "hardware", "cell", "verdict", "paper_value")] == [
        None, None, None, "not evaluated", "no more than 3",
    ]  # fmt: skip


def test_a_claim_links_to_the_section_that_measures_it(toybook, tmp_path):
    nb = json.loads((toybook / "book" / "01_toy.ipynb").read_text("utf8"))
    text = {"cell_type": "markdown", "metadata": {}, "source": ["## Wholly other\n", "\n", "## What came, & why\n"]}
    nb["cells"].insert(-2, text)
    notebook = tmp_path / "01_toy.ipynb"
    notebook.write_text(json.dumps(nb), "utf8")
    assert listing.measured_in(notebook, "toy-mean") == ("#what-came-why", 7)
    assert listing.measured_in(tmp_path / "none.ipynb", "toy-mean") == ("", None)
