"""Mistakes at the face of the library, and what it says to them: what was expected, what came, what to do.

In a process of their own, without the types that conftest.py has checked at every call, as users have it.
"""

import json
import re
import subprocess
import sys

import pytest

CASES = [
    # tensors
    ("gp.condition(x, y.tolist())", TypeError, r"y: expected a torch.Tensor \(n,\) .*, got list. torch.as_tensor\(y\)"),
    ("gp.condition(x, y.numpy())", TypeError, "y: expected a torch.Tensor .* got ndarray"),
    ("gp.condition_tasks(x, y_tasks.numpy())", TypeError, r"y: expected a torch.Tensor \(T, n\) .* got ndarray"),
    (
        "gp.condition(x.numpy(), y)",
        TypeError,
        r"x: expected a torch.Tensor \(n, ...\), got ndarray. torch.as_tensor\(x",
    ),
    ("gp.condition(x, y).mean([1.0, 2.0])", TypeError, "x: expected a torch.Tensor .* got list"),
    # inputs that the network does not take
    (
        "gp.condition(x[:, 0], y)",
        ValueError,
        r"x: the network fails .* shape \(\) .* one number each are .* x\[:, None\]",
    ),
    ("NTKGP(nn.Linear(1, 1)).condition(x[:, 0], y)", ValueError, r"x: the network fails .* x\[:, None\]"),
    (
        "gp.condition(torch.randn(8, 5), y)",
        ValueError,
        r"shape \(5,\) in torch.float64 .* of the shape that the network",
    ),
    ("gp.condition(x.long(), y)", ValueError, r"in torch.int64 .* Unless these are tokens, .* x.to\(torch.float64\)"),
    ("gp.condition(x.byte(), y)", ValueError, r"in torch.uint8 .* x.to\(torch.float64\)"),
    ("NTKGP(words).condition(x.abs(), y)", ValueError, r"in torch.float64 .* Tokens are integers: x.long\(\)"),
    ("NTKGP(words).condition(99 + x.abs().long(), y)", ValueError, "index out of range.* within an embedding's size"),
    ("NTKGP(Stateful()).condition(x[:, None], y)", ValueError, "All has to be torch.float64, .* dtype=torch.float32"),
    (
        "fisher_vector_product(Old(), x, torch.ones(27), 'gaussian')",
        NotImplementedError,
        "torch.func cannot transform .* setup_context.* causes: a torch.autograd.Function without setup_context",
    ),
    # a mean
    ("NTKGP(net, mean=1.0)", TypeError, r"a function of x, got 1.0. A number c is lambda x: torch.full"),
    ("NTKGP(net, mean=None)", TypeError, "a function of x, got None"),
    ("NTKGP(net, mean=lambda x: 1.0).condition(x, y)", TypeError, r"mean: .* values are tensors \(n,\) or .*, got 1.0"),
    ("NTKGP(net, mean=net).condition(x, y)", ValueError, r"mean fails .* .to\(torch.float64\) such a module"),
    ("NTKGP(net, mean=lambda x: x[5:, 9]).condition(x, y)", ValueError, "mean fails on .* out of bounds"),
    # variances, precision
    (
        "NTKGP(net, noise=torch.ones(8))",
        ValueError,
        r"noise: expected one number .*, got \(8,\). .* condition\(x, y, noise",
    ),
    ("with_scale(-1.0).condition(x, y)", ValueError, r"outputscale: expected a positive number .*, got -1"),
    ("with_scale(-1.0).condition_tasks(x, y_tasks)", ValueError, r"outputscale: expected a positive number"),
    ("with_scale(-1.0)(x)", ValueError, r"outputscale: expected a positive number"),
    (
        "NTKGP(net, dtype=torch.float16)",
        ValueError,
        "dtype: expected torch.float64 or torch.float32, got torch.float16",
    ),
    ("NTKGP(net, dtype=torch.bfloat16)", ValueError, "got torch.bfloat16"),
    ("NTKGP(net, dtype='float64')", ValueError, "dtype: expected torch.float64 .* got float64"),
    # hyperparameters of tasks
    (
        "tasks(TaskHyperparameters(1.0, 0.1))",
        TypeError,
        r"of tensors \(3,\), .* got TaskHyperparameters of float, float",
    ),
    ("tasks((torch.ones(3), torch.ones(3)))", TypeError, "expected a TaskHyperparameters .* got tuple of Tensor"),
    # networks and their parameters
    ("NTKGP(torch.sin)", TypeError, "net: expected a torch.nn.Module, got builtin_function_or_method"),
    ("Linearization(nn.DataParallel(net))", TypeError, "DataParallel '' spreads calls itself. Pass .* its .module"),
    ("Linearization(torch.jit.trace(net, x))", TypeError, "is compiled, .* Pass the module it was made from"),
    (
        "Linearization(nn.Sequential(nn.LazyLinear(3)))",
        TypeError,
        r"LazyLinear '0' has no parameters .* once, net\(x\)",
    ),
    ("Linearization(net, net.parameters())", TypeError, r"params: expected names .*, got Parameter. As names: \["),
    ("Linearization(net, list(net.parameters()))", TypeError, "params: expected names"),
    # mini-batches
    ("twice(x[:, None].unbind())", ValueError, "got none. A generator is used up by its first use: pass a list"),
]
SETTING = """
import json, sys, warnings
import torch
from torch import nn
from ntkbook import *

warnings.simplefilter("ignore")  # torch.jit is deprecated
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(2, 9), nn.Tanh(), nn.Linear(9, 1))
x, y, y_tasks = torch.randn(8, 2), torch.randn(8), torch.randn(3, 8)
gp = NTKGP(net, noise=0.1)
words = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(8, 1))


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRU(2, 3, batch_first=True), nn.Linear(3, 1)

    def forward(self, x):
        return self.head(self.cell(x, torch.zeros(1, len(x), 3))[0][:, -1])


class Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.tanh())
        return x.tanh()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (1 - ctx.saved_tensors[0] ** 2)


class Old(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 9)

    def forward(self, x):
        return Tanh.apply(self.inner(x))


def with_scale(value):
    other = NTKGP(net)
    other.outputscale = value
    return other


def tasks(given):
    return gp.condition_tasks(x, y_tasks, hyperparameters=given)


def twice(batches):
    one, v = (part for part in batches), torch.zeros(sum(p.numel() for p in net.parameters()))
    return [fisher_vector_product(net, one, v, "gaussian") for _ in range(2)]


messages = []
for code in json.load(sys.stdin):
    try:
        messages.append(["nothing", repr(eval(code))])
    except Exception as error:
        messages.append([type(error).__name__, str(error)])
print(json.dumps(messages))
"""


@pytest.fixture(scope="module")
def messages():
    codes = [code for code, *_ in CASES]
    run = subprocess.run(
        [sys.executable, "-c", SETTING], input=json.dumps(codes), capture_output=True, text=True, check=True
    )
    return dict(zip(codes, json.loads(run.stdout)))


@pytest.mark.parametrize(("code", "kind", "message"), CASES, ids=[code for code, *_ in CASES])
def test_a_mistake_is_explained(code, kind, message, messages):
    name, got = messages[code]
    assert name == kind.__name__, got
    assert re.search(message, got), got
