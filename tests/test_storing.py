"""What is stored: nothing of a run that failed, nor outputs under a text that was edited meanwhile."""

import shutil
from pathlib import Path

import pytest

from ntkbook.publish import book, execution, notebooks, runner, site, storing

EDIT = ("print(f", "print('edited', f")


@pytest.fixture
def copied(toybook, tmp_path):
    return Path(shutil.copytree(toybook, tmp_path / "book"))


def edit(root, old, new):
    chapter = book.text_path(root, "01_toy")
    text = chapter.read_text("utf8")
    assert old in text
    chapter.write_text(text.replace(old, new), "utf8")


def stored(root):
    return [path(root, "01_toy").read_bytes() for path in (book.stored_path, book.stored_card_path)]


def test_a_chapter_that_is_edited_while_it_runs_is_not_stored(copied, monkeypatch):
    """The others are, and its run is kept."""
    before, execute = stored(copied), execution.execute

    def slow(nb, output, values, **options):
        peak = execute(nb, output, values, **options)
        if options["name"] == "01_toy":
            edit(copied, *EDIT)
        return peak

    monkeypatch.setattr(execution, "execute", slow)
    edited, scorecard = storing.store(copied, force=True, progress=False)
    assert (edited.status, scorecard.status) == ("failed", "done")
    assert edited.error.startswith("01_toy was edited while it ran: ")
    assert edited.error.endswith("That run is kept in runs/01_toy/cpu")
    assert edited.notebook.exists()
    assert stored(copied) == before


def test_a_chapter_that_fails_is_neither_stored_nor_shown(copied):
    before = stored(copied)
    edit(copied, "fail: bool = False", "fail: bool = True")
    failed = storing.store(copied, ["01"], progress=False)[0]
    assert failed.status == "failed"
    assert stored(copied) == before
    staged = site.stage(copied, [failed])
    assert book.stored_path(staged, "01_toy").read_bytes() == before[0]
    assert "asked to fail" in book.stored_card_path(staged, "01_toy").read_text("utf8")


def test_a_quick_run_of_an_older_text_is_not_shown(copied):
    (result,) = runner.run(copied, ["01"], profile="quick", progress=False)
    assert storing.unless_edited(copied, result) == result
    edit(copied, *EDIT)
    edited = storing.unless_edited(copied, result)
    assert edited.status == "failed"
    before = stored(copied)
    assert stored(site.stage(copied, [edited])) == before
    with pytest.raises(ValueError, match="other code"):
        notebooks.with_outputs(book.bare_notebook(copied, "01_toy"), notebooks.read(result.notebook))


def test_a_missing_text_is_told(copied):
    book.text_path(copied, "07_scorecard").unlink()
    with pytest.raises(ValueError, match=r"07_scorecard is in _toc\.yml, but there is no book/07_scorecard\.md"):
        storing.store(copied, ["01"], progress=False)
