"""What the chapters' exercises ask a reader to do: snippets to paste after the last cell, and commands."""

import re
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted(path.stem for path in (ROOT / "book").glob("0*.md") if "\n## Exercises\n" in path.read_text("utf8"))


def exercises(name: str) -> list[str]:
    """The text of each exercise of a chapter, its solution included."""
    text = (ROOT / "book" / f"{name}.md").read_text("utf8")
    section = text.partition("\n## Exercises\n")[2].partition("\n## ")[0]
    return re.split(r"^\d+\. ", section, flags=re.MULTILINE)[1:]


def snippets(name: str) -> list[str]:
    """The Python code of a chapter's solutions, in order."""
    fences = r"^( *)```python\n(.*?)^\1```$"
    found = [code for text in exercises(name) for _, code in re.findall(fences, text, re.DOTALL | re.MULTILINE)]
    return [dedent(code) for code in found]


def commands(text: str) -> list[tuple[str, str]]:
    """The chapter and the parameters of every `make run` in a text."""
    return re.findall(r"make run CHAPTER=(\S+)(?: PROFILE=\S+)? PARAMS='([^']*)'", text)
