"""From a chapter's text to a notebook, and from an executed notebook to one that can be stored."""

import hashlib
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbformat import NotebookNode

from ntkbook.publish.files import write_text

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
KEPT_CELL_METADATA = ("tags", "mystnb", "nbsphinx", "slideshow", "jupyter")


def from_text(source: str | Path) -> NotebookNode:
    """The notebook of a chapter's MyST text, without outputs.

    Cell ids come from position and text, so that making it again changes no byte.

    Raises:
        ValueError: the file has no code cell tagged ``parameters``.
    """
    source = Path(source)
    nb = jupytext.reads(source.read_text("utf8"), fmt="md:myst")
    if not any("parameters" in cell.metadata.get("tags", []) for cell in nb.cells if cell.cell_type == "code"):
        raise ValueError(
            f"{source.name}: expected a code cell tagged 'parameters', found none; add ':tags: [parameters]'"
        )
    return strip(nb)


def strip(nb: NotebookNode) -> NotebookNode:
    """A copy without anything that a second execution would change: times, papermill's marks, random ids, versions.

    Warnings and progress bars on standard error are left out too.
    """
    kept = {key: nb.metadata[key] for key in ("ntkbook",) if key in nb.metadata}
    cells = [_strip_cell(position, cell) for position, cell in enumerate(nb.cells)]
    metadata = {**kept, "kernelspec": KERNEL, "language_info": {"name": "python", "pygments_lexer": "ipython3"}}
    return NotebookNode(nbformat.from_dict({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}))


def sources(nb: NotebookNode) -> list[str]:
    """The sources of a chapter's code cells, without those of parameters that papermill injected."""
    cells = (cell for cell in nb.cells if cell.cell_type == "code")
    return [cell.source for cell in cells if "injected-parameters" not in cell.metadata.get("tags", [])]


def with_outputs(bare: NotebookNode, executed: NotebookNode) -> NotebookNode:
    """A chapter's present text and cells' options with the outputs of a run of the same code.

    So rewording needs no new run, nor do the figures' alternative texts, which are options
    (``mystnb: {image: {alt: …}}``). The cell of parameters that papermill injected is kept after the chapter's own.

    Raises:
        ValueError: the run is of other code, so that its outputs would stand under cells that did not make them.
    """
    if sources(bare) != sources(executed):
        raise ValueError("the chapter has other code than the run; run it again")
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    cells = []
    for cell in bare.cells:
        if cell.cell_type == "code":
            cells.append(NotebookNode({**code.pop(0), "metadata": cell.metadata}))
            if code and "injected-parameters" in code[0].metadata.get("tags", []):
                cells.append(code.pop(0))
        else:
            cells.append(cell)
    return strip(NotebookNode({**bare, "cells": cells}))


def is_summary(nb: NotebookNode) -> bool:
    """Whether a chapter sums the others up, as ``ntkbook: {summary: true}`` in its front matter says."""
    return bool(nb.metadata.get("ntkbook", {}).get("summary"))


def title(nb: NotebookNode) -> str:
    """A chapter's title; empty where it has none."""
    lines = [line for cell in nb.cells if cell.cell_type == "markdown" for line in cell.source.splitlines()]
    return next((line[2:].strip() for line in lines if line.startswith("# ")), "")


def read(path: str | Path) -> NotebookNode:
    """A notebook from a file."""
    return nbformat.read(path, as_version=4)  # pyright: ignore[reportReturnType]


def write(nb: NotebookNode, path: str | Path) -> None:
    """Write a notebook as nbformat does, with a final newline, making its folder."""
    write_text(Path(path), nbformat.writes(nb).rstrip("\n") + "\n")


def _strip_cell(position: int, cell: NotebookNode) -> dict[str, Any]:
    digest = hashlib.sha256(f"{position}:{cell.cell_type}:{cell.source}".encode()).hexdigest()
    metadata = {key: cell.metadata[key] for key in KEPT_CELL_METADATA if cell.metadata.get(key)}
    clean: dict[str, Any] = {"cell_type": cell.cell_type, "id": digest[:8], "metadata": metadata, "source": cell.source}
    if cell.cell_type == "code":
        clean["execution_count"] = cell.execution_count
        clean["outputs"] = [o for o in cell.outputs if not (o.output_type == "stream" and o.name == "stderr")]
    return clean
