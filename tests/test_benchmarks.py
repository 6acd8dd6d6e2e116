"""The benchmarks at tiny sizes: who agrees, what is written, and that one failure keeps the rest; never a time."""

import gc
import json
import math
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks is no part of the package

from benchmarks import __main__ as command
from benchmarks import floor, harness, problems, report
from benchmarks.harness import Case, Competitor, Limits
from ntkbook.experiments.networks import mlp

TINY = {
    "gram": partial(problems.gram, "3-4-5-2", 6, False, 4),
    "mean": partial(problems.gram, "2-4-4-2", 6, True, 4),
    "products": partial(problems.products, "3-4-2", 9, 3),
    "fisher": partial(problems.fisher, "3-4-3", 9, 2),
    "fisher, one vector": partial(problems.fisher, "3-4-3", 9, 1),
    "diagonal": partial(problems.diagonal, "3-4-3", 9),
    "likelihood": partial(problems.regression, "3-4-1", 24, 6, False),
    "prediction": partial(problems.regression, "3-4-1", 24, 6, True),
    "tasks": partial(problems.many_tasks, "1-40-1", 20, 30, False, 0.2),
    "tasks, fitted": partial(problems.many_tasks, "1-40-1", 10, 150, True, 0.1),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(floor, "TILES", (8,))
    floor.rate.cache_clear()
    gc.freeze()  # each measurement collects garbage: not all that pytest holds, every time
    yield
    gc.unfreeze()
    floor.rate.cache_clear()


def run(tmp_path, chosen, *more):
    arguments = ["--threads", "1", "--repeats", "2", "--no-install", "--out", str(tmp_path), "--cache", str(tmp_path)]
    return command.main([*arguments, *more], chosen)


@pytest.mark.parametrize("name", TINY)
def test_all_agree_and_are_timed(name, tmp_path):
    results = run(tmp_path, [problems.Problem(name, name, TINY[name])])
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored == json.loads(json.dumps(results))
    assert set(stored["machine"]) >= {"torch", "cpu", "threads", "repeats", "quick"}
    found = stored["problems"][name]
    assert found["floor"] > 0
    for row in found["rows"]:
        if row["name"].startswith(("neural-tangents", "laplace-torch")):
            assert row["reason"].startswith("skipped: ")
            continue
        assert "reason" not in row, row
        assert 0 <= row["error"] <= row["tolerance"]
        assert len(row["seconds"]) == 2
        assert row["ratio"] == pytest.approx(row["median"] / found["rows"][0]["median"])
        done = [trial for trial in row["sweep"] if "seconds" in trial]
        assert row["chunk_size"] in [trial["chunk_size"] for trial in done]
        assert row["seconds"][0] == min(trial["seconds"] for trial in done)
    assert sum("reason" not in row for row in found["rows"]) >= 2
    assert all(row["name"] in (tmp_path / "table.md").read_text() for row in found["rows"])
    assert "<svg" in (tmp_path / "plot.svg").read_text()


@pytest.mark.parametrize("name", ["LeNet-5", "PreResNet8"])
def test_convolutions_agree(name, tmp_path):
    found = run(tmp_path, [problems.Problem("gram", "gram", partial(problems.gram, name, 3, False, 2))])
    rows = {row["name"]: row for row in found["problems"]["gram"]["rows"]}
    assert [name for name, row in rows.items() if "reason" in row and not name.startswith("neural-tangents")] == []


def toy(**ways):
    """x → 2x, by several ways; the first is right."""
    x = torch.arange(1.0, 9.0)
    right = {"right": Competitor(lambda inputs, size: 2 * inputs[0], (4, 2, 100))}
    return Case((x,), (x[:3],), 2 * x[:3].double(), right | ways, lambda: 1e-9, 1e-6)


def test_what_fails_keeps_the_rest(tmp_path):
    def broken(inputs, size):
        raise ValueError("no such thing\nand more")

    def skips(inputs, size):
        raise harness.Skipped("not here")

    def late(inputs, size):
        if len(inputs[0]) > 3:
            while True:
                time.sleep(0.01)
        return 2 * inputs[0]

    def large(inputs, size):
        if len(inputs[0]) > 3:
            torch.empty(2**50)
        return 2 * inputs[0]

    case = toy(
        wrong=Competitor(lambda inputs, size: 2.1 * inputs[0]),
        shape=Competitor(lambda inputs, size: 2 * inputs[0][:, None]),
        nan=Competitor(lambda inputs, size: inputs[0] * math.nan),
        wrong_on_all=Competitor(lambda inputs, size: inputs[0] * (2 if len(inputs[0]) == 3 else 3)),
        a_part=Competitor(lambda inputs, size: 2 * inputs[0][:2], compare=slice(0, 2)),
        wrong_part=Competitor(lambda i, size: i[0][:2] * (2 if len(i[0]) == 3 else 3), compare=slice(0, 2)),
        broken=Competitor(broken),
        skips=Competitor(skips),
        late=Competitor(late, (2, 1)),
        large=Competitor(large, (2, 1)),
        rough=Competitor(lambda inputs, size: 2.01 * inputs[0], tolerance=0.1),
        unit=Competitor(lambda inputs, size: inputs[0][:0], agrees=False),
    )
    chosen = [
        problems.Problem("toy, n = 8", "toy", lambda settings: case),
        problems.Problem("bad", "toy", lambda settings: broken((), None)),
        problems.Problem("toy, n = 9", "toy", lambda settings: case),
    ]
    results = run(tmp_path, chosen, "--seconds", "5")
    first, last = results["problems"]["toy, n = 8"], results["problems"]["toy, n = 9"]
    reasons = {row["name"]: row.get("reason") for row in first["rows"]}
    assert reasons["wrong"].startswith("disagrees: error 5.0e-02")
    assert reasons["shape"].startswith("disagrees: error inf")
    assert reasons["nan"].startswith("disagrees: error inf")
    assert reasons["wrong_on_all"].startswith("disagrees on all inputs")
    assert reasons["wrong_part"].startswith("disagrees on all inputs")
    assert reasons["broken"] == "ValueError: no such thing"
    assert reasons["skips"] == "skipped: not here"
    assert reasons["late"] == "more than 5 seconds"
    assert reasons["large"].startswith("out of memory")
    assert [reasons[name] for name in ("right", "a_part", "rough", "unit")] == [None] * 4
    rows = {row["name"]: row for row in first["rows"]}
    assert [trial["chunk_size"] for trial in rows["right"]["sweep"]] == [4, 2, 8]  # none is larger than the data
    assert len(rows["late"]["sweep"]) == 1
    assert len(rows["large"]["sweep"]) == 2
    assert all(row["seconds"] == [] for row in first["rows"] if "reason" in row)  # never timed
    assert results["problems"]["bad"] == {"reason": "ValueError: no such thing"}
    spared = {row["name"]: row.get("reason") for row in last["rows"]}
    assert spared["late"] == 'not tried: more than 5 seconds in "toy, n = 8"'
    assert spared["large"].startswith("not tried: out of memory")
    table = (tmp_path / "table.md").read_text()
    assert "more than 5 seconds" in table
    assert "no such thing" in table


def test_it_resumes(tmp_path, capsys):
    calls = []

    def build(settings):
        calls.append(1)
        return toy()

    chosen = [problems.Problem("one", "a", build), problems.Problem("two", "b", build)]
    run(tmp_path, chosen, "--only", "a")
    assert len(calls) == 1
    found = run(tmp_path, chosen)
    assert list(found["problems"]) == ["one", "two"]
    assert len(calls) == 2
    with pytest.raises(SystemExit, match="other settings"):
        run(tmp_path, chosen, "--quick")


def test_without_our_own_time_there_are_no_ratios(tmp_path):
    def build(settings):
        case = toy(other=Competitor(lambda inputs, size: 2 * inputs[0]))
        case.competitors["right"].run = lambda inputs, size: inputs[0]
        return case

    found = run(tmp_path, [problems.Problem("one", "a", build)])["problems"]["one"]
    assert found["rows"][0]["reason"].startswith("disagrees")
    assert found["rows"][1]["ratio"] is None
    assert found["floor_ratio"] is None
    assert "NaN" not in (tmp_path / "results.json").read_text()


def test_a_slow_one_is_timed_once():
    found = harness.run_case(toy(), 3, Limits(once=0.0), lambda text: None, {})
    assert len(found["rows"][0]["seconds"]) == 1
    assert "(once)" in report.table({"machine": dict.fromkeys(("torch", "threads", "cpu", "repeats")),
                                     "problems": {"p": found}})  # fmt: skip


def test_the_floor_of_a_gram_matrix():
    """5-200-2000-200-1: by hand."""
    sizes, n = (5, 200, 2000, 200, 1), 1000
    layers = floor.uses(mlp(sizes), torch.zeros(1, 5))
    assert [(use.positions, use.inner, use.outer) for use in layers] == [(1, 5, 200), (1, 200, 2000), (1, 2000, 200),
                                                                         (1, 200, 1)]  # fmt: skip
    count = sum(product.multiply_adds for product in floor.gram(layers, n, 1))
    weights = 5 * 200 + 200 * 2000 + 2000 * 200 + 200
    assert count == n * (n + 1) / 2 * (sum(sizes[:-1]) + sum(sizes[1:])) + n * (2 * weights - 1000)
    assert sum(product.multiply_adds for product in floor.product(layers, n, 3)) == n * (
        weights + 3 * (4 * weights - 2000 * 1)
    )


def test_the_floor_of_a_convolution_is_the_cheaper_path():
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.Flatten(), torch.nn.Linear(3 * 16, 2))
    first = floor.uses(net, torch.zeros(1, 2, 6, 6))[0]
    assert (first.positions, first.inner, first.outer, first.parameters) == (16, 18, 3, 57)
    pairs, o, n = 10 * 11 / 2, 2, 10
    products = floor.gram([first], n, o)
    contraction = pairs * o * o * 57 + n * o * 16 * 54
    assert products[-1].multiply_adds == contraction
    assert contraction < pairs * 256 * (18 + o * o * 4)


def test_the_list_of_problems():
    for quick in (True, False):
        names = [problem.name for problem in problems.problems(quick)]
        assert len(set(names)) == len(names)
    groups = {problem.group for problem in problems.problems()}
    assert groups == {"gram", "products", "fisher", "diagonal", "likelihood", "prediction", "tasks"}
