"""The script that draws a page's interactive figures, in a browser with a Plotly that only notes what it is asked."""

import shutil
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from chromium import CHROMIUM, dumped

SCRIPT = Path(__file__).parents[1] / "book" / "_static" / "interactive.js"
PLOTLY = """window.Plotly = { react(live, data) {
  if (!data.length) throw new Error("nothing to draw");
  live.on = () => {};
  live.textContent = "drawn";
  return data[0].type === "none" ? Promise.reject(new Error("no such type")) : Promise.resolve();
} };"""
FIGURE = '{"data": [{"type": "%s"}], "layout": {"sliders": [{"steps": [{"label": "a", "args": [{}]}]}]}}'


@pytest.mark.skipif(CHROMIUM is None, reason="a browser draws the figures: no Chromium installed")
def test_a_figure_that_cannot_be_drawn_leaves_its_static_one_and_the_others(tmp_path):
    figures = ["not JSON", '{"data": [], "layout": {}}', "{}", FIGURE % "none", FIGURE % "scatter"]
    static = '<p class="ntk-static">static</p>'
    scripts = [f'<script type="application/json">{figure}</script>' for figure in figures]
    boxes = "".join(f'<div class="ntk-interactive">{static}{script}</div>' for script in scripts)
    shutil.copyfile(SCRIPT, tmp_path / "interactive.js")
    (tmp_path / "plotly.min.js").write_text(PLOTLY, "utf8")
    page = f'<!doctype html><meta charset="utf-8"><script src="interactive.js"></script>{boxes}'
    (tmp_path / "page.html").write_text(page, "utf8")
    html_now = dumped(tmp_path / "page.html")
    *failed, drawn = BeautifulSoup(html_now, "html.parser").select(".ntk-interactive")
    assert len(failed) == 4
    for box in failed:
        assert not box.select(".ntk-live, .ntk-controls")
        assert not box.select_one(".ntk-static").has_attr("hidden")
    assert drawn.select_one(".ntk-live").get_text() == "drawn"
    assert drawn.select(".ntk-controls input")
    assert drawn.select_one(".ntk-static").has_attr("hidden")
