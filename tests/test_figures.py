"""The figures that chapters share."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from bs4 import BeautifulSoup

from ntkbook.experiments.data.sources import Provenance
from ntkbook.publish import claims, figures

DRAW = """
import numpy as np, matplotlib.pyplot as plt
from ntkbook.publish import figures
figures.style()
fig, axes = plt.subplots(1, 2)
x = np.linspace(0, 1, 30)
for ax in axes:
    figures.posterior_panel(ax, x, x**2, x, context=(x, x), test=(x, -x), truth=x, source=-x)
    ax.imshow(np.eye(3), extent=(0, 0.2, 0, 0.2)); ax.legend()
print(figures.svg(fig))
"""


@pytest.fixture(autouse=True)
def _plain():
    with plt.rc_context({"backend": "agg"}):
        yield
    plt.close("all")


def test_an_svg_is_the_same_in_another_process():
    environment = {**os.environ, "MPLBACKEND": "agg"}
    first, second = (
        subprocess.run(
            [sys.executable, "-c", DRAW], capture_output=True, text=True, check=True,
            env={**environment, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    )  # fmt: skip
    assert first == second
    assert "<svg" in first
    assert "dc:date" not in first


def test_methods_can_be_told_apart():
    looks = figures.METHOD
    assert len({look.label for look in looks.values()}) == len(looks)
    for chapter in sorted((Path(__file__).parents[1] / "book").glob("0*.md")):
        text = chapter.read_text("utf8")
        shown = [look for key, look in looks.items() if f'"{key}"' in text]
        assert len({look[1:] for look in shown}) == len(shown), chapter.name  # colour, line and marker


def test_quick_figures_say_so_instead_of_naming_the_papers_figure():
    fig, ax = plt.subplots()
    figures.title(ax, "posteriors", "quick", paper="Figure 1")
    assert ax.get_title() == "posteriors (quick)"
    figures.title(fig, "posteriors", "cpu", paper="Figure 1")
    assert fig.get_suptitle() == "Figure 1: posteriors"


def test_figures_of_stand_in_data_say_so_instead_of_naming_the_papers_figure(monkeypatch):
    monkeypatch.setattr(claims, "_display", lambda content: None)
    monkeypatch.setattr(claims, "_glue", lambda name, value: None)
    shown = set()
    for module in (claims, figures):
        monkeypatch.setattr(module, "STAND_INS", shown)
    here = Provenance("cifar10", "made-up", "patterns", 0, "", "a licence", "a citation", "")
    real = replace(here, name="malaria", source="real")
    titles = []
    for provenance in (real, here):
        claims.show_data(provenance)
        fig = plt.figure()
        figures.title(fig, "posteriors", "cpu", paper="Figure 1")
        titles.append(fig.get_suptitle())
    assert titles == ["Figure 1: posteriors", "posteriors (stand-in data)"]


def test_a_posterior_panel_has_two_standard_deviations_in_the_order_of_x():
    _, ax = plt.subplots()
    x = np.array([2.0, 0.0, 1.0])
    figures.posterior_panel(ax, x[:, None], x + 1, np.ones(3), method="rbf", source=x, truth=x)
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == -1
    assert band[:, 1].max() == 5
    assert ax.lines[0].get_xdata().tolist() == [0, 1, 2]
    assert ax.lines[0].get_label() == figures.METHOD["rbf"].label
    with pytest.raises(ValueError, match="one shape"):
        figures.posterior_panel(ax, x, x, np.ones(2))


def test_an_interactive_figure_has_a_static_one_and_cannot_leave_its_script():
    fig, ax = plt.subplots()
    ax.plot([1, 2])
    plotly = {"data": [{"y": [1, 2], "name": "</script><b>"}], "layout": {}}
    page = figures.interactive(plotly, fig, 'a "rising" line')._repr_mimebundle_()["text/html"]
    assert page.count("</script>") == 1
    assert 'alt="a &quot;rising&quot; line"' in page
    assert "data:image/svg+xml;base64," in page
    assert "http" not in page
    assert not plt.fignum_exists(fig.number)


def test_a_metric_table_shows_values_with_intervals():
    table = figures.metric_table({"ntk": {"RMSE": (1.2345, 0.1)}, "mine": {"NLL": 2}}, "quick", "nine tasks")
    bundle = table._repr_mimebundle_()
    assert "1.23 ± 0.1" in bundle["text/html"]
    assert figures.METHOD["ntk"].label in bundle["text/html"]
    assert "nine tasks (quick)" in bundle["text/plain"]


def test_a_text_is_shown_as_it_is_in_both_forms():
    bundle = figures.text_table({"data's": {"size": "a < b"}})._repr_mimebundle_()
    row = BeautifulSoup(bundle["text/html"], "html.parser").select_one("tbody tr")
    assert [cell.get_text() for cell in row] == ["data's", "a < b"]
    assert bundle["text/plain"].splitlines()[-1] == "data's | a < b"
