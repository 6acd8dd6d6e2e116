"""The paper's claims, what a chapter measured for each, and the verdict.

A criterion stands in `criteria` before anything is measured. A chapter calls :func:`record` once a claim, which makes
the verdict by one rule, shows it, and stores it in the executed notebook, whence prose quotes it
(``{glue:text}`claim-id` ``, ``{glue:text}`claim-id-verdict` ``) and :func:`collect` reads it back.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ntkbook.publish.criteria import CLAIMS
from ntkbook.publish.rendering import row_html
from ntkbook.publish.verdicts import Claim, Record, make_record

MIME_PREFIX = "application/papermill.record/"  # what myst_nb puts before the type of a glued output that is hidden


def registry(claims: tuple[Claim, ...] | None = None) -> dict[str, Claim]:
    """The claims by id, in order; ValueError when two share an id."""
    claims = CLAIMS if claims is None else claims
    by_id = {claim.id: claim for claim in claims}
    if len(by_id) != len(claims):
        raise ValueError("two claims share an id; give each its own")
    return by_id


def record(
    claim_id: str,
    value: float | None,
    low: float | None,
    high: float | None,
    provenance: Any,
    profile: str,
    n: int,
    note: str = "",
) -> None:
    """Judge a claim in a notebook: show one row, and store it under the claim's id.

    It is glued as ``<id>`` (value and interval), ``<id>-verdict`` and ``<id>-record`` (all of it). Nothing is returned:
    a cell would show it too.

    Args:
        claim_id: an id of the registry.
        value: the measured value, None when nothing was measured (say why in the note).
        low: lower end of the 95 % interval over seeds or pairs.
        high: its upper end.
        provenance: where the data came from (``ntkbook.experiments.data.sources.Provenance``).
        profile: the run's profile.
        n: number of seeds, stations or pairs behind the interval.
        note: a short remark shown in the row.

    Raises:
        KeyError: the registry has no such claim.
        ValueError: a value without an interval, or outside it.
    """
    known = registry()
    if claim_id not in known:
        raise KeyError(f"no claim {claim_id!r}; ntkbook/publish/criteria.py has {', '.join(known)}")
    result = make_record(known[claim_id], value, low, high, provenance, profile, n, note)
    _glue(claim_id, result.text)
    _glue(f"{claim_id}-verdict", result.verdict)
    _glue(f"{claim_id}-record", asdict(result))
    plain = f"{claim_id}: {result.text}, {result.verdict}"
    _display({"text/html": row_html(known[claim_id], result), "text/plain": plain})


STAND_INS: set[str] = set()
"""Names of the data of this run that stand in for the paper's."""


def show_data(*provenances: Any) -> None:
    """Say at the top of a chapter which data it uses, and store it for the run's card.

    Figures that are drawn afterwards lose the paper's names where one of the data is a stand-in: `figures.title`.
    """
    for provenance in provenances:
        if provenance.is_stand_in:
            STAND_INS.add(provenance.name)
        _display({"text/markdown": provenance.banner(), "text/plain": provenance.description})
        _glue(f"data-{provenance.name}", asdict(provenance))


def collect(notebook: str | Path | Mapping[str, Any]) -> dict[str, Record]:
    """The records stored in an executed notebook, by claim id, in the order of its cells."""
    return {
        name.removesuffix("-record"): Record(**json.loads(data["text/plain"]))
        for name, data in glued(notebook).items()
        if name.endswith("-record")
    }


def collect_data(notebook: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """The data an executed notebook declared with :func:`show_data`, by name."""
    return {
        name.removeprefix("data-"): json.loads(data["text/plain"])
        for name, data in glued(notebook).items()
        if name.startswith("data-")
    }


def glued(notebook: str | Path | Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Everything glued in an executed notebook: name to {type: content}."""
    return {
        output["metadata"]["scrapbook"]["name"]: {
            kind.removeprefix(MIME_PREFIX): "".join(content) if isinstance(content, list) else content
            for kind, content in output["data"].items()
        }
        for output in outputs(notebook)
        if "scrapbook" in output.get("metadata", {})
    }


def outputs(notebook: str | Path | Mapping[str, Any]) -> list[dict[str, Any]]:
    """The outputs of an executed notebook that carry data, in the order of its cells."""
    nb = notebook if isinstance(notebook, Mapping) else json.loads(Path(notebook).read_text("utf8"))
    return [output for cell in nb["cells"] for output in cell.get("outputs", []) if "data" in output]


class Bundle:
    """Something to display under exactly the types given, such as ``{"text/html": ...}``."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = {"text/plain": "", **data}

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return self.data


def _display(data: dict[str, Any]) -> None:
    from IPython.display import display

    display(data, raw=True)


def _glue(name: str, value: Any) -> None:
    from myst_nb import glue

    # JSON goes as text: nbformat takes an object only under the bare type application/json, not with a prefix.
    stored = value if isinstance(value, str) else Bundle({"text/plain": json.dumps(value, ensure_ascii=False)})
    glue(name, stored, display=False)
