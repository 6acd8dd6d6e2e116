"""The claims of the whole book: gathered from the stored notebooks, checked, and shown as a table."""

import base64
import html
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ntkbook.publish.claims import Bundle, badge, collect, glued, outputs, registry, row_html
from ntkbook.publish.verdicts import NOT_EVALUATED, Claim, Record, judge

README_TABLE = re.compile(r"<!-- claims:.*?-->\n(.*?)<!-- /claims -->", re.DOTALL)

Row = tuple[Claim, Record | None]


def gather(book: str | Path, claims: tuple[Claim, ...] | None = None) -> list[Row]:
    """Every claim of the registry with its record in the stored notebook of its chapter, None where there is none.

    Args:
        book: the folder with the stored notebooks.
        claims: another registry than the book's.
    """
    known = registry(claims)
    stored = {
        name: collect(path)
        for name in dict.fromkeys(claim.chapter for claim in known.values())
        if (path := Path(book) / f"{name}.ipynb").exists()
    }
    return [(claim, stored.get(claim.chapter, {}).get(claim.id)) for claim in known.values()]


def gather_runs(runs: str | Path, profile: str, claims: tuple[Claim, ...] | None = None) -> dict[str, Record]:
    """The records of one profile's runs, by claim id; chapters that have not been run are left out."""
    chapters = dict.fromkeys(claim.chapter for claim in registry(claims).values())
    files = [Path(runs) / name / profile / "claims.json" for name in chapters]
    return {k: Record(**v) for f in files if f.exists() for k, v in json.loads(f.read_text("utf8")).items()}


def summary(rows: Sequence[Row]) -> str:
    """How many claims got which verdict, such as ``2 reproduced, 1 not evaluated``."""
    counts = Counter(result.verdict if result else NOT_EVALUATED for _, result in rows)
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()) or "no claims"


def as_markdown(rows: Sequence[Row]) -> str:
    """The table that the README carries."""
    lines = ["| claim | paper | here (95 % interval) | verdict |", "|---|---|---|---|"]
    for claim, result in rows:
        here = f"{claim.quantity}: {_here(result)}"
        verdict = result.verdict if result else NOT_EVALUATED
        cells = (f"{claim.sentence} ({claim.place})", claim.paper_value or "no number", here, verdict)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def write_readme(path: Path, rows: Sequence[Row]) -> None:
    """Put the table between the README's markers, and its picture into the book; ValueError when it has no markers."""
    text = path.read_text("utf8")
    found = README_TABLE.search(text)
    if not found:
        raise ValueError(f"{path}: expected <!-- claims: ... --> and <!-- /claims -->, found none")
    path.write_text(f"{text[: found.start(1)]}{as_markdown(rows)}\n{text[found.end(1) :]}", "utf8")
    book = path.parent / "book"
    (book / "_static" / "readme.svg").write_text(readme_picture(book / "02_sinusoids.ipynb"), "utf8")


def readme_picture(notebook: Path) -> str:
    """The README's picture as SVG: what stands beside the first interactive figure of a stored chapter."""
    for output in outputs(notebook):
        page = output["data"].get("text/html", "")
        found = re.search(r"data:image/svg\+xml;base64,([^\"]+)", page if isinstance(page, str) else "".join(page))
        if found:
            return base64.b64decode(found.group(1)).decode("utf8")
    raise ValueError(f"{notebook}: expected an interactive figure, found none")


def as_text(rows: Sequence[Row], quick: Mapping[str, Record] | None = None) -> str:
    """The scorecard for a terminal: stored values and verdicts, and beside them this run's values without a verdict."""
    lines = []
    for claim, result in rows:
        lines.append(f"{result.verdict if result else NOT_EVALUATED:>14}  {claim.sentence}")
        lines.append(f"{'':>14}  {claim.quantity} (criterion {claim.criterion}): {_here(result)}")
        if quick and claim.id in quick:
            lines.append(f"{'':>14}  this quick run, no verdict: {quick[claim.id].text}, {quick[claim.id].description}")
    return "\n".join([*lines, f"Stored: {summary(rows)}."])


def as_html(rows: Sequence[Row], quick: Mapping[str, Record] | None = None, *, short: bool = False) -> str:
    """The scorecard page's table, or the landing page's with ``short``; sentences link to their chapters."""
    if not rows:
        return "<p>No claims yet.</p>"
    table = [_cells(claim, result, quick, short) for claim, result in rows]
    head = "".join(f"<th>{name}</th>" for name in table[0])
    body = ["".join(f'<td data-label="{name}">{text}</td>' for name, text in cells.items()) for cells in table]
    lines = "".join(f"<tr>{line}</tr>" for line in body)
    return f'<table class="claims"><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>'


def _cells(claim: Claim, result: Record | None, quick: Mapping[str, Record] | None, short: bool) -> dict[str, str]:
    measured = html.escape(claim.quantity)
    link = f'<a href="{claim.chapter}.html" title="{measured}">{html.escape(claim.sentence)}</a>'
    cells = {"claim": link if short else f"{link} <small>{html.escape(claim.place)}</small>"}
    if not short:
        cells |= {"measured": measured, "paper": html.escape(claim.paper_value or "no number")}
    cells |= {"criterion": html.escape(claim.criterion), "here (95 % interval)": _here(result)}
    if not short:
        cells["data"] = html.escape(result.description) if result else ""
    if quick is not None:
        cells["this quick run"] = quick[claim.id].text if claim.id in quick else "not run"
    return {**cells, "verdict": badge(result.verdict if result else NOT_EVALUATED)}


def show(root: str | Path, profile: str, claims: tuple[Claim, ...] | None = None) -> None:
    """Show and store the scorecard in its notebook: glued as ``scorecard-short`` and ``scorecard-summary``.

    The quick profile also shows the values of this quick run, without verdicts.
    """
    from IPython.display import display
    from myst_nb import glue

    rows = gather(Path(root) / "book", claims)
    quick = gather_runs(Path(root) / "runs", "quick", claims) if profile == "quick" else None
    glue("scorecard-short", Bundle({"text/html": as_html(rows, quick, short=True)}), display=False)
    glue("scorecard-summary", summary(rows), display=False)
    display({"text/html": as_html(rows, quick), "text/plain": as_text(rows, quick)}, raw=True)


def check(notebook: str | Path | Mapping[str, Any], claims: tuple[Claim, ...] | None = None) -> list[str]:
    """What is wrong with the claims stored in a notebook; an empty list when nothing is.

    Every stored claim is judged again from its stored numbers by the registry's criterion, and what the page shows of
    it must be what those numbers give.
    """
    known, problems, stored = registry(claims), [], glued(notebook)
    shown = [text for output in outputs(notebook) if (text := output["data"].get("text/html"))]
    for name, result in collect(notebook).items():
        if name not in known or result.claim != name:
            problems.append(f"{name}: the registry has no such claim")
            continue
        claim = known[name]
        if result.criterion != claim.criterion:
            problems.append(f"{name}: judged by {result.criterion!r}, the registry says {claim.criterion!r}")
        again = judge(claim, result.value, result.low, result.high, profile=result.profile, stand_in=result.stand_in)
        if again != result.verdict:
            problems.append(f"{name}: stored verdict {result.verdict!r}, its numbers {result.text} give {again!r}")
        if stored.get(name, {}).get("text/plain") != repr(result.text):
            problems.append(f"{name}: the prose quotes {stored.get(name)}, the stored numbers are {result.text}")
        if stored.get(f"{name}-verdict", {}).get("text/plain") != repr(result.verdict):
            problems.append(f"{name}: the prose quotes another verdict than {result.verdict!r}")
        if row_html(claim, result) not in ["".join(text) for text in shown]:
            problems.append(f"{name}: the row shown is not the one its stored numbers give")
    return problems


def _here(result: Record | None) -> str:
    return result.text if result else "not measured"
