"""What a run depends on, when it is run again, and that its card is written whatever happens."""

import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from ntkbook.experiments.data.registry import REGISTRY
from ntkbook.experiments.data.sources import Provenance
from ntkbook.publish import book, claims, notebooks, runcard, runner
from ntkbook.publish.parameters import ParameterError, from_here

ROOT = Path(__file__).parents[1]
CHAPTERS = book.chapters(ROOT)


@pytest.fixture
def copied(toybook, tmp_path):
    return Path(shutil.copytree(toybook, tmp_path / "book"))


@pytest.fixture
def mark(copied):
    """The toy chapter's fingerprint as it is now."""
    nb = book.bare_notebook(copied, "01_toy")
    return lambda **values: runcard.fingerprint(copied, "01_toy", nb, values)


def test_a_run_depends_on_the_package_and_not_on_what_runs_chapters():
    for name in CHAPTERS:
        files = {str(p.relative_to(ROOT)) for p in runcard.depends_on(ROOT, name, book.bare_notebook(ROOT, name))}
        seen = {"claims", "criteria", "verdicts", "rendering", "figures", "results", "posterior_widget"}
        seen |= {"scorecard", "notebooks"} if name == "07_scorecard" else set()
        assert {f"ntkbook/publish/{module}.py" for module in seen} <= files
        unseen = {"runner", "storing", "cli", "site", "sweep", "runcard", "execution", "status"}
        assert not {f"ntkbook/publish/{module}.py" for module in unseen} & files
        assert {"ntkbook/gp.py", "ntkbook/experiments/training.py", "requirements.lock"} <= files
        assert "ntkbook/experiments/data/midwest_stations.csv" in files
        assert f"book/results/{name}.card.json" not in files
    first = {p.name for p in runcard.depends_on(ROOT, CHAPTERS[0], book.bare_notebook(ROOT, CHAPTERS[0]))}
    assert {"01_linearisation.benchmarks.json", "01_linearisation.benchmarks.svg"} <= first


@pytest.mark.parametrize("name", CHAPTERS)
def test_chapters_import_of_publish_what_is_watched(name):
    """But for `runner`, of which they need the folder alone."""
    nb = book.bare_notebook(ROOT, name)
    code = "\n".join(cell.source for cell in nb.cells if cell.cell_type == "code")
    lines = [line.partition(" as ")[0] for line in code.splitlines() if "ntkbook.publish" in line]
    modules = {path.stem for path in (ROOT / "ntkbook" / "publish").glob("*.py")}
    named = modules & set(re.findall(r"\w+", " ".join(lines).replace("ntkbook", "")))
    assert named <= {"runner", *runcard.IN_A_CHAPTER, *(runcard.IN_A_SUMMARY if notebooks.is_summary(nb) else ())}


def test_a_change_in_the_package_or_in_a_stored_result_is_seen(copied, mark, monkeypatch):
    package = copied / "ntkbook"
    kept = shutil.ignore_patterns("__pycache__")
    monkeypatch.setattr(runcard, "PACKAGE", Path(shutil.copytree(ROOT / "ntkbook", package, ignore=kept)))
    marks = [mark()]
    results = [copied / "book" / "results" / f"01_toy.long.{kind}" for kind in ("json", "npz", "svg")]
    publish = [package / "publish" / f"{name}.py" for name in ("results", "criteria")]
    for path in (package / "gp.py", *publish, copied / "requirements.lock", *results):
        with path.open("a", encoding="utf8") as file:
            file.write("\n# changed\n")
        marks.append(mark())
    for path in (package / "publish" / "runner.py", copied / "book" / "results" / "01_toy.card.json"):
        path.write_text(path.read_text("utf8") + "\n", "utf8")
        assert mark() == marks[-1]
    monkeypatch.setattr(runcard, "version", lambda package: "0")
    marks.append(mark())
    assert len(set(marks)) == len(marks)


def test_a_folder_of_data_is_told_from_where_the_user_stands(mark, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NTKBOOK_OFFLINE", raising=False)
    monkeypatch.setenv("NTKBOOK_DATA", "data")
    assert runcard.environment() == {"NTKBOOK_DATA": str(tmp_path / "data")}
    here = mark()
    monkeypatch.setenv("NTKBOOK_DATA", str(tmp_path / "data"))
    assert mark() == here
    assert from_here({"data_dir": "data", "seed": 1}) == {"data_dir": str(tmp_path / "data"), "seed": 1}
    assert from_here({"data_dir": ""}) == {"data_dir": ""}


def test_the_kernel_gets_the_folder_of_data(copied, monkeypatch):
    """And the chapter's `data_dir`, in the folder that the user stands in."""
    monkeypatch.chdir(copied.parent)
    monkeypatch.setenv("NTKBOOK_DATA", "data")
    chapter = book.text_path(copied, "01_toy")
    told = "import os\n\nprint('told', os.environ['NTKBOOK_DATA'], data_dir)"
    chapter.write_text(chapter.read_text("utf8") + f"\n```{{code-cell}} ipython3\n{told}\n```\n", "utf8")
    (result,) = runner.run(copied, ["1"], parameters={"size": 5, "data_dir": "x"}, progress=False)
    (shown,) = re.findall(r'"told (.*?)\\n"', result.notebook.read_text("utf8"))
    assert shown == f"{copied.parent / 'data'} {copied.parent / 'x'}"


def test_a_run_on_a_stand_in_is_old_once_the_data_is_here(copied, monkeypatch, tmp_path):
    """Nothing else changes: `ntkbook data fetch` puts files into the cache."""
    from ntkbook.experiments.data import sources

    cache = tmp_path / "cache"
    monkeypatch.setattr(sources, "cache_dir", lambda: cache)
    monkeypatch.setenv("NTKBOOK_DATA", "")
    monkeypatch.setenv("NTKBOOK_OFFLINE", "1")
    folder = copied / "runs" / "01_toy" / "quick"
    stand_in = Provenance("mnist", "embedded", "Digits.", 0, "", "", "", "")
    card = json.loads((folder / "card.json").read_text("utf8"))
    card |= {"data": {"mnist": asdict(stand_in)}, "fingerprint": runcard.stamp("m", ["mnist"])}
    runcard.write_json(folder / "card.json", card)
    assert runcard.is_fresh(folder, "m")
    assert not runcard.is_fresh(folder, "n")
    dataset = REGISTRY["mnist"]
    for name in dataset.files:
        path = cache / dataset.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert not runcard.is_fresh(folder, "m")


@pytest.mark.parametrize("name", ["card.json", "claims.json", "notebook.ipynb"])
@pytest.mark.parametrize("text", [None, "", '{"status": "done"', "[]"])
def test_a_run_that_is_not_whole_is_run_again(copied, name, text):
    if name == "notebook.ipynb" and text is not None:
        pytest.skip("it is whole before there is a card")
    folder = copied / "runs" / "01_toy" / "quick"
    mark = json.loads((folder / "card.json").read_text("utf8"))["fingerprint"]["mark"]
    assert runcard.is_fresh(folder, mark)
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text, "utf8")
    assert not runcard.is_fresh(folder, mark)


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "x" / "card.json"
    runcard.write_json(path, {"a": 1})
    monkeypatch.setattr(os, "replace", lambda *of: 1 / 0)
    for write in (lambda: runcard.write_json(path, {"a": 2}), lambda: notebooks.write(notebooks.strip(NB), path)):
        with pytest.raises(ZeroDivisionError):
            write()
        assert json.loads(path.read_text("utf8")) == {"a": 1}
        assert [p.name for p in path.parent.iterdir()] == ["card.json"]


NB = notebooks.from_text(ROOT / "book" / "07_scorecard.md")


def test_glued_text_that_looks_like_json_is_text():
    def output(name, text):
        return {"data": {"text/plain": text}, "metadata": {"scrapbook": {"name": name}}}

    nb = {"cells": [{"outputs": [output("a", "{'a': 1}"), output("data-x", '{"name": "x"}')]}]}
    assert claims.collect(nb) == {}
    assert claims.collect_data(nb) == {"x": {"name": "x"}}


def test_no_such_gpu_is_an_error_before_the_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    runner.check_device({"device": "cuda:1"}, "x")
    with pytest.raises(ParameterError, match="x: no device 'cuda:7'; torch sees cuda, cuda:0, cuda:1 here"):
        runner.check_device({"device": "cuda:7"}, "x")


@pytest.mark.parametrize("glued", ["record", "device"])
def test_a_card_never_hides_how_a_chapter_ended(copied, monkeypatch, glued):
    """Not by values glued in another form, nor by a device that torch does not know."""
    from ntkbook.publish import execution

    def execute(nb, output, values, **_):
        if glued == "record":
            data = {"data": {"text/plain": "none"}, "metadata": {"scrapbook": {"name": "x-record"}}}
            output.write_text(json.dumps({"cells": [{"outputs": [data]}]}), "utf8")
        raise execution.ChapterError("its own error")

    monkeypatch.setattr(execution, "execute", execute)
    monkeypatch.setattr(runner, "check_device", lambda values, name: None)
    (result,) = runner.run(copied, ["1"], parameters={"device": "cuda:7"}, progress=False)
    assert result.status == "failed"
    assert result.error.startswith("its own error")
    card = json.loads((result.folder / "card.json").read_text("utf8"))
    assert (card["status"], card["device"]) == ("failed", "cuda:7")
