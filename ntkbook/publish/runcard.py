"""A run's card: what it depended on, and how it went; and whether a run is still what its chapter would give."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("ntkbook", "torch", "gpytorch", "linear_operator", "botorch", "numpy", "matplotlib", "papermill")
NOT_IN_A_CHAPTER = {  # of publish: they only run it
    "runner.py", "site.py", "cli.py", "execution.py", "parameters.py", "sweep.py", "cluster.py", "compare.py",
    "listing.py", "results.py",
    "runcard.py", "pages.py", "launch.py", "card.py", "citing.py", "reference.py", "status.py",
}  # fmt: skip


def run_card(result: Any, profile: str, values: Mapping[str, Any], data: Mapping[str, Any], commit: str | None) -> dict:
    """What a reader needs to judge or repeat a run: device, versions, commit, data and their hashes, time, memory.

    ``finished`` is in UTC.

    Args:
        result: the `runner.Result` of the run.
        profile, values: the profile's name and all overrides.
        data: what the chapter said of its data, by name.
        commit: `commit` as it was when the run began.
    """
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "chapter": result.chapter,
        "status": result.status,
        "error": result.error,
        "profile": profile,
        "parameters": values,
        "device": _device(str(values.get("device", "cpu"))),
        "versions": versions,
        "commit": commit,
        "data": data,
        "finished": datetime.now(UTC).isoformat(timespec="minutes"),
        "wall_seconds": round(result.seconds, 1),
        "peak_mib": result.peak_mib and round(result.peak_mib),
    }


def fingerprint(root: Path, name: str, nb: Any, values: Mapping[str, Any]) -> str:
    """A digest of what a run depends on: the chapter's code, parameters, package, lock, and where data comes from.

    Prose does not count. A summary also depends on the other chapters' stored notebooks, their cards and quick claims.
    """
    from ntkbook.publish import notebooks

    code = [cell.source for cell in nb.cells if cell.cell_type == "code"]
    digest = hashlib.sha256(json.dumps([code, values, sys.version_info[:3]], sort_keys=True).encode())
    digest.update(repr([os.environ.get(key, "") for key in ("NTKBOOK_DATA", "NTKBOOK_OFFLINE")]).encode())
    package = Path(__file__).parents[1]
    files = [p for p in package.rglob("*") if p.suffix in (".py", ".csv", ".js") and p.name not in NOT_IN_A_CHAPTER]
    files += [root / "requirements.lock", *_results(root, name)]
    if notebooks.is_summary(nb):
        files += [p for p in (root / "book").glob("*.ipynb") if p.stem != name]
        files += (root / "book" / "results").glob("*.card.json")
        files += [p for p in (root / "runs").glob("*/quick/claims.json") if p.parts[-3] != name]
    for path in sorted(p for p in files if p.exists() and p.name != f"{name}.card.json"):
        digest.update(str(path.name).encode() + path.read_bytes())
    return digest.hexdigest()


def _results(root: Path, name: str) -> list[Path]:
    """The results of longer runs that a chapter shows beside its own."""
    found = (root / "book" / "results").glob(f"{name}.*")
    return [path for path in found if path.suffix in (".json", ".npz") and path.name != f"{name}.card.json"]


def is_fresh(folder: Path, mark: str) -> bool:
    """Whether a folder holds a run that succeeded with this fingerprint."""
    card = folder / "card.json"
    if not card.exists() or not (folder / "notebook.ipynb").exists():
        return False
    facts = json.loads(card.read_text("utf8"))
    return facts["status"] == "done" and facts["fingerprint"] == mark


def as_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


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

        return torch.cuda.get_device_name(device)
    return f"CPU, {os.cpu_count()} cores, {platform.machine()}"
