"""What every page carries: its card's metadata, its date; and the picture of the card."""

import re
import struct
import subprocess
from pathlib import Path

import pytest
from docutils import nodes
from docutils.utils import new_document

from ntkbook.publish import card, pages

ROOT = Path(__file__).parents[1]


def git(folder, *arguments):
    who = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path):
    """One commit with a page and its notebook, a later one with the notebook alone."""
    root = tmp_path / "book"
    root.mkdir()
    git(root, "init", "-q")
    for day, names in (("2024-03-01", ("a.md", "a.ipynb")), ("2025-06-07", ("a.ipynb",))):
        for name in names:
            (root / name).write_text(day, "utf8")
        git(root, "add", ".")
        stamp = f"{day}T12:00:00+00:00"
        who = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
        subprocess.run(
            ["git", *who, "commit", "-qm", day], cwd=root, check=True,
            env={"PATH": "/usr/bin:/bin:/usr/local/bin", "GIT_AUTHOR_DATE": stamp, "GIT_COMMITTER_DATE": stamp},
        )  # fmt: skip
    return root


def test_the_last_change_is_the_latest_of_the_files(repository):
    page, notebook = repository / "a.md", repository / "a.ipynb"
    assert pages.last_change(repository, [page]) == "2024-03-01"
    assert pages.last_change(repository, [page, notebook]) == "2025-06-07"
    (repository / "new.md").write_text("new", "utf8")
    assert pages.last_change(repository, [repository / "new.md"]) is None


def test_without_the_history_there_is_no_date(repository, tmp_path, monkeypatch):
    shallow = tmp_path / "shallow"
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{repository}", str(shallow))
    assert pages.last_change(shallow, [shallow / "a.md"]) is None
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.md").write_text("x", "utf8")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert pages.last_change(outside, [outside / "a.md"]) is None
    monkeypatch.setenv("PATH", str(outside))
    assert pages.last_change(repository, [repository / "a.md"]) is None


def test_the_address_of_the_pages():
    assert pages.pages_url("https://github.com/Some-One/book") == "https://some-one.github.io/book/"
    for wrong in ("", "https://gitlab.com/a/b", "https://github.com/a"):
        with pytest.raises(ValueError, match="OWNER/NAME"):
            pages.pages_url(wrong)


def test_a_description_is_the_first_paragraph_in_short():
    document = new_document("x")
    assert pages.description(document) == pages.description(None) == ""
    document += nodes.paragraph("", "", nodes.strong("", "Question."), nodes.Text("\nWhat  is\nthis?"))
    document += nodes.paragraph("", "Not this.")
    assert pages.description(document) == "What is this?"
    long = new_document("x")
    long += nodes.paragraph("", "word " * 100)
    assert pages.description(long, 12) == "word word …"


def test_tags_are_escaped():
    tags = pages.metadata('"A" & <b>', "text", "https://u", "https://c", "site")
    assert '<meta property="og:title" content="&quot;A&quot; &amp; &lt;b&gt;">' in tags
    assert '<meta name="twitter:card" content="summary_large_image">' in tags
    assert len(re.findall("<meta ", tags)) == tags.count("\n") + 1 == 12


def test_the_front_door_has_the_card_of_the_first_page(tmp_path):
    (tmp_path / "book").mkdir()
    tags = pages.metadata("Title", "text", "https://u", "https://c", "site")
    (tmp_path / "book" / "index.html").write_text(f"<html><head>{tags}</head></html>", "utf8")
    pages.dress_front_door(tmp_path, "book/index")
    text = (tmp_path / "index.html").read_text("utf8")
    assert all(tag in text for tag in tags.splitlines())
    assert "<title>Title</title>" in text
    assert 'content="0; url=book/index.html"' in text


def size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_the_stored_card_is_small_and_as_large_as_the_tags_say():
    path = ROOT / "book" / pages.CARD
    assert path.stat().st_size < 200_000
    assert size(path) == pages.CARD_SIZE


def test_the_card_is_drawn_from_the_stored_chapter(tmp_path):
    (tmp_path / "book" / "_static").mkdir(parents=True)
    chapter = tmp_path / "book" / "02_sinusoids.ipynb"
    chapter.write_text((ROOT / "book" / "02_sinusoids.ipynb").read_text("utf8"), "utf8")
    assert size(card.write(tmp_path)) == pages.CARD_SIZE
    names = [trace["name"] for trace in card.curves(chapter) if trace.get("name")]
    assert {"NTK", "truth", "context"} <= set(names)
    assert len(names) == len(set(names)), "one task, not all of the slider's"
    with pytest.raises(ValueError, match="found none"):
        card.curves(ROOT / "book" / "07_scorecard.ipynb")
