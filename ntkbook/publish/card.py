"""The picture that other sites show beside a link to the book: ``python -m ntkbook.publish.card`` draws it anew.

It is the first panel of the stored chapter on sinusoids, in the house style.
"""

import html
import json
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from ntkbook.publish.book import find_root
from ntkbook.publish.claims import outputs
from ntkbook.publish.figures import CONTEXT, METHOD, TRUTH
from ntkbook.publish.pages import CARD, CARD_SIZE

DPI = 100
TITLE = "Linearised networks, put to the test"
WORDS = "Does what a network has learnt transfer by its tangent kernel?\nEvery claim of a paper, figure by figure"


def curves(notebook: Path) -> list[dict[str, Any]]:
    """What a stored chapter's interactive figure of NTK and truth shows at first, as Plotly's traces.

    ValueError: the chapter has none.
    """
    for output in outputs(notebook):
        page = output["data"].get("text/html", "")
        found = re.search(r'<script type="application/json">(.*?)</script>', "".join(page), re.DOTALL)
        traces = json.loads(html.unescape(found.group(1))).get("data", []) if found else []
        shown = [trace for trace in traces if trace.get("visible", True) is True]
        if {"NTK", "truth", "context"} <= {trace.get("name") for trace in shown}:
            return shown
    raise ValueError(f"{notebook}: expected an interactive figure of NTK, truth and context, found none")


def draw(traces: list[dict[str, Any]]) -> Figure:
    """The card, 1200 × 630 pixels at 100 a unit."""
    width, height = CARD_SIZE
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    figure.text(0.05, 0.86, TITLE, fontsize=40, weight="bold")
    figure.text(0.05, 0.69, WORDS, fontsize=22, color=CONTEXT, linespacing=1.4)
    ax = figure.add_axes((0.05, 0.07, 0.9, 0.54))
    for trace in traces:
        if trace.get("fill") == "toself":
            ax.fill(trace["x"], trace["y"], color=_after(traces, trace), alpha=0.2, linewidth=0)
        elif trace.get("mode") == "markers":
            ax.plot(trace["x"], trace["y"], "o", color=CONTEXT, markersize=10, zorder=5, label="observations")
        else:
            colour, line = (TRUTH, "--") if trace["name"] == "truth" else (_colour(trace["name"]), "-")
            ax.plot(trace["x"], trace["y"], linewidth=3, label=trace["name"], color=colour, linestyle=line)
    ax.legend(fontsize=18, frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, -0.12))
    ax.set_axis_off()
    return figure


def write(root: Path) -> Path:
    """Draw the card from the stored notebook into ``book/_static``, and return where it is."""
    path = root / "book" / CARD
    with mpl.rc_context():
        mpl.rcdefaults()
        draw(curves(root / "book" / "02_sinusoids.ipynb")).savefig(path, dpi=DPI, metadata={"Software": None})
    return path


def _after(traces: list[dict[str, Any]], band: dict[str, Any]) -> str:
    """A band has the colour of the line that follows it."""
    return _colour(traces[traces.index(band) + 1]["name"])


def _colour(label: str) -> str:
    return next(method.colour for method in METHOD.values() if method.label == label)


if __name__ == "__main__":
    print(write(find_root()))
