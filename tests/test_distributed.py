"""Two processes that share the work: one process's results, and errors on both where they are not given the same."""

import math
import os
import re
import subprocess
import sys
import textwrap
import time
import traceback
from datetime import timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import install_import_hook
from oracles.networks import build
from torch import nn
from torch.multiprocessing.spawn import spawn

with install_import_hook("ntkbook", "beartype.beartype"):  # in the workers, which load no conftest
    from ntkbook import NTKGP, DistributedLinearization, Iterative, Linearization, NTKKernel, distributed
    from ntkbook.operators import GaussNewtonOperator

DOC = distributed.__doc__
WAIT = timedelta(seconds=60)
"""Of a rank for another one: long after the start of both on a busy machine, and short against CI's patience."""

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)


def worker(rank, store):
    """A rank of two: what each piece of work returns, or the error it raises, goes into a file."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=WAIT)
    results = {}
    for work in (all_products, distributed_posteriors, mistakes, one_fails):
        try:
            results[work.__name__] = work(rank)
        except (Exception, pytest.fail.Exception):
            results[work.__name__] = traceback.format_exc()
    torch.save(results, f"{store}.{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each piece of work returned on two ranks, all of them in one pair of processes: their start is what takes
    time."""
    store = tmp_path_factory.mktemp("distributed") / "store"
    spawn(worker, (str(store),), nprocs=2)
    ranks = [torch.load(f"{store}.{rank}", weights_only=False) for rank in range(2)]

    def results(work):
        done = [rank[work.__name__] for rank in ranks]
        assert not any(isinstance(result, str) for result in done), "\n".join(map(str, done))
        return done

    return results


# ---------------------------------------------------------------------- the same results

CASES = {"tanh": 7, "one output": 5, "frozen": 2, "convolutions": 1}
"""Networks and numbers of points: uneven shares, one point a rank, and none for one rank."""


def problem(name, n):
    net, x = build(name)
    x = torch.cat([x, 1.3 * x + 0.1])
    return net, x[:n], x[n : n + 3]


def products(lin, x, x2):
    """All that is shared, of several outputs and for one vector or a block."""
    o, p = lin.num_outputs(x), lin.num_params
    generator = torch.Generator().manual_seed(1)
    v = torch.randn(p, 3, generator=generator, dtype=torch.double)
    u = torch.randn(len(x), o, 3, generator=generator, dtype=torch.double)
    with torch.inference_mode():
        inferred = lin.vjp(x, u)
    return {
        "outputs": lin.outputs(x),
        "jvp": lin.jvp(x, v[:, 0]),
        "jvp, a block": lin.jvp(x, v),
        "jvp, a dict": lin.jvp(x, lin.unflatten(v[:, 1])),
        "vjp": lin.vjp(x, u[..., 0]),
        "vjp, a block": lin.vjp(x, u),
        "vjp, inference mode": inferred,
        "gram": lin.gram(x),
        "gram, few and many": lin.gram(x2, x),
        "gram, many and few": lin.gram(x, x2),
        "gram, an output": lin.gram(x, output=-1),
        "gram, outputs' sum": lin.gram(x, trace=True, memory=10**6),
        "gram, outputs' sum of others": lin.gram(x, x2, trace=True),
        "diagonal": lin.diagonal(x),
        "diagonal, an output": lin.diagonal(x, output=0),
        "NTK operator": lin.operator(x) @ u.flatten(0, 1),
        "Gauss-Newton operator": GaussNewtonOperator(lin, x) @ v,
        "kernel": NTKKernel(lin)(x.flatten(1)).to_dense() if x.ndim == 2 else v,
        "float32": lin.to(dtype=torch.float32).gram(x.float()).double() / 1e7,
    }


def all_products(rank):
    results = {}
    for name, n in CASES.items():
        net, x, x2 = problem(name, n)
        lin = DistributedLinearization(net, chunk_size=2)
        share = lin.share(n)
        results[name] = products(lin, x, x2), (share, lin.gram_rows(x), lin.gram_rows(x2, x))
    return results


@needs_gloo
def test_products_and_gram_matrices_are_those_of_one_process(two):
    ranks = two(all_products)
    for name, n in CASES.items():
        net, x, x2 = problem(name, n)
        lin = Linearization(net)
        for what, expected in products(lin, x, x2).items():
            zero, one = (rank[name][0][what] for rank in ranks)
            assert torch.equal(zero, one), f"{name}: {what}"
            torch.testing.assert_close(
                zero, expected, rtol=1e-12, atol=1e-12, msg=partial("{}, {}: {}".format, name, what)
            )
        shares, rows, cross = zip(*(rank[name][1] for rank in ranks))
        assert [len(range(n)[share]) for share in shares] == [n // 2, n - n // 2]
        torch.testing.assert_close(torch.cat(rows), lin.gram(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.cat(cross), lin.gram(x2, x), rtol=1e-12, atol=1e-12)


def tasks():
    net, _ = build("tanh")
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(23, 4, generator=generator, dtype=torch.double)
    y = x[:, :3].sin() + 0.3 * torch.randn(23, 3, generator=generator, dtype=torch.double)
    y[4], y[7, 1] = float("nan"), float("nan")
    return net, x, y


def posteriors(lin, x, y):
    results = {}
    gps = {
        "cholesky": NTKGP(lin, noise=0.1, mean="network"),
        "function space": NTKGP(lin, noise=0.1, solver=Iterative(tolerance=1e-12)),
        "parameter space": NTKGP(lin, noise=0.1, space="parameter", solver=Iterative(tolerance=1e-12)),
    }
    for name, gp in gps.items():
        posterior = gp.condition(x, y)
        x_new = x[:5] + 0.1
        results[name] = posterior.mean(x_new), posterior.variance(x_new), posterior.log_marginal_likelihood
    fitted = NTKGP(lin, mean="constant").fit(x, y)
    # Stationary in what was fitted, whose own last digits the search leaves open.
    results["fitted"] = (fitted.condition(x, y).log_marginal_likelihood,)
    return results


def distributed_posteriors(rank):
    net, x, y = tasks()
    calls = []

    class Counted(DistributedLinearization):
        def vjp(self, x, u):
            calls.append(len(u))
            return super().vjp(x, u)

    lin = Counted(net)
    return posteriors(lin, x, y), len(calls), type(NTKGP(lin.to(dtype=torch.float32)).lin).__name__


@needs_gloo
def test_a_posterior_on_two_ranks_is_that_of_one_process(two):
    (zero, calls, kind), (one, *_) = two(distributed_posteriors)
    assert calls > 10
    assert kind == "Counted"  # though the GP changed its dtype
    net, x, y = tasks()
    for name, expected in posteriors(Linearization(net), x, y).items():
        for ours, theirs, reference in zip(zero[name], one[name], expected):
            assert torch.equal(ours, theirs)
            torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------------- errors


def refused(call, error):
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


def mistakes(rank):
    """What ranks say that are given different things; after each, they go on together."""
    net, x = build("tanh")
    lin, v = DistributedLinearization(net), torch.ones(sum(p.numel() for p in net.parameters()), dtype=torch.double)
    ones = torch.ones(len(x), lin.num_outputs(x), dtype=torch.double)
    other, _ = build("tanh", seed=rank)
    rectified = nn.Sequential(*(nn.ReLU() if isinstance(part, nn.Tanh) else part for part in net))
    wrong = x.clone()
    wrong[2] = float("nan")
    said = {
        "values in the network": refused(lambda: DistributedLinearization(other), ValueError),
        "networks": refused(lambda: DistributedLinearization(rectified if rank else net), ValueError),
        "shapes or dtypes, inputs": refused(lambda: lin.gram(x[rank:]), ValueError),
        "inputs": refused(lambda: lin.gram(x.flip(0) if rank else x), ValueError),
        "calls": refused(lambda: lin.gram(x) if rank else lin.diagonal(x), ValueError),
        "calls, shapes or dtypes": refused(lambda: lin.jvp(x, v) if rank else lin.gram(x), ValueError),
        "vectors": refused(lambda: lin.jvp(x, v * (1 + 1e-6 * rank)), ValueError),
        "parameters to linearise in": refused(
            lambda: DistributedLinearization(net, params=[["0.weight"], ["0.bias"]][rank]), ValueError
        ),
        # The same on all ranks, and none of them waits for another.
        "2 of 6": refused(lambda: lin.gram(torch.cat([wrong[:3], wrong[:3]])), ValueError),
        "expected (6, 3) or": refused(lambda: lin.vjp(x, torch.cat([ones, ones])), ValueError),
        f"expected ({len(v)},)": refused(lambda: lin.jvp(x[:1], v[1:]), ValueError),
        "3 outputs, got index 3": refused(lambda: lin.diagonal(x[:1], output=3), ValueError),
        "do not cross ranks": refused(lambda: lin.gram(x, x.clone().requires_grad_()), NotImplementedError),
    }
    lin.jvp(x, v * (1 + 1e-12 * rank))  # rounding is no difference
    return said, lin.gram(x)


@needs_gloo
def test_ranks_that_differ_are_told_so_and_go_on(two):
    zero, one = two(mistakes)
    for number, (said, gram) in enumerate((zero, one)):
        for expected, message in said.items():
            assert expected in message
            if message.startswith("Ranks"):
                assert message.startswith(f"Ranks have different {expected}")
                assert f"; rank {number} here: " in message
        net, x = build("tanh")
        torch.testing.assert_close(gram, Linearization(net).gram(x), rtol=1e-12, atol=1e-12)


class Fails(nn.Linear):
    def forward(self, x):
        if len(x) > 2:  # more than the checks, which every rank makes on its own, take
            raise MemoryError("this rank alone")
        return super().forward(x)


def one_fails(rank):
    torch.manual_seed(0)
    net = (Fails if rank else nn.Linear)(3, 1).double()
    net._get_name = lambda: "Linear"
    lin = DistributedLinearization(net)
    start = time.monotonic()
    try:
        lin.jvp(torch.ones(9, 3, dtype=torch.double), torch.ones(4, dtype=torch.double))
    except MemoryError:
        return None
    except RuntimeError:
        return time.monotonic() - start
    return math.inf


@needs_gloo
def test_a_rank_does_not_wait_for_one_that_failed(two):
    waited, failed = two(one_fails)
    assert failed is None
    assert waited < WAIT.total_seconds()


def test_without_a_process_group_it_says_how_to_start_one():
    with pytest.raises(RuntimeError, match=r"torchrun --nproc-per-node 2 script\.py.*init_process_group"):
        DistributedLinearization(nn.Linear(2, 1))


@needs_gloo
def test_nccl_wants_the_network_on_a_gpu(tmp_path, monkeypatch):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
        with pytest.raises(ValueError, match='on a GPU for the backend "nccl", got cpu'):
            DistributedLinearization(nn.Linear(2, 1))
    finally:
        dist.destroy_process_group()


@needs_gloo
def test_the_modules_example_runs_under_torchrun(tmp_path):
    script = tmp_path / "script.py"
    (example,) = re.findall(
        r"    # script\.py; start it by: torchrun --nproc-per-node 2.*?destroy_process_group\(\)", DOC, re.DOTALL
    )
    script.write_text(textwrap.dedent(example), "utf8")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
        env=os.environ
        | {
            "PYTHONPATH": str(Path(distributed.__file__).parents[1]),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tensor(") == 1  # rank 0 alone prints


# ---------------------------------------------------------------------- shares


@given(n=st.integers(1, 10**6), ranks=st.integers(1, 64))
def test_shares_are_even_and_cover_all(n, ranks):
    for parts in (distributed._shares(n, ranks), distributed._strips(n, ranks)):
        assert (parts[0].start, parts[-1].stop, len(parts)) == (0, n, ranks)
        assert all(a.stop == b.start and a.start <= a.stop for a, b in pairwise(parts))
    sizes = [part.stop - part.start for part in distributed._shares(n, ranks)]
    assert max(sizes) - min(sizes) <= 1
    # Each end is within half a row of the fair one: a row on either side of a strip is at most n wide.
    areas = [((n - part.start) ** 2 - (n - part.stop) ** 2) / 2 for part in distributed._strips(n, ranks)]
    assert all(abs(area - n * n / 2 / ranks) <= n for area in areas)
