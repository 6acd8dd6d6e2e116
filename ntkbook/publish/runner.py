"""Running chapters: profiles, parameters, results in ``runs/``, and the stored notebooks in ``book/``."""

import difflib
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from ntkbook.publish import results
from ntkbook.publish.claims import collect, collect_data
from ntkbook.publish.parameters import ParameterError, check_parameters
from ntkbook.publish.runcard import as_json, commit, fingerprint, is_fresh, run_card


class Interrupted(Exception):
    """Ctrl-C while chapters ran; the message says what is kept, and what the same command does next."""


@dataclass(frozen=True)
class Result:
    """How the run of one chapter ended. ``status`` is done, fresh (nothing had changed), failed or interrupted."""

    chapter: str
    folder: Path
    status: str
    seconds: float = 0.0
    peak_mib: float | None = None
    error: str = ""

    @property
    def notebook(self) -> Path:
        """The executed notebook; up to the cell that failed, or in which the run was interrupted."""
        return self.folder / "notebook.ipynb"

    @property
    def line(self) -> str:
        """The result in one line."""
        if self.status == "fresh":
            return f"{self.chapter}: nothing changed, kept"
        peak = f", {self.peak_mib:.0f} MiB" if self.peak_mib else ""
        error = f"\n{self.error}" if self.error else ""
        return f"{self.chapter}: {self.status} in {self.seconds:.0f} s{peak}{error}"


def find_root(start: str | Path = ".") -> Path:
    """The nearest folder at or above ``start`` that has ``_toc.yml``; FileNotFoundError when there is none."""
    here = Path(start).resolve()
    for folder in (here, *here.parents):
        if (folder / "_toc.yml").exists():
            return folder
    raise FileNotFoundError(f"expected _toc.yml in {here} or above it; run this inside a checkout of the book")


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


def run(
    root: Path,
    wanted: Iterable[str] = (),
    *,
    profile: str = "cpu",
    parameters: Mapping[str, Any] | None = None,
    force: bool = False,
    progress: bool = True,
    after: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Run chapters, each into ``runs/<chapter>/<profile or hash of parameters>/``; a failure does not stop the others.

    Args:
        root: the book's folder, with ``_toc.yml``.
        wanted: chapters as in :func:`select`.
        profile: ``cpu`` or the name of a file in ``profiles/``.
        parameters: further overrides, the same for all the chapters.
        force: run even what has not changed.
        progress: bars on standard error, one overall and one a chapter.
        after: called with each result as it comes.

    Raises:
        ValueError, ParameterError: an unknown chapter, profile or parameter, or one of the wrong type, before any run.
        Interrupted: Ctrl-C. Chapters that were done are kept and fresh. The one that ran is kept up to its last whole
            cell, but run from its start again: what its cells made lives in the kernel's memory alone.
    """
    from tqdm import tqdm

    names = select(root, wanted)
    plans = [(name, _plan(root, name, profile, dict(parameters or {}))) for name in names]
    done: list[Result] = []
    with tqdm(plans, desc="chapters", unit="chapter", file=sys.stderr, disable=not progress, ncols=90) as bar:
        for name, (nb, values) in bar:
            folder = root / "runs" / name / (run_key(profile, values) if parameters else profile)
            try:
                done.append(run_one(root, name, nb, profile, values, folder, force=force, progress=progress))
            except KeyboardInterrupt:
                raise Interrupted(
                    f"interrupted in {name}: what it had done is in {folder.relative_to(root)}; {len(done)} of "
                    f"{len(plans)} chapters were done before and are kept; the same command goes on with {name}, from "
                    "its start" + (" (without --force, which runs all again)" if force else "")
                ) from None
            if after:
                after(done[-1])
            tqdm.write(done[-1].line, file=sys.stderr)
    return done


def store(root: Path, wanted: Iterable[str] = (), *, force: bool = False, progress: bool = True) -> list[Result]:
    """Execute chapters with their default parameters and write them with outputs into ``book/``, and their run cards.

    Chapters that summarise others (``ntkbook: {summary: true}`` in their front matter) are always stored anew after
    them.
    """
    from ntkbook.publish import notebooks

    names = select(root, wanted)
    summaries = [
        name for name in chapters(root) if notebooks.is_summary(notebooks.from_text(root / "book" / f"{name}.md"))
    ]

    def keep(result: Result) -> None:
        if result.status == "failed":
            return
        notebooks.write(finished(root, result), root / "book" / f"{result.chapter}.ipynb")
        card = json.loads((result.folder / "card.json").read_text("utf8"))
        del card["fingerprint"]  # of this machine
        path = root / "book" / "results" / f"{result.chapter}.card.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(as_json(card), "utf8")

    ordered = [name for name in names if name not in summaries] + summaries
    return run(root, ordered, force=force, progress=progress, after=keep)


def store_text(root: Path, wanted: Iterable[str] = ()) -> list[Path]:
    """Bring the prose of stored notebooks up to their chapters' and execute nothing: outputs and cards stay.

    Raises:
        ValueError: a chapter has no stored notebook, or other code than it; before any is written.
    """
    from ntkbook.publish import notebooks

    made = {}
    for name in select(root, wanted):
        path, bare = root / "book" / f"{name}.ipynb", bare_notebook(root, name)
        stored = notebooks.read(path) if path.exists() else None
        if stored is None or notebooks.sources(stored) != notebooks.sources(bare):
            told = "has other code" if stored else "is not there"
            raise ValueError(f"{path.relative_to(root)} {told}: run `ntkbook store {name}`, which executes the chapter")
        made[path] = notebooks.with_outputs(bare, stored)
    for path, nb in made.items():
        notebooks.write(nb, path)
    return list(made)


def finished(root: Path, result: Result) -> Any:
    """The notebook to show for a run: its outputs under the chapter's present prose."""
    from ntkbook.publish import notebooks

    bare = notebooks.from_text(root / "book" / f"{result.chapter}.md")
    return notebooks.with_outputs(bare, notebooks.read(result.notebook))


def bare_notebook(root: Path, name: str) -> Any:
    """A chapter's notebook without outputs; ValueError when its file is missing."""
    from ntkbook.publish import notebooks

    source = root / "book" / f"{name}.md"
    if not source.exists():
        raise ValueError(f"{name} is in _toc.yml, but there is no {source.relative_to(root)}")
    return notebooks.from_text(source)


def check_device(values: Mapping[str, Any], name: str) -> None:
    """ParameterError when the parameters want a GPU and there is none."""
    if str(values.get("device", "")).startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            raise ParameterError(f"{name}: device {values['device']!r} wants a GPU, but torch sees none here")


def _plan(root: Path, name: str, profile: str, extra: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    nb = bare_notebook(root, name)
    values = {**checked_profile(root, profile, name, nb), **extra}
    check_parameters(nb, values, name)
    check_device(values, name)
    return nb, values


def checked_profile(root: Path, profile: str, name: str, nb: Any) -> dict[str, Any]:
    """`profile_parameters`; ParameterError naming the profile's file where they do not fit the chapter."""
    values = profile_parameters(root, profile, name)
    check_parameters(nb, values, f"profiles/{profile}.yml: {name}")
    return values


def run_key(profile: str, values: Mapping[str, Any]) -> str:
    """A folder's name for a profile and parameters: ten hexadecimal digits."""
    return hashlib.sha256(json.dumps([profile, values], sort_keys=True).encode()).hexdigest()[:10]


def run_one(
    root: Path,
    name: str,
    nb: Any,
    profile: str,
    values: dict[str, Any],
    folder: Path,
    *,
    force: bool = False,
    progress: bool = True,
    label: str = "",
) -> Result:
    """Run a chapter with parameters that were checked into ``folder``, unless what is there is fresh.

    Args:
        root, name, nb: the book's folder, the chapter and its bare notebook.
        profile, values: the profile's name and all overrides, its own among them.
        folder: gets ``notebook.ipynb``, ``card.json``, ``claims.json``, and the chapter's ``figures`` and ``tables``.
        force: run even what has not changed.
        progress: a bar over cells on standard error.
        label: what messages call it; the chapter's name unless given.

    Raises:
        KeyboardInterrupt: after writing card and claims of what was done until then.
    """
    from ntkbook.publish.execution import ChapterError, execute

    mark = fingerprint(root, name, nb, values)
    if not force and is_fresh(folder, mark):
        return Result(name, folder, "fresh")
    folder.mkdir(parents=True, exist_ok=True)
    for old in ("card.json", "claims.json", "notebook.ipynb"):
        (folder / old).unlink(missing_ok=True)
    results.clear(folder)
    notebook = folder / "notebook.ipynb"
    start, status, error, peak = time.monotonic(), "interrupted", "", None
    state = commit(root, name)
    try:
        peak = execute(nb, notebook, values, cwd=root / "book", name=label or name, progress=progress)
        status = "done"
    except ChapterError as failure:
        status, error = "failed", str(failure)
    finally:
        result = Result(name, folder, status, time.monotonic() - start, peak, error)
        data: dict[str, Any] = {}
        if notebook.exists():
            data = collect_data(notebook)
            (folder / "claims.json").write_text(as_json({k: asdict(v) for k, v in collect(notebook).items()}), "utf8")
        card = {**run_card(result, profile, values, data, state), "fingerprint": mark}
        (folder / "card.json").write_text(as_json(card), "utf8")
    return result
