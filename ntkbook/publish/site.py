"""Building the rendered book: from the stored notebooks, or from quick runs in a staged copy."""

import json
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import yaml

from ntkbook.publish import pages
from ntkbook.publish.book import stored_card_path, stored_path
from ntkbook.publish.runner import Result

STAGE = Path("runs") / "site"


class BuildError(RuntimeError):
    """jupyter-book found something wrong; the message is its output."""


def build(root: Path, source: Path | None = None) -> Path:
    """Build ``_build/html`` without executing anything; every warning is an error.

    Args:
        root: the book's folder, which gets ``_build``.
        source: where the pages are, when not in ``root`` itself (see :func:`stage`).

    Returns:
        The path of the built ``index.html``.

    Raises:
        BuildError: the build warned or failed.
    """
    out, new = root / "_build" / "html", root / "_build" / "new"
    shutil.rmtree(new, ignore_errors=True)
    program = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
    command = [*program, "build", str(source or root), "--path-output", str(new)]
    # --all: pages quote numbers from each other, which Sphinx does not see as a dependency.
    done = subprocess.run(
        [*command, "--all", "-W", "-n", "--keep-going", "-q"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BuildError(f"the book does not build:\n{done.stdout}\n{done.stderr}".rstrip())
    made = new / "_build" / "html"
    static = made / "_static"
    shutil.copyfile(str(files("plotly") / "package_data" / "plotly.min.js"), static / "plotly.min.js")
    first = yaml.safe_load(((source or root) / "_toc.yml").read_text("utf8"))["root"]
    pages.dress_front_door(made, first)
    shutil.rmtree(out, ignore_errors=True)  # only now: a book that does not build leaves the earlier pages
    made.rename(out)
    shutil.rmtree(new)
    return out / "index.html"


def stage(root: Path, results: list[Result]) -> Path:
    """Copy the book to ``runs/site`` with the notebooks and cards of these runs in place of the stored ones.

    A chapter whose run failed keeps its stored notebook; one that has none is left out of the copy's contents.
    """
    from ntkbook.publish import notebooks
    from ntkbook.publish.storing import finished

    target = root / STAGE
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    shutil.copytree(root / "book", target / "book", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copyfile(root / "_config.yml", target / "_config.yml")
    toc = (root / "_toc.yml").read_text("utf8").splitlines(keepends=True)
    for result in results:
        card, page = stored_card_path(target, result.chapter), stored_path(target, result.chapter)
        card.parent.mkdir(exist_ok=True)
        made = result.folder / "card.json"
        if result.status != "failed" or json.loads(made.read_text("utf8"))["status"] == "failed":
            shutil.copyfile(made, card)  # but not that of a good run whose text was edited, which is not shown
        if result.status != "failed":
            notebooks.write(finished(root, result), page)
        elif not page.exists():
            toc = [line for line in toc if f"{result.chapter}.ipynb" not in line]
    (target / "_toc.yml").write_text("".join(toc), "utf8")
    return target
