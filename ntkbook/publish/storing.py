"""The stored notebooks in ``book/``: made from runs with the default parameters, or given new prose alone."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ntkbook.publish import notebooks
from ntkbook.publish.book import bare_notebook, chapters, select, stored_card_path, stored_path
from ntkbook.publish.runcard import read_run, write_json
from ntkbook.publish.runner import Result, run


def store(root: Path, wanted: Iterable[str] = (), *, force: bool = False, progress: bool = True) -> list[Result]:
    """Execute chapters with their default parameters and write them with outputs into ``book/``, and their run cards.

    Chapters that summarise others (``ntkbook: {summary: true}`` in their front matter) are always stored anew after
    them.
    """
    names = select(root, wanted)
    summaries = [name for name in chapters(root) if notebooks.is_summary(bare_notebook(root, name))]

    def keep(result: Result) -> Result:
        result = unless_edited(root, result)
        if result.status != "failed":
            notebooks.write(finished(root, result), stored_path(root, result.chapter))
            card = read_run(result.folder)
            del card["fingerprint"]  # of this machine
            write_json(stored_card_path(root, result.chapter), card)
        return result

    ordered = [name for name in names if name not in summaries] + summaries
    return run(root, ordered, force=force, progress=progress, after=keep)


def store_text(root: Path, wanted: Iterable[str] = ()) -> list[Path]:
    """Bring the prose of stored notebooks up to their chapters' and execute nothing: outputs and cards stay.

    Raises:
        ValueError: a chapter has no stored notebook, or other code than it; before any is written.
    """
    made = {}
    for name in select(root, wanted):
        path, bare = stored_path(root, name), bare_notebook(root, name)
        stored = notebooks.read(path) if path.exists() else None
        if stored is None or notebooks.sources(stored) != notebooks.sources(bare):
            told = "has other code" if stored else "is not there"
            raise ValueError(f"{path.relative_to(root)} {told}: run `ntkbook store {name}`, which executes the chapter")
        made[path] = notebooks.with_outputs(bare, stored)
    for path, nb in made.items():
        notebooks.write(nb, path)
    return list(made)


def finished(root: Path, result: Result) -> Any:
    """The notebook to show for a run: its outputs under the chapter's present prose; ValueError if its code changed."""
    return notebooks.with_outputs(bare_notebook(root, result.chapter), notebooks.read(result.notebook))


def unless_edited(root: Path, result: Result) -> Result:
    """The result; a failed one where the chapter's code is no longer what ran, so that it cannot be shown with it."""
    if result.status != "failed":
        try:
            finished(root, result)
        except ValueError as error:
            kept = result.folder.relative_to(root)
            told = f"{result.chapter} was edited while it ran: {error}. That run is kept in {kept}"
            return replace(result, status="failed", error=told)
    return result
