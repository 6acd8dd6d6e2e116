"""The how-to's snippets run, in order, and do what the text beside them says."""

import re
from pathlib import Path

import pytest
import torch

from ntkbook import ConvergenceWarning

TEXT = (Path(__file__).parents[1] / "book" / "howto.md").read_text("utf8")


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    snippets = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(snippets) == TEXT.count("```") // 2
    found, printed = {}, []
    found["print"] = printed.append
    with torch.random.fork_rng([]), pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("howto"))
        for snippet in snippets:
            exec(compile(snippet, snippet.strip().splitlines()[-1], "exec"), found)
    return found | {"printed": printed}


def test_the_snippets_run_and_say_what_the_text_says(names):
    assert names["labels"].shape == (60,)
    accuracy = (names["logits"].argmax(1) == names["labels"]).double().mean()
    assert accuracy > 0.9
    assert names["spread"].min() > 0
    assert torch.allclose(names["product"], names["fisher"] @ names["v"], rtol=1e-9)
    assert names["prediction"].mean.shape == (5, 1)
    assert names["again"].report.converged
    assert names["single"].mean(names["x_star"]).dtype == torch.float32
    assert names["quick"].lin.dtype == torch.float32


def test_the_regression_adapts_to_the_new_task(names):
    x_star = names["x_star"]
    posterior = names["here"]  # of the same task
    error = posterior.mean(x_star) - 1.5 * torch.sin(2 * x_star[:, 0] + 0.5).double()
    assert error.square().mean().sqrt() < 0.3
    far = (names["single"].mean(x_star) - posterior.mean(x_star)).abs().max()
    assert far < 1e-3  # "some four digits", of values up to 1.5


def test_the_errors_shown_are_those_raised(names):
    *_, shown = names["printed"]
    for part in re.findall(r"# (BatchNorm1d.*?), \.\.\. (.*)", TEXT)[0]:
        assert part in str(shown)
    library = "".join(path.read_text("utf8") for path in (Path(__file__).parents[1] / "ntkbook").glob("*.py"))
    library = re.sub(r'"\n\s+f?"', "", library)
    rows = re.findall(r"^\| \*(.+?)\* \|", TEXT, re.MULTILINE)
    assert len(rows) > 5
    for row in rows:
        if "…" not in row:
            assert row in library or row.replace("torch.float64", "{dtype}") in library, row
    assert ConvergenceWarning.__name__ in TEXT
