"""The exercises' solutions. Their snippets run in tests/test_book.py, where the chapters' variables are."""

import re
from pathlib import Path

import pytest
import yaml
from exercises import CHAPTERS, commands, exercises, snippets

from ntkbook.publish import notebooks, runner
from ntkbook.publish.parameters import check_parameters

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *(ROOT / "book").glob("*.md")]
COMMANDS = sorted({command for page in PAGES for command in commands(page.read_text("utf8"))})


def test_every_chapter_that_measures_has_exercises():
    assert [name for name in runner.chapters(ROOT) if name != "07_scorecard"] == CHAPTERS


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_exercise_has_a_hidden_solution(name):
    found = exercises(name)
    assert found
    for text in found:
        (solution,) = re.findall(r"^ *(`{3,}){admonition} Solution\n *:class: dropdown\n(.*?)^ *\1$", text, re.S | re.M)
        assert "```python" in solution[1] or commands(text), text
    fences = "".join(found).count("```python")
    assert len(snippets(name)) == fences


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_snippet_tells_or_asserts(name):
    for code in snippets(name):
        compile(code, name, "exec")
        assert "print(" in code


@pytest.mark.parametrize(("chapter", "params"), COMMANDS)
def test_a_command_can_be_run(chapter, params):
    (name,) = runner.select(ROOT, [chapter])
    values = yaml.safe_load(params)
    assert isinstance(values, dict)
    check_parameters(notebooks.from_text(ROOT / "book" / f"{name}.md"), values, name)
