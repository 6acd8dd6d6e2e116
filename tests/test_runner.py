"""Running chapters: parameters, profiles, failures, what is redone, and what is stored."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ntkbook.publish import book, execution, notebooks, runner, storing
from ntkbook.publish.parameters import ParameterError, _fits, check_parameters, declared


@pytest.fixture
def copied(toybook, tmp_path):
    """A copy of the toy book with its runs, to change."""
    return Path(shutil.copytree(toybook, tmp_path / "book"))


def test_chapters_come_from_the_table_of_contents(toybook):
    assert book.chapters(toybook) == ["01_toy", "07_scorecard"]
    assert book.select(toybook, []) == ["01_toy", "07_scorecard"]
    assert book.select(toybook, ["7", "01", "01_toy"]) == ["07_scorecard", "01_toy"]
    with pytest.raises(ValueError, match="no chapter '02'; there are 01_toy, 07_scorecard"):
        book.select(toybook, ["02"])


def test_the_root_is_found_from_below(toybook, tmp_path):
    assert book.find_root(toybook / "book" / "results") == toybook
    with pytest.raises(FileNotFoundError, match=r"_toc\.yml"):
        book.find_root(tmp_path)


def test_a_profile_changes_the_defaults(toybook):
    assert book.profile_parameters(toybook, "cpu", "01_toy") == {}
    assert book.profile_parameters(toybook, "quick", "01_toy") == {"profile": "quick", "size": 5}
    with pytest.raises(ValueError, match="no profile 'fast'; there are cpu, quick"):
        book.profile_parameters(toybook, "fast", "01_toy")


def test_types_are_as_annotated(toybook):
    kinds = declared(notebooks.from_text(toybook / "book" / "01_toy.md"))
    assert kinds["sizes"] == "list[int]"
    assert kinds["scale"] == "float"
    assert set(kinds) >= {"profile", "seed", "device", "source", "data_dir"}


@pytest.mark.parametrize(
    "good", [{"seed": 3}, {"scale": 2}, {"scale": 0.5}, {"sizes": [1]}, {"fail": True}, {"data_dir": "x"}, {}]
)
def test_good_parameters(toybook, good):
    check_parameters(notebooks.from_text(toybook / "book" / "01_toy.md"), good, "01_toy")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"sede": 3}, "no parameter 'sede'; did you mean seed"),
        ({"zzz": 3}, "it has profile, seed"),
        ({"seed": "3"}, "'seed' is int, got '3'"),
        ({"seed": 0.5}, "'seed' is int"),
        ({"seed": True}, "'seed' is int, got True"),
        ({"fail": "true"}, "'fail' is bool"),
        ({"sizes": [1, "a"]}, r"'sizes' is list\[int\]"),
        ({"scale": None}, "'scale' is float"),
        ({"scale": "1e-3"}, r"'scale' is float, got '1e-3' \(str\); YAML takes 1e-3 for text, write 0.001"),
    ],
)
def test_bad_parameters(toybook, bad, message):
    with pytest.raises(ParameterError, match=message):
        runner.run(toybook, ["01"], parameters=bad, progress=False)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("int | None", [1, None], ["1", 1.0]),
        ("list[int | str]", [[], [1, "a"]], [[1.5], [None], 1]),
        ("list[list[float]]", [[[1, 0.5]]], [[1], [["a"]], [[True]]]),
        ("dict[str, int]", [{}, {"a": 1}], [{"a": "b"}, {1: 1}, [1]]),
        ("Literal['a']", ["a", "b"], []),  # for the chapter's own code to check
    ],
)
def test_types_inside_types(kind, good, bad):
    assert all(_fits(value, kind) for value in good)
    assert not any(_fits(value, kind) for value in bad)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("01_toy: {sise: 3}", r"profiles/quick\.yml: 01_toy has no parameter 'sise'; did you mean size"),
        ("01_toy: {size: many}", r"profiles/quick\.yml: 01_toy: parameter 'size' is int, got 'many' \(str\)"),
        ("01_toyy: {size: 3}", r"profiles/quick\.yml: no chapter '01_toyy'; did you mean 01_toy\?"),
    ],
)
def test_mistakes_in_a_profile_name_its_file(copied, text, message):
    (copied / "profiles" / "quick.yml").write_text(text, "utf8")
    with pytest.raises(ValueError, match=message):
        runner.run(copied, ["01"], profile="quick", progress=False)


def test_no_gpu_is_an_error_before_the_run(toybook, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ParameterError, match="wants a GPU"):
        runner.run(toybook, ["01"], parameters={"device": "cuda"}, progress=False)


def test_a_chapter_without_parameters_is_an_error(tmp_path):
    (tmp_path / "x.md").write_text("# X\n\n```{code-cell} ipython3\n1\n```\n", "utf8")
    with pytest.raises(ValueError, match="tagged 'parameters'"):
        notebooks.from_text(tmp_path / "x.md")


def test_a_stored_notebook_is_the_chapter_with_outputs(toybook):
    stored = notebooks.read(toybook / "book" / "01_toy.ipynb")
    bare = notebooks.from_text(toybook / "book" / "01_toy.md")
    facts = [(cell.id, cell.cell_type, cell.source, cell.metadata) for cell in stored.cells]
    assert facts == [(cell.id, cell.cell_type, cell.source, cell.metadata) for cell in bare.cells]
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    text = (toybook / "book" / "01_toy.ipynb").read_text("utf8")
    assert "papermill.record" in text  # the glued values
    for churn in ("start_time", "iopub", "stderr", str(toybook), '"name": "stderr"'):
        assert churn not in text


def test_storing_again_changes_no_byte(copied):
    files = sorted((copied / "book").glob("*.ipynb"))
    before = [path.read_bytes() for path in files]
    storing.store(copied, force=True, progress=False)
    assert [path.read_bytes() for path in files] == before


def test_the_card_says_what_a_reader_needs(toybook):
    run = toybook / "runs" / "01_toy" / "quick"
    card = json.loads((run / "card.json").read_text("utf8"))
    assert card["parameters"] == {"profile": "quick", "size": 5}
    assert card["status"] == "done"
    assert card["versions"].keys() >= {"python", "torch", "ntkbook"}
    assert card["data"]["draws"]["name"] == "draws"
    assert card["wall_seconds"] > 0
    assert card["peak_mib"] is None or card["peak_mib"] > 10
    assert json.loads((run / "claims.json").read_text("utf8"))["toy-mean"]["verdict"] == "not evaluated"
    stored = json.loads((toybook / "book" / "results" / "01_toy.card.json").read_text("utf8"))
    assert "fingerprint" not in stored


def test_a_second_run_redoes_only_what_changed(copied):
    assert [r.status for r in runner.run(copied, profile="quick", progress=False)] == ["fresh", "fresh"]
    chapter = copied / "book" / "07_scorecard.md"
    chapter.write_text(chapter.read_text("utf8") + "\n```{code-cell} ipython3\n1 + 1\n```\n", "utf8")
    assert [r.status for r in runner.run(copied, profile="quick", progress=False)] == ["fresh", "done"]


def test_new_prose_is_stored_without_a_new_run(copied):
    chapter, stored = copied / "book" / "01_toy.md", copied / "book" / "01_toy.ipynb"
    before = notebooks.read(stored)
    chapter.write_text(chapter.read_text("utf8").replace("# A toy chapter", "# Another title"), "utf8")
    assert storing.store(copied, ["01"], progress=False)[0].status == "fresh"
    after = notebooks.read(stored)
    assert after.cells[0].source.startswith("# Another title")
    assert [cell.get("outputs") for cell in after.cells] == [cell.get("outputs") for cell in before.cells]
    (result,) = runner.run(copied, ["01"], profile="quick", progress=False)
    shown = storing.finished(copied, result)
    assert sum("injected-parameters" in cell.metadata.get("tags", []) for cell in shown.cells) == 1
    assert len(shown.cells) == len(after.cells) + 1


def test_the_text_alone_is_stored_where_the_code_is_the_same(copied):
    chapter, stored = copied / "book" / "01_toy.md", copied / "book" / "01_toy.ipynb"
    (copied / "requirements.lock").write_text("torch==0\n", "utf8")  # a run would not be fresh
    before, text = notebooks.read(stored), chapter.read_text("utf8")
    described = ":tags: [hide-input]\n:mystnb: {image: {alt: a line}}"
    chapter.write_text(text.replace("# A toy", "# Another").replace(":tags: [hide-input]", described, 1), "utf8")
    assert storing.store_text(copied, ["01"]) == [stored]
    after = notebooks.read(stored)
    assert after.cells[0].source.startswith("# Another")
    assert [cell.get("outputs") for cell in after.cells] == [cell.get("outputs") for cell in before.cells]
    assert [cell.metadata["mystnb"] for cell in after.cells if "mystnb" in cell.metadata] == [
        {"image": {"alt": "a line"}}
    ]
    chapter.write_text(text + "\n```{code-cell} ipython3\n1 + 1\n```\n", "utf8")
    with pytest.raises(ValueError, match=r"01_toy\.ipynb has other code: run `ntkbook store 01_toy`"):
        storing.store_text(copied, ["01"])
    stored.unlink()
    with pytest.raises(ValueError, match=r"01_toy\.ipynb is not there"):
        storing.store_text(copied, ["01"])


def test_a_fingerprint_sees_what_a_run_depends_on(copied, monkeypatch):
    nb = notebooks.from_text(copied / "book" / "01_toy.md")

    def mark(values):
        return runner.fingerprint(copied, "01_toy", nb, values)

    first = mark({})
    assert mark({}) == first
    assert mark({"seed": 1}) != first
    (copied / "requirements.lock").write_text("torch==0\n", "utf8")
    second = mark({})
    assert second != first
    monkeypatch.setenv("NTKBOOK_DATA", "elsewhere")
    assert mark({}) != second


def test_a_failing_chapter_keeps_the_others_and_says_which_cell(copied, capsys):
    chapter = copied / "book" / "01_toy.md"
    chapter.write_text(chapter.read_text("utf8").replace("fail: bool = False", "fail: bool = True"), "utf8")
    failed, done = runner.run(copied, profile="quick", progress=False)
    assert (failed.status, done.status) == ("failed", "done")
    assert "which starts with: draws = np.random" in failed.error
    assert "RuntimeError: asked to fail" in failed.error
    partial = notebooks.read(failed.notebook)
    assert any("RuntimeError" in str(cell.get("outputs", "")) for cell in partial.cells)
    assert json.loads((failed.folder / "card.json").read_text("utf8"))["status"] == "failed"
    assert runner.run(copied, ["01"], profile="quick", progress=False)[0].status == "failed"  # not taken for fresh


def test_progress_is_an_overall_bar_and_one_a_chapter(copied, capsys):
    (result,) = runner.run(copied, ["07"], parameters={"profile": "gpu"})
    assert result.folder.name not in ("cpu", "quick", "gpu")  # a hash of profile and parameters
    told = capsys.readouterr()
    assert told.out == ""
    assert "chapters" in told.err
    assert "07_scorecard" in told.err
    assert "cell" in told.err


def quickly(root):
    return runner.run(root, ["01"], profile="quick", force=True, progress=False)


def test_a_failure_of_any_kind_is_of_its_chapter_alone(copied, monkeypatch):
    def execute(nb, output, values, *, name, **_):
        if name == "01_toy":
            raise RuntimeError("Kernel didn't respond in 60 seconds")
        notebooks.write(nb, output)

    monkeypatch.setattr(execution, "execute", execute)
    failed, done = runner.run(copied, profile="quick", force=True, progress=False)
    assert (failed.status, done.status) == ("failed", "done")
    assert failed.error.startswith("01_toy: RuntimeError: Kernel didn't respond in 60 seconds")
    assert json.loads((failed.folder / "card.json").read_text("utf8"))["status"] == "failed"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_earlier_run_is_kept_until_a_new_one_succeeds(copied, monkeypatch, error):
    folder = copied / "runs" / "01_toy" / "quick"
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    def execute(nb, output, values, **_):
        notebooks.write(nb, output)
        raise error("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(execution, "execute", execute)
        for _ in range(2):  # the second has no good run to move aside, and must not lose the one that is there
            if error is KeyboardInterrupt:
                with pytest.raises(runner.Interrupted, match=r"the last run that succeeded is kept in .*previous"):
                    quickly(copied)
            else:
                assert "the last run that succeeded is kept in" in quickly(copied)[0].error
            kept = runner.previous(folder)
            assert {path.name: path.read_bytes() for path in kept.iterdir() if path.is_file()} == before
            assert (kept / "figures").is_dir()
            assert (folder / "notebook.ipynb").exists()  # what it had done
    patched_done(monkeypatch)
    assert quickly(copied)[0].status == "done"
    assert not runner.previous(folder).exists()


def one(root):
    nb = book.bare_notebook(root, "01_toy")
    return root, "01_toy", nb, "quick", book.profile_parameters(root, "quick", "01_toy")


def patched_done(monkeypatch):
    """Chapters end well, at once."""
    monkeypatch.setattr(execution, "execute", lambda nb, output, values, **_: notebooks.write(nb, output))


def test_a_second_run_waits_for_the_first_and_takes_its_result(copied, monkeypatch, capsys):
    folder = copied / "runs" / "01_toy" / "other"
    patched_done(monkeypatch)
    with ThreadPoolExecutor() as pool:
        with runner._alone(folder, "the first"):
            second = pool.submit(runner.run_one, *one(copied), folder, progress=False)
            end, told = time.monotonic() + 60, ""
            while "waiting" not in told:
                assert time.monotonic() < end
                time.sleep(0.05)
                told += capsys.readouterr().err
            assert not folder.exists()
            root, name, nb, _, values = one(copied)
            mark = runner.fingerprint(root, name, nb, values)
            runner._set_aside(folder)
            assert runner._run_into(folder, *one(copied), mark, name, False).status == "done"
        assert second.result(60).status == "fresh"
    assert told == f"01_toy: waiting for another process, which runs it into {folder}\n"


def test_a_kernel_that_dies_is_told_with_its_cell(copied):
    """In a folder whose name papermill would take for a template."""
    root = copied.rename(copied.with_name("{a} book"))
    chapter = book.text_path(root, "01_toy")
    text = chapter.read_text("utf8").replace('raise RuntimeError("asked to fail")', "import os; os._exit(1)")
    chapter.write_text(text, "utf8")
    (result,) = runner.run(root, ["1"], parameters={"fail": True}, progress=False)
    assert result.status == "failed"
    assert result.error.startswith("01_toy: the kernel died in cell 5, which starts with: draws = np.random")
    assert f"what ran so far is in {result.notebook}" in result.error
    assert result.notebook.exists()
