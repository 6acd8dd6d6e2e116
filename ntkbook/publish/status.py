"""A Sphinx extension that tells, of every chapter, what came out and how it was run.

A line under the chapter's title, and the page of execution status, which has all of every run card. Both are made from
the stored notebooks and their cards when the book is built, so that they cannot go stale.
"""

import json
import re
from pathlib import Path
from typing import Any

from docutils import nodes

from ntkbook.publish import notebooks, pages, scorecard
from ntkbook.publish.book import chapters, stored_card_path, stored_path
from ntkbook.publish.citing import linked
from ntkbook.publish.claims import collect
from ntkbook.publish.rendering import anchor as claim_anchor

MARK = "<!-- run cards -->"
"""What stands in the page of execution status where the cards come."""
SCORECARD = "07_scorecard.html"

Card = dict[str, Any]


def read_card(root: Path, chapter: str) -> Card | None:
    """A chapter's run card, None where there is none; ``finished`` is its last commit's day if it has none."""
    path = stored_card_path(root, chapter)
    if not path.exists():
        return None
    card = json.loads(path.read_text("utf8"))
    return {"finished": pages.last_change(root, [path]), **card}


def outcome(notebook: Path) -> str:
    """What came of a notebook's claims, in one line; empty where it has none."""
    records = collect(notebook).values()
    if any(record.profile == "quick" for record in records):
        return f"{len(records)} claims, not evaluated in the quick profile"
    return scorecard.summary(record.verdict for record in records) if records else ""


def how_run(card: Card | None) -> str:
    """How a chapter was run, in one line such as ``run on 2026-11-20, CPU, 2 cores, x86_64, 23 min``."""
    if card is None:
        return "no run card says how this was run"
    if card["status"] != "done":
        return f"the last run {_ended(card)}, this is an earlier one"
    day = [f"on {card['finished'][:10]}"] if card["finished"] else []
    return "run " + ", ".join([*day, card["device"], _time(card["wall_seconds"])])


def cards_page(root: Path, repository: str) -> str:
    """All run cards as Markdown, in the order of the chapters; those of chapters that are not in the book come last.

    Args:
        root: the folder of the book, with ``_toc.yml``.
        repository: its address, for links to commits.
    """
    shown = chapters(root)
    stored = {path.name.removesuffix(".card.json") for path in stored_card_path(root, "*").parent.glob("*.card.json")}
    names = [*shown, *sorted(stored - set(shown))]
    return "\n\n".join(_section(root, name, name in shown, repository) for name in names)


def _section(root: Path, name: str, shown: bool, repository: str) -> str:
    card, notebook = read_card(root, name), stored_path(root, name)
    if card is None:
        told = ["**No run card** says how this chapter was run."]
    elif card["status"] != "done":
        told = [f"**The last run {_ended(card)}.** {'The chapter shows an earlier one.' if shown else ''}"]
    else:
        told = ["Done."]
    if shown:
        told += [f"{came}." for came in [outcome(notebook)] if came] + [f"[Read the chapter]({name}.ipynb)."]
    title = notebooks.title(notebooks.read(notebook)) if shown else f"{name}, which is not in the book"
    fields = _fields(card, repository) if card else []
    return "\n".join([f"({anchor(name)})=", f"## {title}", "", " ".join(told), "", *fields])


def anchor(chapter: str) -> str:
    """Of a chapter's section on the page of execution status."""
    return nodes.make_id(f"run-{chapter}")


def _fields(card: Card, repository: str) -> list[str]:
    commit, _, changes = (card["commit"] or "").partition("+")
    link = f"[`{commit[:10]}`]({repository}/commit/{commit}){', with changes not committed' if changes else ''}"
    others = [f"`{key} = {value!r}`" for key, value in card["parameters"].items() if key != "profile"]
    finished = card["finished"] or "at a time that was not recorded"
    if re.fullmatch(r"[\d-]+", finished):  # the day of a commit
        finished = f"by {finished}, when it was stored"
    fields = {
        "Finished": [finished.replace("T", " ").replace("+00:00", " UTC")],
        "Device": [_plain(card["device"])],
        "Time and memory": [f"{_time(card['wall_seconds'])}, {_memory(card['peak_mib'])}"],
        "Parameters": [f"profile {card['profile']}: {', '.join(others) or 'the defaults'}"],
        "Commit": [link if commit else "not in a git checkout"],
        "Versions": [_plain(", ".join(f"{name} {number}" for name, number in card["versions"].items()))],
        "Data": [_data(used) for used in card["data"].values()] or ["none of its own"],
    }
    if card["error"]:
        fields["Error"] = [_plain(card["error"].strip().splitlines()[-1])]
    return [line for name, told in fields.items() for line in (name, *(f": {text}" for text in told), "")]


def _data(used: dict[str, Any]) -> str:
    """One data set with its licence and citation, as Markdown."""
    stand_in = used.get("source", "real") != "real"
    parts = [
        f"**{_plain(used['name'])}**{' (a stand-in)' if stand_in else ''}: {_plain(used['description'].rstrip('.'))}",
        f"{used['files']} files, sha256 `{used['sha256'][:12]}…`" if used.get("files") else "",
        f"Licence: {_plain(used['licence'])}" if used.get("licence") else "",
        linked(_plain(used.get("citation", ""))),
        f"[Source]({used['url']})" if used.get("url") else "",
    ]
    return ". ".join(filter(None, parts)) + "."


def _ended(card: Card) -> str:
    return {"failed": "failed", "interrupted": "was interrupted"}[card["status"]]


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _memory(mib: int | None) -> str:
    if mib is None:
        return "peak of memory not measured"
    return f"{mib:.0f} MiB of memory at most" if mib < 1000 else f"{mib / 1024:.1f} GiB of memory at most"


def _plain(text: str) -> str:
    """Text that means itself in Markdown."""
    return re.sub(r"([\\`*_\[\]<>|$#{}])", r"\\\1", text)


def _fill(app: Any, docname: str, source: list[str]) -> None:
    if MARK in source[0]:
        cards = cards_page(Path(app.srcdir), app.config.html_theme_options["repository_url"])
        source[0] = source[0].replace(MARK, cards)


def _head(app: Any, doctree: nodes.document) -> None:
    """Under a chapter's title, what came out and how it was run."""
    notebook = Path(app.env.doc2path(app.env.docname))
    if notebook.suffix != ".ipynb" or notebooks.is_summary(notebooks.read(notebook)):
        return
    line = nodes.paragraph(classes=["outcome"])
    if told := outcome(notebook):
        first = claim_anchor(next(iter(collect(notebook))))
        line += [_link(told, f"#{first}"), nodes.Text(" ("), _link("scorecard", SCORECARD)]
        line += nodes.Text(") · ")
    line += _link(how_run(read_card(notebook.parents[1], notebook.stem)), f"status.html#{anchor(notebook.stem)}")
    title = next(iter(doctree.findall(nodes.title)))
    title.parent.insert(title.parent.index(title) + 1, line)


def _link(text: str, address: str) -> nodes.reference:
    return nodes.reference("", text, internal=True, refuri=address)


def setup(app: Any) -> dict[str, bool]:
    """Sphinx's entry point."""
    app.connect("source-read", _fill)
    app.connect("doctree-read", _head)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
