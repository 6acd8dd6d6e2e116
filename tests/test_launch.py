"""The notebooks that Colab and Binder open: they install before anything else, and are otherwise the chapters."""

from pathlib import Path

import pytest
import yaml

from ntkbook.publish import launch, notebooks
from ntkbook.publish.book import bare_notebook, chapters

ROOT = Path(__file__).parents[1]
URL = yaml.safe_load((ROOT / "_config.yml").read_text("utf8"))["repository"]["url"]


@pytest.mark.parametrize("name", chapters(ROOT))
def test_the_first_cell_installs_the_package_with_its_book_extra(name):
    first, *rest = launch.notebook(ROOT, name).cells
    lines = first.source.splitlines()
    assert first.cell_type == "code"
    assert f"git clone --quiet --depth 1 {URL} " in lines[1]
    assert lines[2] == "%pip install --quiet ~/'ntkbook-checkout[book]'"
    assert lines[3] == "%cd ~/ntkbook-checkout/book"
    chapter = bare_notebook(ROOT, name).cells
    assert [(cell.cell_type, cell.source) for cell in rest] == [(cell.cell_type, cell.source) for cell in chapter]


def test_they_are_valid_and_carry_no_outputs(tmp_path):
    import nbformat

    nb = launch.notebook(ROOT, "03_precipitation")
    notebooks.write(nb, tmp_path / "a.ipynb")
    nbformat.validate(notebooks.read(tmp_path / "a.ipynb"))
    assert not [cell for cell in nb.cells if cell.get("outputs") or cell.get("execution_count")]
    assert len({cell.id for cell in nb.cells}) == len(nb.cells)


def test_all_are_written(toybook):
    paths = launch.write(toybook)
    assert [path.name for path in paths] == [f"{name}.ipynb" for name in chapters(toybook)]
    assert all(path.parent == toybook / "launch" / "book" for path in paths)
