"""The figures and tables that a run keeps as files."""

import csv
import io

import matplotlib.pyplot as plt
import pyarrow.parquet as pq
import pytest

from ntkbook.publish import claims, figures, results


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(results.FOLDER, str(tmp_path))
    with plt.rc_context({"backend": "agg"}):
        yield tmp_path
    plt.close("all")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_run_has_its_figures_and_tables(toybook):
    run = toybook / "runs" / "01_toy" / "quick"
    drawn = ["01-figure-0-quick.png", "01-figure-0-quick.svg", "02.png", "02.svg"]
    assert names(run / "figures") == drawn
    assert names(run / "tables") == ["01-two-methods-quick.csv", "01-two-methods-quick.parquet"]
    shown = [output["data"].get("image/svg+xml") for output in claims.outputs(run / "notebook.ipynb")]
    assert (run / "figures" / drawn[1]).read_text("utf8") in ["".join(text) for text in shown if text]
    assert (run / "figures" / "02.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.delenv(results.FOLDER, raising=False)
    monkeypatch.chdir(tmp_path)
    fig, _ = plt.subplots()
    figures.svg(fig)
    figures.text_table({"a": {"b": "c"}})
    plt.close(fig)
    assert names(tmp_path) == []


def test_keeping_a_figure_changes_nothing_of_it(folder, monkeypatch):
    def draw():
        fig, axes = plt.subplots(1, 2, layout="constrained")
        axes[0].plot([1, 2, 3])
        fig.colorbar(axes[1].imshow([[0, 1]]), ax=axes)
        axes[1].set_title("σ² & Ünder")
        return fig

    fig, kept = draw(), []
    for _ in range(2):  # a layout goes on from where it was, so that a second drawing may differ from the first
        kept.append(figures.svg(fig))
    monkeypatch.delenv(results.FOLDER)
    fig = draw()
    assert kept == [figures.svg(fig), figures.svg(fig)]
    assert names(folder / "figures") == [f"0{i}-2-under.{kind}" for i in (1, 2) for kind in ("png", "svg")]
    assert (folder / "figures" / "01-2-under.svg").read_text("utf8") == kept[0]
    png = (folder / "figures" / "01-2-under.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert b"matplotlib" not in png.lower()  # no version: the same with another


def test_tables_keep_numbers_as_numbers(folder):
    rows = {"ntk": {"RMSE": (1 / 3, 0.1), "n": 4}, "mine": {"RMSE": 0.5, "note": None}}
    figures.metric_table(rows, caption="RMSE: over ten tasks")
    figures.text_table({"a, b": {"time": "3 s (2 to 4)"}}, "quick", "x" * 80, head="network")
    tables = folder / "tables"
    assert names(tables) == [f"{name}.{kind}" for name in ("01-rmse-over-ten-tasks", "02-" + "x" * 60)
                             for kind in ("csv", "parquet")]  # fmt: skip
    found = pq.read_table(tables / "01-rmse-over-ten-tasks.parquet").to_pylist()
    assert found == [
        {"method": "NTK", "RMSE": 1 / 3, "RMSE ±": 0.1, "n": 4.0, "note": None},
        {"method": "mine", "RMSE": 0.5, "RMSE ±": None, "n": None, "note": None},
    ]
    text = (tables / "01-rmse-over-ten-tasks.csv").read_text("utf8")
    assert list(csv.reader(io.StringIO(text)))[1:] == [
        ["NTK", repr(1 / 3), "0.1", "4.0", ""], ["mine", "0.5", "", "", ""],
    ]  # fmt: skip
    (quick,) = csv.DictReader(io.StringIO((tables / ("02-" + "x" * 60 + ".csv")).read_text("utf8")))
    assert quick == {"network": "a, b", "time": "3 s (2 to 4)"}


def test_a_column_of_numbers_and_texts_is_one_of_texts(folder):
    rows = {"a": {"b": 1.5, "head": 2}, "c": {"b": "none", "head": (3, 0.5)}, "d": {"b": None}}
    results.keep_table(rows, "head", "")
    assert pq.read_table(folder / "tables" / "01.parquet").to_pylist() == [
        {"head (row)": "a", "b": "1.5", "head": 2.0, "head ±": None},
        {"head (row)": "c", "b": "none", "head": 3.0, "head ±": 0.5},
        {"head (row)": "d", "b": None, "head": None, "head ±": None},
    ]
    text = (folder / "tables" / "01.csv").read_text("utf8")
    assert text.splitlines()[:2] == ["head (row),b,head,head ±", "a,1.5,2.0,"]


def test_csv_alone_without_pyarrow(folder, monkeypatch):
    monkeypatch.setattr(results, "find_spec", lambda name: None)
    results.keep_table({"a": {"b": 1.0}}, "x", "")
    assert names(folder / "tables") == ["01.csv"]


def test_an_earlier_runs_files_go(folder):
    results.keep_table({"a": {"b": 1.0}}, "x", "")
    results.clear(folder)
    assert names(folder) == []
