"""The claims of the whole book: gathered from the stored notebooks, checked, and shown as a table."""

import base64
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ntkbook.publish.book import runs_path, stored_card_path, stored_path
from ntkbook.publish.claims import Bundle, collect, glued, outputs, registry
from ntkbook.publish.rendering import anchor, as_html, by_chapter, overview_html, row_html, tally_html
from ntkbook.publish.verdicts import (
    NOT_EVALUATED,
    NOT_REPRODUCED,
    ORDER,
    REPRODUCED,
    Claim,
    Record,
    inconclusive,
    judge,
)

README_TABLE = re.compile(r"<!-- claims:.*?-->\n(.*?)<!-- /claims -->", re.DOTALL)

Entry = dict[str, Any]


def entries(root: str | Path, profile: str = "", claims: tuple[Claim, ...] | None = None) -> list[Entry]:
    """Every claim of the registry with what was measured for it, in JSON's own types.

    Each has id, chapter, place in the paper, sentence, quantity, criterion and paper_value; value, low and high (the
    ends of the 95 % interval), n, profile, data, stand_in, hardware and note, None where nothing was measured; run, how
    the run ended, None for a stored one; text, the value as it is shown, with how the run ended unless well; verdict,
    by the present criterion whatever that of the run was; inconclusive, whether a part of the interval of what is not
    reproduced meets the criterion; link, relative to the built chapters, to the row that shows it; and cell, the number
    In [..] of the cell that measures it.

    Args:
        root: the book's folder.
        profile: of the runs in ``runs/`` with this profile; of the stored notebooks if empty.
        claims: another registry than the book's.

    Raises:
        ValueError: there is no run with this profile at all.
    """
    known = registry(claims)
    if profile and not list(Path(root, "runs").glob(f"*/{profile}/card.json")):
        there = sorted({path.parent.name for path in Path(root, "runs").glob("*/*/card.json")})
        raise ValueError(
            f"no run with profile {profile!r}; runs/ has {', '.join(there) or 'none'}; `ntkbook run` makes more"
        )
    runs = {name: _run(Path(root), name, profile) for name in dict.fromkeys(claim.chapter for claim in known.values())}
    return [_entry(claim, *runs[claim.chapter]) for claim in known.values()]


def _run(root: Path, chapter: str, profile: str) -> tuple[dict[str, Record], dict[str, Any], dict[str, int]]:
    """A run's records, how it ended and on what, and the numbers of the cells that made them."""
    folder = runs_path(root, chapter) / profile
    if profile:
        card, notebook, records = folder / "card.json", folder / "notebook.ipynb", _records(folder / "claims.json")
    else:
        card, notebook = stored_card_path(root, chapter), stored_path(root, chapter)
        records = collect(notebook) if notebook.exists() else {}
    facts = json.loads(card.read_text("utf8")) if card.exists() else {}
    run = {"status": facts.get("status") if profile else None, "device": facts.get("device")}
    return records, run, _cell_numbers(notebook) if notebook.exists() else {}


def _entry(claim: Claim, records: dict[str, Record], run: dict[str, Any], cells: dict[str, int]) -> dict[str, Any]:
    result = records.get(claim.id)
    if result:  # judged again, as the criterion may have changed since the run
        facts = {"profile": result.profile, "stand_in": result.stand_in}
        result = replace(result, verdict=judge(claim, result.value, result.low, result.high, **facts))
    ended = "" if run["status"] in (None, "done") else f" (the run: {run['status']})"
    measured = ("value", "low", "high", "n", "profile", "stand_in", "note")
    return {
        **{key: getattr(claim, key) for key in ("id", "chapter", "place", "sentence", "quantity", "criterion")},
        "paper_value": claim.paper_value or None,
        **{key: getattr(result, key, None) for key in measured},
        "run": run["status"],
        "text": (result.text if result else "not measured") + ended,
        "data": result.description if result and result.value is not None else None,
        "hardware": run["device"] if result and result.value is not None else None,
        "verdict": result.verdict if result else NOT_EVALUATED,
        "inconclusive": bool(result and inconclusive(claim, result)),
        "link": f"{claim.chapter}.html" + (f"#{anchor(claim.id)}" if result else ""),
        "cell": cells.get(claim.id),
    }


def _cell_numbers(notebook: Path) -> dict[str, int]:
    """For all that a notebook has stored by name, the number of its cell."""
    return {
        output["metadata"]["scrapbook"]["name"]: cell["execution_count"]
        for cell in json.loads(notebook.read_text("utf8"))["cells"]
        for output in cell.get("outputs", [])
        if "scrapbook" in output.get("metadata", {})
    }


def gather_runs(runs: str | Path, profile: str, claims: tuple[Claim, ...] | None = None) -> dict[str, Record]:
    """The records of one profile's runs, by claim id; chapters that have not been run are left out."""
    chapters = dict.fromkeys(claim.chapter for claim in registry(claims).values())
    return {k: v for name in chapters for k, v in _records(Path(runs) / name / profile / "claims.json").items()}


def _records(file: Path) -> dict[str, Record]:
    return {k: Record(**v) for k, v in json.loads(file.read_text("utf8")).items()} if file.exists() else {}


def summary(verdicts: Iterable[str]) -> str:
    """What came out, in one line such as ``3 of 6 claims are reproduced, 1 partly, 2 not``."""
    counts = Counter(verdicts)
    others = [
        f", {counts[verdict]} {word}" for verdict, word in ORDER.items() if verdict != REPRODUCED and counts[verdict]
    ]
    return f"{counts[REPRODUCED]} of {counts.total()} claims are reproduced{''.join(others)}"


def _summary(found: Sequence[Entry]) -> str:
    return summary(entry["verdict"] for entry in found)


def as_markdown(found: Sequence[Entry]) -> str:
    """What the README carries: a summary, and under it the table of all claims, folded."""
    lines = [f"**{_summary(found)}.**", "", "<details><summary>All claims</summary>", ""]
    lines += ["| claim | paper | here (95 % interval) | verdict |", "|---|---|---|---|"]
    for entry in found:
        here = f"{entry['quantity']}: {entry['text']}"
        cells = (f"{entry['sentence']} ({entry['place']})", entry["paper_value"] or "no number", here, entry["verdict"])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, "", "</details>"])


def write_readme(path: Path, claims: Sequence[Entry]) -> None:
    """Put the claims between the README's markers, and its picture into the book; ValueError when it has no markers."""
    text = path.read_text("utf8")
    found = README_TABLE.search(text)
    if not found:
        raise ValueError(f"{path}: expected <!-- claims: ... --> and <!-- /claims -->, found none")
    path.write_text(f"{text[: found.start(1)]}{as_markdown(claims)}\n{text[found.end(1) :]}", "utf8")
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


def as_text(found: Sequence[Entry], quick: Mapping[str, Record] | None = None) -> str:
    """The scorecard for a terminal: stored values and verdicts, and beside them this run's values without a verdict."""
    lines = []
    for entry in found:
        paper = f"; paper: {entry['paper_value']}" if entry["paper_value"] else ""
        origin = (entry["data"], entry["hardware"], entry["link"], entry["note"])
        lines += [
            f"{entry['verdict']:>14}  {entry['sentence']} ({entry['place']})",
            f"{'':>14}  {entry['quantity']} (criterion {entry['criterion']}): {entry['text']}{paper}",
            f"{'':>14}  {'; '.join(filter(None, origin))}",
        ]
        if quick and entry["id"] in quick:
            here = quick[entry["id"]]
            lines.append(f"{'':>14}  this quick run, no verdict: {here.text}, {here.description}")
    return "\n".join([*lines, f"{_summary(found)}."])


def show(root: str | Path, profile: str, claims: tuple[Claim, ...] | None = None) -> None:
    """Show and store the scorecard in its notebook.

    Glued are ``scorecard-summary``, one line; ``scorecard-overview``, `overview_html`; for every chapter
    ``scorecard-<chapter>``, `tally_html`; and ``scorecard-inconclusive`` and ``scorecard-implied``, how many of the
    claims not reproduced are so, and how many of them are our reading of what the paper shows. The quick profile also
    shows the values of this quick run, without verdicts.
    """
    from IPython.display import display
    from myst_nb import glue

    found = entries(root, claims=claims)
    quick = gather_runs(Path(root) / "runs", "quick", claims) if profile == "quick" else None
    missed = [entry for entry in found if entry["verdict"] == NOT_REPRODUCED]
    glue("scorecard-summary", _summary(found), display=False)
    glue("scorecard-inconclusive", str(sum(entry["inconclusive"] for entry in missed)), display=False)
    glue("scorecard-implied", str(sum(entry["place"].startswith("implied by") for entry in missed)), display=False)
    glue("scorecard-overview", Bundle({"text/html": overview_html(Path(root), found)}), display=False)
    for chapter, own in by_chapter(found).items():
        glue(f"scorecard-{chapter}", Bundle({"text/html": tally_html(own)}), display=False)
    display({"text/html": as_html(found, quick), "text/plain": as_text(found, quick)}, raw=True)


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
