"""What changed between two runs of a chapter: parameters, versions, data, claims and times."""

import ast
import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ntkbook.publish.book import runs_path, select, stored_card_path, stored_path
from ntkbook.publish.claims import collect
from ntkbook.publish.listing import columns
from ntkbook.publish.parameters import parameters
from ntkbook.publish.verdicts import Record

STORED = "stored"
CLAIM = ("value", "low", "high", "n", "criterion", "verdict", "data")


@dataclass(frozen=True)
class Run:
    """A run as it is on disk: what to call it, its card, all its parameters, and its claims by id."""

    label: str
    card: dict[str, Any]
    parameters: dict[str, Any]
    claims: dict[str, Record]


def find(root: Path, wanted: str, chapter: str = "") -> Run:
    """A run by its folder, or as ``CHAPTER/NAME`` such as ``03/quick``, with the names of folders in ``runs/``.

    ``stored`` is the run that the book shows. Without a chapter, such as ``quick``, that of ``chapter``.

    Raises:
        ValueError: no such chapter.
        FileNotFoundError: no such run; the message names those that there are.
    """
    folder = Path(wanted)
    if not (folder / "card.json").exists():
        first, _, name = wanted.strip("/").partition("/")
        first, name = (first, name) if name or not chapter else (chapter, first)
        (chapter,) = select(root, [first])
        if name == STORED:
            card, notebook = stored_card_path(root, chapter), stored_path(root, chapter)
            if not card.exists() or not notebook.exists():
                raise FileNotFoundError(
                    f"{chapter} is not stored: expected {notebook} and {card}; run `ntkbook store {chapter}`"
                )
            return _read(wanted, card, notebook, collect(notebook))
        folder = runs_path(root, chapter) / name
        if not name or not (folder / "card.json").exists():
            there = sorted(p.parent.relative_to(folder.parent) for p in runs_path(root, chapter).rglob("card.json"))
            names = ", ".join(f"{chapter}/{path}" for path in [*there, STORED])
            raise FileNotFoundError(f"no run {wanted!r}; there are {names}, and any folder with a card.json")
    claims = folder / "claims.json"  # not there where not even the kernel started
    found = json.loads(claims.read_text("utf8")) if claims.exists() else {}
    records = {name: Record(**record) for name, record in found.items()}
    return _read(wanted, folder / "card.json", folder / "notebook.ipynb", records)


def compare(one: Run, two: Run) -> dict[str, Any]:
    """What differs between two runs, each time as [of the first, of the second]; None for what one of them lacks.

    Returns:
        ``runs`` (what they are called), ``chapter``; ``run`` (status, profile, device, commit), ``parameters`` (those
        that neither profile nor user set are compared by their defaults), ``versions``, ``data`` (sha256, or the
        description of data without files) and ``claims`` (by id), of which only what differs; ``times``: wall_seconds
        and peak_mib, always.

    Raises:
        ValueError: the runs are of different chapters.
    """
    a, b = one.card, two.card
    if a["chapter"] != b["chapter"]:
        raise ValueError(f"expected two runs of one chapter, got {a['chapter']} and {b['chapter']}")
    facts = ("status", "profile", "device", "commit")
    data = [{name: used.get("sha256") or used["description"] for name, used in card["data"].items()} for card in (a, b)]
    claims = [{k: {key: getattr(v, key) for key in CLAIM} for k, v in run.claims.items()} for run in (one, two)]
    return {
        "runs": [one.label, two.label],
        "chapter": a["chapter"],
        "run": _changed(*({key: card[key] for key in facts} for card in (a, b))),
        "parameters": _changed(one.parameters, two.parameters),
        "versions": _changed(a["versions"], b["versions"]),
        "data": _changed(*data),
        "claims": _changed(*claims),
        "times": {key: [a[key], b[key]] for key in ("wall_seconds", "peak_mib")},
    }


def as_text(one: Run, two: Run) -> str:
    """`compare` as a table for a terminal; claims that differ only in digits that are not shown are left out of it."""
    found = compare(one, two)
    lines = [f"{found['chapter']}: what differs between {one.label} and {two.label}"]
    rows = [["", one.label, two.label]]
    for section in ("run", "parameters", "versions", "data", "times"):
        rows += [[f"{section} {name}", *map(_short, pair)] for name, pair in found[section].items()]
    shown = {name: [_claim(run.claims.get(name)) for run in (one, two)] for name in {**one.claims, **two.claims}}
    rows += [[name, *pair] for name, pair in shown.items() if pair[0] != pair[1]]
    same = sum(pair[0] == pair[1] for pair in shown.values())
    close = sum(shown[name][0] == shown[name][1] for name in found["claims"])
    lines += [columns(rows), f"{same} of {len(shown)} claims are the same" + _close(close)]
    return "\n".join(lines)


def _read(label: str, card: Path, notebook: Path, claims: dict[str, Record]) -> Run:
    from ntkbook.publish import notebooks

    facts, defaults = json.loads(card.read_text("utf8")), {}
    if notebook.exists():
        for parameter in parameters(notebooks.read(notebook)):
            defaults[parameter.name] = parameter.default
            with contextlib.suppress(ValueError, SyntaxError):  # an expression stays as it is written
                defaults[parameter.name] = ast.literal_eval(parameter.default)
    return Run(label, facts, {**defaults, **facts["parameters"]}, claims)


def _changed(one: dict[str, Any], two: dict[str, Any]) -> dict[str, list[Any]]:
    pairs = {name: [one.get(name), two.get(name)] for name in {**one, **two}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _claim(record: Record | None) -> str:
    return f"{record.text}, {record.verdict}" if record else "not there"


def _close(count: int) -> str:
    return f", {count} of them but for digits that are not shown (--json has them)" if count else ""


def _short(value: Any) -> str:
    text = "-" if value is None else re.sub(r"\b([0-9a-f]{12})[0-9a-f]{28,}", r"\1", str(value))  # commits, hashes
    return text if len(text) <= 40 else f"{text[:39]}…"
