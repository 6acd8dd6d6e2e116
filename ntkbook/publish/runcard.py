"""A run's card: what it depended on, and how it went; and whether a run is still what its chapter would give."""

import ast
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ntkbook.publish.files import write_text

PACKAGES = ("ntkbook", "torch", "gpytorch", "linear_operator", "botorch", "numpy", "matplotlib", "papermill")
ENVIRONMENT = ("NTKBOOK_DATA", "NTKBOOK_OFFLINE")  # says where data comes from
PACKAGE = Path(__file__).parents[1]
IN_A_CHAPTER = ("claims", "figures", "posterior_widget")
"""The modules of publish that chapters import to show what they measured; and those that these import at their top."""
IN_A_SUMMARY = ("book", "notebooks", "scorecard")
"""What a chapter that sums others up imports beside them."""


def run_card(result: Any, profile: str, values: Mapping[str, Any], data: Mapping[str, Any], commit: str | None) -> dict:
    """What a reader needs to judge or repeat a run: device, versions, commit, data and their hashes, time, memory.

    ``finished`` is in UTC.

    Args:
        result: the `runner.Result` of the run.
        profile, values: the profile's name and all overrides.
        data: what the chapter said of its data, by name.
        commit: `commit` as it was when the run began.
    """
    return {
        "chapter": result.chapter,
        "status": result.status,
        "error": result.error,
        "profile": profile,
        "parameters": values,
        "device": _device(str(values.get("device", "cpu"))),
        "versions": _versions(),
        "commit": commit,
        "data": data,
        "finished": datetime.now(UTC).isoformat(timespec="minutes"),
        "wall_seconds": round(result.seconds, 1),
        "peak_mib": result.peak_mib and round(result.peak_mib),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def environment() -> dict[str, str]:
    """What of the environment says where data comes from, for kernels, which do not stand where the user does."""
    found = {key: os.environ[key] for key in ENVIRONMENT if os.environ.get(key)}
    if "NTKBOOK_DATA" in found:
        found["NTKBOOK_DATA"] = str(Path(found["NTKBOOK_DATA"]).resolve())
    return found


def fingerprint(root: Path, name: str, nb: Any, values: Mapping[str, Any]) -> str:
    """A digest of what a run depends on: code, parameters, package, lock, versions, and the order of data's places.

    Prose does not count. A summary also depends on the other chapters' stored notebooks, their cards and quick claims.
    """
    code = [cell.source for cell in nb.cells if cell.cell_type == "code"]
    facts = [code, values, _versions(), environment()]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for path in depends_on(root, name, nb):
        digest.update(str(path.name).encode() + path.read_bytes())
    return digest.hexdigest()


def depends_on(root: Path, name: str, nb: Any) -> list[Path]:
    """The files that a run of a chapter depends on."""
    from ntkbook.publish import notebooks

    summary = notebooks.is_summary(nb)
    files = [p for p in PACKAGE.rglob("*") if p.suffix in (".py", ".csv") and PACKAGE / "publish" not in p.parents]
    files += _imported(*IN_A_CHAPTER, *(IN_A_SUMMARY if summary else ()))
    files += [root / "requirements.lock", *_results(root, name)]
    if summary:
        files += [p for p in (root / "book").glob("*.ipynb") if p.stem != name]
        files += (root / "book" / "results").glob("*.card.json")
        files += [p for p in (root / "runs").glob("*/quick/claims.json") if p.parts[-3] != name]
    return sorted(p for p in files if p.exists() and p.name != f"{name}.card.json")


def _imported(*modules: str) -> list[Path]:
    """The files of modules of publish, and of those that they import at their top; what runs chapters is not there."""
    found: dict[str, Path] = {}
    todo = list(modules)
    while todo:
        module = todo.pop()
        if module not in found:
            found[module] = PACKAGE / "publish" / f"{module}.py"
            for node in ast.parse(found[module].read_text("utf8")).body:
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ntkbook.publish"):
                    _, _, name = (node.module or "").partition("ntkbook.publish.")
                    todo += [name] if name else [alias.name for alias in node.names]
    return list(found.values())


def _results(root: Path, name: str) -> list[Path]:
    """The results of longer runs, and their pictures, that a chapter shows beside its own."""
    return [p for p in (root / "book" / "results").glob(f"{name}.*") if p.name != f"{name}.card.json"]


def stamp(mark: str, data: Iterable[str]) -> dict[str, Any]:
    """What a card keeps to tell whether its run is fresh: the fingerprint, and where the data comes from.

    So a run on a stand-in is old once the real data is here, though nothing else has changed.
    """
    places, names = {}, set(data)
    if names:
        from ntkbook.experiments.data import sources

        with suppress(OSError):  # such as an NTKBOOK_DATA that is no folder: the chapter itself says so
            places = {told.name: told.where for told in sources.status() if told.name in names}
    return {"mark": mark, "data": places}


def is_fresh(folder: Path, mark: str) -> bool:
    """Whether a folder holds a run that succeeded with this fingerprint, on what data there is now."""
    card = read_run(folder)
    if card.get("status") != "done" or not isinstance(card.get("data"), dict):
        return False
    return card.get("fingerprint") == stamp(mark, card["data"])


def read_run(folder: Path) -> dict[str, Any]:
    """The card of a run whose files are all there and whole; empty where they are not, as when the power failed."""
    try:
        card, claims = (json.loads((folder / name).read_text("utf8")) for name in ("card.json", "claims.json"))
    except (OSError, ValueError):
        return {}
    whole = isinstance(card, dict) and isinstance(claims, dict) and (folder / "notebook.ipynb").exists()
    return card if whole else {}


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def commit(root: Path, name: str) -> str | None:
    """The commit, with ``+changes`` where what the chapter is run from differs from it; None outside a git checkout.

    That is its text, the package, the lock, the profiles and results of longer runs; other chapters' outputs are not.
    """
    from ntkbook.publish.pages import git

    used = [f"book/{name}.md", "ntkbook", "requirements.lock", "profiles", *map(str, _results(root, name))]
    try:
        head = git(root, "rev-parse", "HEAD")
        changed = git(root, "status", "--porcelain", "--", *used)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}+changes" if changed else head


def _device(device: str) -> str:
    if device.startswith("cuda"):
        import torch

        try:
            return torch.cuda.get_device_name(device)
        except Exception:  # whatever torch raises where there is none: a card is written of a run that failed, too
            return device
    return f"CPU, {os.cpu_count()} cores, {platform.machine()}"
