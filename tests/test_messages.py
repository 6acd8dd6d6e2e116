"""Mistakes at the face of the library, and what it says to them: what was expected, what came, what to do.

In a process of their own, without the types that conftest.py has checked at every call, as users have it.
"""

import json
import re
import subprocess
import sys

import pytest

CASES = [
    # a mean
    ("NTKGP(net, mean=1.0)", TypeError, r"a function of x, got 1.0. A number c is lambda x: torch.full"),
    ("NTKGP(net, mean=None)", TypeError, "a function of x, got None"),
]
SETTING = """
import json, sys
import torch
from torch import nn
from ntkbook import *

torch.manual_seed(0)
net, pair = (nn.Sequential(nn.Linear(2, 9), nn.Tanh(), nn.Linear(9, o)) for o in (1, 2))
x, y, y_tasks = torch.randn(8, 2), torch.randn(8), torch.randn(3, 8)
gp = NTKGP(net, noise=0.1)
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
