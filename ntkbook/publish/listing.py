"""What the command line lists: chapters, a chapter's parameters, and the claims as data."""

import json
from pathlib import Path
from typing import Any

import yaml

from ntkbook.publish import runner, scorecard
from ntkbook.publish.parameters import parameters
from ntkbook.publish.verdicts import NOT_EVALUATED, REPRODUCED, Claim, Record


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
    names = runner.chapters(root)
    rows = [[name, _title(runner.bare_notebook(root, name)), ", ".join(profiles(root, name))] for name in names]
    return columns([["chapter", "title", "profiles"], *rows])


def parameters_text(root: Path, wanted: str) -> str:
    """A chapter's parameters with type, default and comment, and what its profiles change of them.

    Raises:
        ValueError: no such chapter.
    """
    (name,) = runner.select(root, [wanted])
    nb = runner.bare_notebook(root, name)
    changes = {profile: runner.checked_profile(root, profile, name, nb) for profile in profiles(root, name)}
    lines = [f"{name}: {_title(nb)}", "The defaults are the cpu profile; change them with --params 'NAME: value'.", ""]
    for parameter in parameters(nb):
        key = parameter.name
        others = [f"{profile}: {values[key]!r}" for profile, values in changes.items() if key in values]
        lines += [f"{key}: {parameter.kind} = {parameter.default}"]
        lines += [f"    {text}" for text in (parameter.comment, "; ".join(others)) if text]
    return "\n".join(lines)


def reproduced(rows: list[scorecard.Row]) -> str:
    """One line, such as ``3 of 4 claims are reproduced``."""
    count = sum(bool(result and result.verdict == REPRODUCED) for _, result in rows)
    return f"{count} of {len(rows)} claims are reproduced"


def claims_data(root: Path, rows: list[scorecard.Row], profile: str = "") -> dict[str, Any]:
    """The scorecard as JSON's own types: ``summary`` and ``claims``, one dictionary a claim.

    Each has id, chapter, place in the paper, sentence, quantity, criterion and paper_value; value, low and high (the
    ends of the 95 % interval), n, profile, data, stand_in, hardware and note, None where nothing was measured; verdict;
    link, relative to the built book, to the section that measures it; and cell, the number In [..] of its cell.

    Args:
        root: the book's folder.
        rows: the claims with their records.
        profile: whose runs in ``runs/`` the records are of; the stored runs if empty.
    """
    return {"summary": reproduced(rows), "claims": [_claim(root, *row, profile) for row in rows]}


def _claim(root: Path, claim: Claim, result: Record | None, profile: str) -> dict[str, Any]:
    measured = ("value", "low", "high", "n", "profile", "stand_in", "note")
    if profile:
        folder = root / "runs" / claim.chapter / profile
        card, notebook = folder / "card.json", folder / "notebook.ipynb"
    else:
        card = root / "book" / "results" / f"{claim.chapter}.card.json"
        notebook = root / "book" / f"{claim.chapter}.ipynb"
    section, cell = measured_in(notebook, claim.id)
    return {
        **{key: getattr(claim, key) for key in ("id", "chapter", "place", "sentence", "quantity", "criterion")},
        "paper_value": claim.paper_value or None,
        **{key: getattr(result, key, None) for key in measured},
        "data": result.description if result else None,
        "hardware": json.loads(card.read_text("utf8"))["device"] if result and card.exists() else None,
        "verdict": result.verdict if result else NOT_EVALUATED,
        "link": f"{claim.chapter}.html{section}",
        "cell": cell,
    }


def measured_in(notebook: Path, claim_id: str) -> tuple[str, int | None]:
    """The anchor of the section whose cell stored a claim, and that cell's number; or empty and None."""
    from docutils.nodes import make_id

    anchor = ""
    for cell in json.loads(notebook.read_text("utf8"))["cells"] if notebook.exists() else []:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            heads = [line.lstrip("#").strip() for line in source.splitlines() if line.startswith(("## ", "### "))]
            anchor = f"#{make_id(heads[-1])}" if heads else anchor
        names = [output.get("metadata", {}).get("scrapbook", {}).get("name") for output in cell.get("outputs", [])]
        if claim_id in names:
            return anchor, cell["execution_count"]
    return "", None


def _title(nb: Any) -> str:
    lines = [line for cell in nb.cells if cell.cell_type == "markdown" for line in cell.source.splitlines()]
    return next((line[2:].strip() for line in lines if line.startswith("# ")), "")
