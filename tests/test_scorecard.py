"""The scorecard: one list of claims, shown as a page, in a terminal and as data; and the sorting of its table."""

import html
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from chromium import CHROMIUM, dumped

from ntkbook.publish import claims, rendering, scorecard
from ntkbook.publish.verdicts import Claim, make_record

TOY = Claim("toy-mean", "01_toy", "Section 0", "The mean is large.", "mean", ">", -1.0)
NOWHERE = Claim("nowhere", "01_toy", "Figure 1 & 2", "Nobody <looked>.", "x|y", "<", 0.0, "no more than 3")
SORTABLE_JS = Path(__file__).parents[1] / "book" / "_static" / "sortable.js"


@pytest.fixture(scope="module")
def found(toybook):
    return scorecard.entries(toybook, claims=(TOY, NOWHERE))


def test_entries_are_json_and_say_where_a_value_comes_from(found, toybook):
    toy, nowhere = json.loads(json.dumps(found))
    assert toy.keys() == nowhere.keys()
    stored = claims.collect(toybook / "book" / "01_toy.ipynb")["toy-mean"]
    assert [toy[key] for key in ("place", "criterion", "value", "low", "high", "text", "verdict")] == [
        "Section 0", "> −1", stored.value, stored.low, stored.high, stored.text, "reproduced",
    ]  # fmt: skip
    card = json.loads((toybook / "book" / "results" / "01_toy.card.json").read_text("utf8"))
    assert toy["hardware"] == card["device"]
    assert toy["data"] == "Draws of a normal distribution."
    assert (toy["link"], toy["cell"]) == ("01_toy.html#claim-toy-mean", 7)
    assert nowhere["link"] == "01_toy.html"  # there is no row to lead to
    assert [nowhere[key] for key in ("value", "text", "hardware", "cell", "verdict", "paper_value")] == [
        None, "not measured", None, None, "not evaluated", "no more than 3",
    ]  # fmt: skip


def test_a_runs_verdicts_are_by_the_present_criterion_and_say_how_it_ended(toybook, tmp_path):
    root = Path(shutil.copytree(toybook, tmp_path / "book"))
    stricter = replace(TOY, threshold=5.0)
    (toy,) = scorecard.entries(root, "cpu", (stricter,))
    assert (toy["criterion"], toy["verdict"], toy["run"]) == ("> 5", "not reproduced", "done")
    card = root / "runs" / "01_toy" / "cpu" / "card.json"
    card.write_text(json.dumps(json.loads(card.read_text("utf8")) | {"status": "failed"}), "utf8")
    found = scorecard.entries(root, "cpu", (TOY, NOWHERE))
    assert [entry["run"] for entry in found] == ["failed", "failed"]
    for text in (scorecard.as_text(found), scorecard.as_markdown(found)):
        assert text.count("] (the run: failed)") == text.count("not measured (the run: failed)") == 1
    with pytest.raises(ValueError, match=r"no run with profile 'gpu'; runs/ has cpu,.* quick"):
        scorecard.entries(root, "gpu", (TOY,))


def test_one_line_for_all_verdicts():
    verdicts = ["not reproduced", "reproduced", "partly", "not evaluated", "not reproduced"]
    assert scorecard.summary(verdicts) == "1 of 5 claims are reproduced, 1 partly, 2 not, 1 not evaluated"
    assert scorecard.summary(["reproduced"] * 2) == "2 of 2 claims are reproduced"


def test_page_and_terminal_show_the_same_data(found):
    rows = BeautifulSoup(rendering.as_html(found), "html.parser").select("tbody tr")
    blocks = scorecard.as_text(found).split("\n")
    assert blocks[-1] == "1 of 2 claims are reproduced, 1 not evaluated."
    assert len(rows) == len(found)
    shown = ("sentence", "place", "quantity", "criterion", "text", "paper_value", "data", "hardware", "link", "verdict")
    for i, (entry, row) in enumerate(zip(found, rows)):
        text = "\n".join(blocks[3 * i : 3 * i + 3])
        for value in filter(None, (entry[key] for key in shown)):
            assert value in text
            assert value in (row.a["href"] if value == entry["link"] else row.get_text())
    first, *_, last, _, end = scorecard.as_markdown(found).splitlines()
    assert (first, end) == ("**1 of 2 claims are reproduced, 1 not evaluated.**", "</details>")
    assert last == "| Nobody <looked>. (Figure 1 & 2) | no more than 3 | x\\|y: not measured | not evaluated |"


def test_a_quick_runs_values_stand_beside_the_stored_verdicts(found, toybook):
    quick = scorecard.gather_runs(toybook / "runs", "quick", (TOY,))
    text = scorecard.as_text(found, quick)
    assert text.count(quick["toy-mean"].text) == 1
    assert "this quick run, no verdict" in text
    assert "this quick run" in (toybook / "runs" / "07_scorecard" / "quick" / "notebook.ipynb").read_text("utf8")


def test_the_stored_scorecard_is_that_of_the_stored_chapter(toybook):
    own = (Claim("toy-mean", "01_toy", "nowhere", "The mean is large.", "mean", ">", -1.0),)
    found = scorecard.entries(toybook, claims=own)
    assert found[0]["hardware"]
    page = (toybook / "book" / "07_scorecard.ipynb").read_text("utf8")
    assert json.dumps(rendering.as_html(found), ensure_ascii=False)[1:-1] in page
    glued = claims.glued(toybook / "book" / "07_scorecard.ipynb")
    assert glued["scorecard-summary"]["text/plain"] == "'1 of 1 claims are reproduced'"
    assert glued["scorecard-01_toy"]["text/html"].endswith(f"1 {rendering.badge('reproduced')}")
    assert "A toy chapter" in glued["scorecard-overview"]["text/html"]
    assert [glued[f"scorecard-{key}"]["text/plain"] for key in ("inconclusive", "implied")] == ["'0'", "'0'"]


SORTING = """
const out = {}, heads = [...document.querySelectorAll("th")];
const order = () => [...document.querySelectorAll("tbody tr")].map((row) => row.id).join("");
const press = (name) => heads.find((head) => head.textContent === name).querySelector("button").click();
const states = () => heads.filter((head) => head.ariaSort).map((head) => `${head.textContent} ${head.ariaSort}`).join();
out.start = order();
for (const name of ["verdict", "place", "chapter", "claim"]) { press(name); out[name] = order(); }
press("claim"); out.again = order(); out.state = states();
const select = document.querySelector("label select");
out.choices = [...select.options].map((option) => option.text);
const choose = (text) => {
  select.value = [...select.options].find((option) => option.text === text).value;
  select.dispatchEvent(new Event("change"));
};
choose("verdict"); out.chosen = order(); out.now = states();
choose(select.options[0].text); out.back = order(); out.none = states();
out.buttons = document.querySelectorAll("th button").length;
"""


@pytest.mark.skipif(CHROMIUM is None, reason="a browser sorts the table: no Chromium installed")
def test_a_reader_sorts_the_table(tmp_path):
    """Five claims, a to e, whose order differs by every column."""
    facts = [  # sentence, place, chapter, value: below 0 is reproduced, an interval of half a unit either way
        ("zebra", "Section 10", "02_x", 1.0),
        ("Yak", "Section 2", "10_x", -1.0),
        ("ant", "the talk", "02_x", -0.1),
        ("bee", "Appendix A", "01_x", None),
        ("cat", "Section 2", "01_x", -2.0),
    ]
    data = type("Data", (), {"name": "x", "description": "x", "is_stand_in": False})
    found = []
    for sentence, place, chapter, value in facts:
        claim = Claim(sentence, chapter, place, sentence, "x", "<", 0.0)
        low, high = (None, None) if value is None else (value - 0.5, value + 0.5)
        verdict = make_record(claim, value, low, high, data, "cpu", 3).verdict
        (entry,) = scorecard.entries(tmp_path, claims=(claim,))
        found.append({**entry, "verdict": verdict})
    table = rendering.as_html(found)
    for name in "abcde":
        table = table.replace("<tr><td", f'<tr id="{name}"><td', 1)
    (tmp_path / "sortable.js").write_text(SORTABLE_JS.read_text("utf8"), "utf8")
    page = f'<!doctype html><meta charset="utf-8"><script src="sortable.js"></script>{table}<pre id="out"></pre>'
    end = 'document.getElementById("out").textContent = JSON.stringify(out);'
    script = f'<script>window.addEventListener("load", () => {{{SORTING}{end}}});</script>'
    (tmp_path / "page.html").write_text(page + script, "utf8")
    html_now = dumped(tmp_path / "page.html")
    told = re.search(r'<pre id="out">(.+?)</pre>', html_now, re.DOTALL)
    assert told, html_now[-2000:]
    assert json.loads(html.unescape(told[1])) == {
        "start": "abcde",
        "verdict": "becad",  # reproduced (b, e), partly, not reproduced, not evaluated
        "place": "dbeac",  # 2 before 10; equals stay in the book's order
        "chapter": "deacb",
        "claim": "cdeba",
        "again": "abedc",
        "state": "claim descending",
        "choices": ["their order in the book", "verdict", "claim", "place", "chapter"],
        "chosen": "becad",
        "now": "verdict ascending",
        "back": "abcde",
        "none": "",
        "buttons": 4,
    }
