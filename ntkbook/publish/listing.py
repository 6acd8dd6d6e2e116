"""What the command line lists: chapters, and a chapter's parameters."""

from pathlib import Path

import yaml

from ntkbook.publish.book import bare_notebook, chapters, checked_profile, select
from ntkbook.publish.parameters import parameters


def columns(rows: list[list[str]]) -> str:
    """Rows of texts as aligned columns."""
    widths = [max(len(cell) for cell in cells) for cells in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def profiles(root: Path, chapter: str) -> list[str]:
    """The profiles that a chapter has."""
    files = sorted((root / "profiles").glob("*.yml"))
    return ["cpu", *(path.stem for path in files if chapter in (yaml.safe_load(path.read_text("utf8")) or {}))]


def chapters_text(root: Path) -> str:
    """Every chapter with its title and profiles."""
    from ntkbook.publish import notebooks

    names = chapters(root)
    rows = [[name, notebooks.title(bare_notebook(root, name)), ", ".join(profiles(root, name))] for name in names]
    return columns([["chapter", "title", "profiles"], *rows])


def parameters_text(root: Path, wanted: str) -> str:
    """A chapter's parameters with type, default and comment, and what its profiles change of them.

    Raises:
        ValueError: no such chapter.
    """
    from ntkbook.publish import notebooks

    (name,) = select(root, [wanted])
    nb = bare_notebook(root, name)
    changes = {profile: checked_profile(root, profile, name, nb) for profile in profiles(root, name)}
    lines = [
        f"{name}: {notebooks.title(nb)}",
        "The defaults are the cpu profile; change them with --params 'NAME: value'.",
        "",
    ]
    for parameter in parameters(nb):
        key = parameter.name
        others = [f"{profile}: {values[key]!r}" for profile, values in changes.items() if key in values]
        lines += [f"{key}: {parameter.kind} = {parameter.default}"]
        lines += [f"    {text}" for text in (parameter.comment, "; ".join(others)) if text]
    return "\n".join(lines)
