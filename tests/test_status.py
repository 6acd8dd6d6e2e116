"""What came out and how it was run: the line under a chapter's title, and the page of run cards."""

import json
import re
import shutil
from pathlib import Path

import pytest
from bs4 import BeautifulSoup

from ntkbook.publish import runner, site, status

ROOT = Path(__file__).parents[1]
REPOSITORY = "https://github.com/a/b"
CARD = {
    "chapter": "01_toy", "status": "done", "error": "", "profile": "cpu", "parameters": {}, "device": "CPU, 2 cores",
    "versions": {"python": "3.11.7", "linear_operator": "0.6.1"}, "commit": "0123456789abcdef+changes",
    "data": {
        "maps": {
            "name": "maps", "source": "embedded", "description": "Maps of is_ng.", "files": 3, "sha256": "f" * 64,
            "licence": "CC BY 3.0", "citation": "A (2015). Maps. doi:10.1/ab-c", "url": "https://example.org/maps",
        }
    },
    "finished": "2026-11-20T12:34+00:00", "wall_seconds": 1356.2, "peak_mib": 2828,
}  # fmt: skip


@pytest.fixture
def copied(toybook, tmp_path):
    return Path(shutil.copytree(toybook, tmp_path / "toy"))


def write_card(root, chapter="01_toy", **changes):
    path = root / "book" / "results" / f"{chapter}.card.json"
    path.write_text(json.dumps({**CARD, "chapter": chapter, **changes}), "utf8")


def section(root, chapter="01_toy"):
    """A chapter's part of the page."""
    (text,) = re.findall(rf"\(run-{chapter.replace('_', '-')}\)=\n(.*?)(?=\n\(run-|\Z)", page(root), re.DOTALL)
    return text


def page(root):
    return status.cards_page(root, REPOSITORY)


def test_how_a_chapter_was_run():
    assert status.how_run(CARD) == "run on 2026-11-20, CPU, 2 cores, 23 min"
    assert status.how_run({**CARD, "finished": None, "wall_seconds": 7.4}) == "run CPU, 2 cores, 7 s"
    assert status.how_run({**CARD, "status": "failed"}) == "the last run failed, this is an earlier one"
    assert "was interrupted" in status.how_run({**CARD, "status": "interrupted"})
    assert status.how_run(None) == "no run card says how this was run"


def test_a_new_card_tells_when(toybook):
    card = status.read_card(toybook, "01_toy")
    assert card
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d\+00:00", card["finished"])


def test_an_old_card_is_as_old_as_its_commit(copied, monkeypatch):
    path = copied / "book" / "results" / "01_toy.card.json"
    path.write_text(json.dumps({key: value for key, value in CARD.items() if key != "finished"}), "utf8")
    asked = []
    monkeypatch.setattr("ntkbook.publish.pages.last_change", lambda *of: asked.append(of) or "2024-03-01")
    card = status.read_card(copied, "01_toy")
    assert card
    assert (card["finished"], asked) == ("2024-03-01", [(copied, [path])])


def test_a_changed_verdict_changes_the_line(copied):
    notebook = copied / "book" / "01_toy.ipynb"
    assert status.outcome(notebook) == "1 of 1 claims are reproduced"
    assert status.outcome(copied / "book" / "07_scorecard.ipynb") == ""
    quick = copied / "runs" / "01_toy" / "quick" / "notebook.ipynb"
    assert status.outcome(quick) == "1 claims, not evaluated in the quick profile"
    text = notebook.read_text("utf8")
    notebook.write_text(text.replace('\\"verdict\\": \\"reproduced', '\\"verdict\\": \\"partly'), "utf8")
    assert status.outcome(notebook) == "0 of 1 claims are reproduced, 1 partly"


def test_a_card_is_told_in_full(copied):
    write_card(copied)
    text = section(copied)
    assert text.startswith(
        "## A toy chapter\n\nDone. 1 of 1 claims are reproduced. [Read the chapter](01_toy.ipynb).\n"
    )
    for told in (
        "Finished\n: 2026-11-20 12:34 UTC\n", "Device\n: CPU, 2 cores\n", "23 min, 2.8 GiB of memory at most",
        "profile cpu: the defaults", "python 3.11.7, linear\\_operator 0.6.1",
        f"[`0123456789`]({REPOSITORY}/commit/0123456789abcdef), with changes not committed",
        "**maps** (a stand-in): Maps of is\\_ng. 3 files, sha256 `ffffffffffff…`. Licence: CC BY 3.0.",
        "[doi:10.1/ab-c](https://doi.org/10.1/ab-c). [Source](https://example.org/maps).",
    ):  # fmt: skip
        assert told in text
    write_card(copied, finished="2026-11-20")
    assert "Finished\n: by 2026-11-20, when it was stored\n" in section(copied)
    write_card(copied, parameters={"profile": "gpu", "size": 5, "source": "real"}, profile="gpu", commit=None, data={})
    text = section(copied)
    assert "profile gpu: `size = 5`, `source = 'real'`" in text
    assert "not in a git checkout" in text
    assert "Data\n: none of its own" in text


def test_failed_and_missing_cards_are_told_plainly(copied):
    write_card(copied, status="failed", error="cell 3\nRuntimeError: no *room*")
    text = section(copied)
    assert "**The last run failed.** The chapter shows an earlier one." in text
    assert "Error\n: RuntimeError: no \\*room\\*" in text
    write_card(copied, "09_gone", status="failed", error="x")
    text = section(copied, "09_gone")
    assert text.startswith("## 09_gone, which is not in the book\n\n**The last run failed.**")
    assert "earlier" not in text
    (copied / "book" / "results" / "01_toy.card.json").unlink()
    assert "**No run card** says how this chapter was run. 1 of 1 claims" in section(copied)


def soup(path):
    return BeautifulSoup(path.read_text("utf8"), "html.parser")


def test_the_built_pages_say_it_and_their_links_lead_somewhere(copied):
    write_card(copied, error="")
    out = site.build(copied).parent / "book"
    (line,) = soup(out / "01_toy.html").select("p.outcome")
    assert line.get_text() == "1 of 1 claims are reproduced (scorecard) · run on 2026-11-20, CPU, 2 cores, 23 min"
    assert line.find_previous_sibling().name == "h1"
    assert check_links(out / "01_toy.html", line) == 3
    assert line.a["href"] == "#claim-toy-mean"
    for page in ("07_scorecard", "index"):  # what sums up others was not measured
        assert not soup(out / f"{page}.html").select("p.outcome")
    claimed = soup(out / "07_scorecard.html").select_one("table.claims")
    assert check_links(out / "07_scorecard.html", claimed) > 0
    text = soup(out / "status.html").get_text()
    assert "0123456789, with changes not committed" in text
    assert soup(out / "01_toy.html").select_one('meta[name="description"]')["content"].startswith("The mean is")
    assert soup(out / "index.html").select_one("li:has(.verdict-reproduced)").get_text().endswith("1 reproduced.")


def check_links(path, part):
    """How many links a part of a built page has; each must lead to a file, and to a part of it that is there."""
    links = part.select("a[href]")
    for link in links:
        name, _, anchor = link["href"].partition("#")
        target = path.parent / name if name else path
        assert target.is_file(), link
        assert not anchor or soup(target).find(id=anchor), link
    return len(links)


def test_a_staged_book_has_the_cards_of_its_runs(copied):
    results = runner.run(copied, profile="quick", progress=False)
    staged = site.stage(copied, results)
    assert "profile quick: `size = 5`" in section(staged)
    assert "1 claims, not evaluated in the quick profile" in section(staged)
