"""One thread, shapes checked at run time, and the same random examples in every run."""

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

# Before the first import of ntkbook: every annotation such as Float[Tensor, "n d"] is checked at every call.
install_import_hook("ntkbook", "beartype.beartype")

TESTS = Path(__file__).parent
ROOT = TESTS.parent

torch.set_num_threads(1)

settings.register_profile(
    "deterministic",
    derandomize=True,
    max_examples=25,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("deterministic")


@pytest.fixture(scope="session")
def toybook(tmp_path_factory):
    """A copy of tests/toybook, a book of one chapter and its scorecard, stored and run in the quick profile."""
    from ntkbook.publish import runner, storing

    root = copy_book(TESTS / "toybook", tmp_path_factory.mktemp("toy") / "book")
    for item in ("book.css", "interactive.js", "posterior.js", "sortable.js"):
        (root / "book" / "_static").mkdir(exist_ok=True)
        shutil.copyfile(ROOT / "book" / "_static" / item, root / "book" / "_static" / item)
    shutil.copyfile(ROOT / "_config.yml", root / "_config.yml")
    shutil.copyfile(ROOT / "book" / "references.bib", root / "book" / "references.bib")
    assert [result.status for result in storing.store(root, progress=False)] == ["done", "done"]
    assert [result.status for result in runner.run(root, profile="quick", progress=False)] == ["done", "done"]
    return root


@pytest.fixture(scope="session")
def stored_site(tmp_path_factory):
    """The folder of the rendered book, built once as `make html` does it, from the stored notebooks."""
    from ntkbook.publish import site

    root = tmp_path_factory.mktemp("html")
    shutil.copytree(ROOT / "book", root / "book", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for name in ("_toc.yml", "_config.yml"):
        shutil.copyfile(ROOT / name, root / name)
    return site.build(root).parent


def copy_book(root, target):
    """A book's own files, without what was built or run."""
    shutil.copytree(root / "book", target / "book", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copytree(root / "profiles", target / "profiles")
    for name in ("_toc.yml", "_config.yml", "requirements.lock"):
        if (root / name).exists():
            shutil.copyfile(root / name, target / name)
    return target
