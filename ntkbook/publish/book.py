"""The book's layout: its root, chapters and profiles, and where a chapter's text, stored notebook and runs lie."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from ntkbook.publish.parameters import check_parameters


def find_root(start: str | Path = ".") -> Path:
    """The nearest folder at or above ``start`` that has ``_toc.yml``; FileNotFoundError when there is none."""
    here = Path(start).resolve()
    for folder in (here, *here.parents):
        if (folder / "_toc.yml").exists():
            return folder
    raise FileNotFoundError(f"expected _toc.yml in {here} or above it; run this inside a checkout of the book")


def text_path(root: Path, name: str) -> Path:
    """A chapter's text, which alone is edited."""
    return root / "book" / f"{name}.md"


def stored_path(root: Path, name: str) -> Path:
    """Its notebook with the outputs that the book shows."""
    return root / "book" / f"{name}.ipynb"


def stored_card_path(root: Path, name: str) -> Path:
    """The card of the run that made them."""
    return root / "book" / "results" / f"{name}.card.json"


def runs_path(root: Path, name: str) -> Path:
    """The folder that has a folder for each of a chapter's runs."""
    return root / "runs" / name


def chapters(root: Path) -> list[str]:
    """The names of the chapters that are executed, in the order of the table of contents."""
    toc = yaml.safe_load((root / "_toc.yml").read_text("utf8"))
    parts = [part.get("chapters", []) for part in toc.get("parts", [])]
    files = [entry["file"] for part in [toc.get("chapters", []), *parts] for entry in part]
    return [Path(file).stem for file in files if file.endswith(".ipynb")]


def select(root: Path, wanted: Iterable[str]) -> list[str]:
    """Names for ``03``, ``3`` or ``03_precipitation``; all chapters when nothing is wanted; ValueError if unknown."""
    known, names = chapters(root), []
    for want in wanted:
        hits = [name for name in known if want == name or want.zfill(2) == name.split("_")[0]]
        if not hits:
            raise ValueError(f"no chapter {want!r}; there are {', '.join(known)}")
        names += hits
    return list(dict.fromkeys(names)) or known


def bare_notebook(root: Path, name: str) -> Any:
    """A chapter's notebook without outputs; ValueError when its file is missing."""
    from ntkbook.publish import notebooks

    source = text_path(root, name)
    if not source.exists():
        raise ValueError(f"{name} is in _toc.yml, but there is no {source.relative_to(root)}")
    return notebooks.from_text(source)


def profile_parameters(root: Path, profile: str, chapter: str) -> dict[str, Any]:
    """What a profile changes of a chapter's default parameters; ``cpu`` changes nothing."""
    if profile == "cpu":
        return {}
    path = root / "profiles" / f"{profile}.yml"
    if not path.exists():
        known = ["cpu", *sorted(p.stem for p in path.parent.glob("*.yml"))]
        raise ValueError(f"no profile {profile!r}; there are {', '.join(known)}")
    changes, known = yaml.safe_load(path.read_text("utf8")) or {}, chapters(root)
    for name in changes:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1) or known
            raise ValueError(f"profiles/{profile}.yml: no chapter {name!r}; did you mean {' or '.join(near)}?")
    return {"profile": profile, **(changes.get(chapter) or {})}


def checked_profile(root: Path, profile: str, name: str, nb: Any) -> dict[str, Any]:
    """`profile_parameters`; ParameterError naming the profile's file where they do not fit the chapter."""
    values = profile_parameters(root, profile, name)
    check_parameters(nb, values, f"profiles/{profile}.yml: {name}")
    return values
