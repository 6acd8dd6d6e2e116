"""Notebooks for Colab and Binder, in ``launch/``: each chapter without outputs, which first installs what it needs.

The buttons on a chapter's page open these. They are made from the chapters' texts, and a test compares.
"""

from pathlib import Path
from typing import Any

import yaml

from ntkbook.publish import notebooks
from ntkbook.publish.book import bare_notebook, chapters

FOLDER = "launch"
CHECKOUT = "ntkbook-checkout"


def install_text(repository: str) -> str:
    """The first cell: the book's files, the package with its book extra, and the folder that chapters run in."""
    return (
        "# Gets the book and installs it with what its chapters need: some minutes on a fresh machine.\n"
        f"!test -d ~/{CHECKOUT} || git clone --quiet --depth 1 {repository} ~/{CHECKOUT}\n"
        f"%pip install --quiet ~/'{CHECKOUT}[book]'\n"
        f"%cd ~/{CHECKOUT}/book"
    )


def notebook(root: Path, name: str) -> Any:
    """A chapter's notebook with the cell that installs first."""
    nb = bare_notebook(root, name)
    repository = yaml.safe_load((root / "_config.yml").read_text("utf8"))["repository"]["url"]
    cell = {"cell_type": "code", "source": install_text(repository), "metadata": {}, "outputs": []}
    nb.cells.insert(0, notebooks.NotebookNode({**cell, "execution_count": None, "metadata": notebooks.NotebookNode()}))
    return notebooks.strip(nb)


def path(root: Path, name: str) -> Path:
    """Where the button of a chapter's page looks for it."""
    return root / FOLDER / "book" / f"{name}.ipynb"


def write(root: Path) -> list[Path]:
    """Write the notebooks of all chapters, and return where they are."""
    paths = []
    for name in chapters(root):
        notebooks.write(notebook(root, name), path(root, name))
        paths.append(path(root, name))
    return paths
