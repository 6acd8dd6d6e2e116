"""Claims as HTML: the row that a chapter shows of each, and the scorecard's tables of all.

An entry is what `scorecard.entries` makes of a claim. The looks are in ``book/_static/book.css``.
"""

import html
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ntkbook.publish.verdicts import ORDER, Claim, Record, inconclusive

SORTABLE = ("verdict", "claim", "place", "chapter")


def badge(verdict: str) -> str:
    """A verdict as HTML, coloured by the book's style sheet."""
    return f'<span class="verdict verdict-{verdict.replace(" ", "-")}">{verdict}</span>'


def anchor(claim_id: str) -> str:
    """The id, in a chapter's page, of the row that :func:`record` shows of a claim."""
    return f"claim-{claim_id}"


def row_html(claim: Claim, result: Record) -> str:
    """The row that :func:`record` shows."""
    paper = claim.paper_value or "no number"
    cells = {
        "verdict": verdict_html(result.verdict, result.note, inconclusive(claim, result)),
        "claim": html.escape(claim.sentence) + small(claim.place),
        "measured": html.escape(claim.quantity) + small(f"criterion {claim.criterion}"),
        "here (95 % interval)": value_html(result.text)
        + small(f"paper: {paper}")
        + small(f"n = {result.n}, profile {result.profile}; {result.description}"),
    }
    table = f'<table class="claims" id="{anchor(claim.id)}">'
    return f"{table}{head_html(cells)}<tbody>{body_row_html(cells)}</tbody></table>"


def head_html(names: Iterable[str], attributes: Mapping[str, str] | None = None) -> str:
    """The head of a table of claims; attributes by column."""
    heads = [f'<th scope="col"{(attributes or {}).get(name, "")}>{name}</th>' for name in names]
    return f"<thead><tr>{''.join(heads)}</tr></thead>"


def body_row_html(cells: Mapping[str, str], attributes: Mapping[str, str] | None = None) -> str:
    """One row of a table of claims, HTML by column; on a phone, where a row is a card, columns are named in it."""
    line = [f'<td data-label="{name}"{(attributes or {}).get(name, "")}>{text}</td>' for name, text in cells.items()]
    return f"<tr>{''.join(line)}</tr>"


def verdict_html(verdict: str, note: str | None, is_inconclusive: bool) -> str:
    """A verdict with what there is to say of it."""
    reach = small("inconclusive: the interval reaches the criterion") if is_inconclusive else ""
    return badge(verdict) + reach + small(note or "")


def value_html(text: str) -> str:
    """A value with its interval, which does not break over lines."""
    return f'<span class="value">{text}</span>'


def small(text: str) -> str:
    """A line of small print below a cell's text; nothing for an empty one."""
    return f" <small>{html.escape(text)}</small>" if text else ""


def as_html(found: Sequence[Mapping[str, Any]], quick: Mapping[str, Record] | None = None) -> str:
    """The scorecard page's table: sentences link to the rows that their chapters show, ``sortable.js`` sorts it."""
    if not found:
        return "<p>No claims yet.</p>"
    table = [_cells(entry, quick) for entry in found]
    head = head_html(table[0], dict.fromkeys(SORTABLE, " data-sortable"))
    ranks = [list(ORDER).index(entry["verdict"]) for entry in found]
    body = "".join(body_row_html(cells, {"verdict": f' data-sort="{rank}"'}) for cells, rank in zip(table, ranks))
    return f'<table class="claims sortable">{head}<tbody>{body}</tbody></table>'


def _cells(entry: Mapping[str, Any], quick: Mapping[str, Record] | None) -> dict[str, str]:
    told = {key: html.escape(str(entry[key] or "")) for key in entry}
    cells = {
        "verdict": verdict_html(entry["verdict"], entry["note"], entry["inconclusive"]),
        "claim": f'<a href="{told["link"]}">{told["sentence"]}</a>',
        "place": told["place"],
        "chapter": entry["chapter"].partition("_")[0].lstrip("0"),
        "measured": told["quantity"] + small(f"criterion {entry['criterion']}"),
        "here (95 % interval)": value_html(told["text"])
        + small(f"paper: {entry['paper_value']}" if entry["paper_value"] else ""),
    }
    if quick is not None:
        cells["this quick run"] = quick[entry["id"]].text if entry["id"] in quick else "not run"
    return {**cells, "data": told["data"] + small(entry["hardware"] or "")}


def tally_html(found: Sequence[Mapping[str, Any]]) -> str:
    """How many claims have which verdict, as a bar and in words."""
    counts = Counter(entry["verdict"] for entry in found)
    parts = {verdict: counts[verdict] for verdict in ORDER if counts[verdict]}
    bar = [
        f'<span class="tally-{verdict.replace(" ", "-")}" style="flex-grow:{n}"></span>' for verdict, n in parts.items()
    ]
    words = ", ".join(f"{n} {badge(verdict)}" for verdict, n in parts.items())
    return f'<span class="tally" aria-hidden="true">{"".join(bar)}</span>{words}'


def overview_html(root: Path, found: Sequence[Mapping[str, Any]]) -> str:
    """The chapters with how many of their claims have which verdict."""
    from ntkbook.publish import notebooks
    from ntkbook.publish.book import bare_notebook

    rows = "".join(
        f'<tr><th scope="row"><a href="{chapter}.html">{html.escape(title)}</a></th><td>{tally_html(own)}</td></tr>'
        for chapter, own in by_chapter(found).items()
        for title in [notebooks.title(bare_notebook(root, chapter))]
    )
    return f'<table class="overview"><tbody>{rows}</tbody></table>'


def by_chapter(found: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The claims of each chapter."""
    chapters = dict.fromkeys(entry["chapter"] for entry in found)
    return {chapter: [entry for entry in found if entry["chapter"] == chapter] for chapter in chapters}
