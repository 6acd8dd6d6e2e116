"""Run by `neural.py` in the other environment: neural-tangents' Gram matrices, and what they cost. No torch here."""

import json
import os
import sys
import time
import types
from pathlib import Path

os.sched_setaffinity(0, {int(core) for core in sys.argv[2].split(",")})
sys.modules["neural_tangents.experimental"] = types.ModuleType("experimental")  # all that needs TensorFlow

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import neural_tangents as nt  # noqa: E402
import numpy as np  # noqa: E402
from jax import lax  # noqa: E402

FOLDER = Path(sys.argv[1])


def apply(operations, params, constants, x):
    def get(name):
        return params[name] if name in params else constants.get(name)

    for kind, *rest in operations:
        if kind == "linear":
            weight, bias = map(get, rest)
            x = x @ weight.T + (0 if bias is None else bias)
        elif kind == "conv":
            weight, bias = map(get, rest[:2])
            stride, padding = rest[2:]
            x = lax.conv_general_dilated(x, weight, (stride, stride), [(padding, padding)] * 2)
            x = x if bias is None else x + bias[:, None, None]
        elif kind == "norm":
            weight, bias, mean, variance = (get(name)[:, None, None] for name in rest[:4])
            x = (x - mean) / jnp.sqrt(variance + rest[4]) * weight + bias
        elif kind == "residual":
            x = apply(rest[0], params, constants, x) + apply(rest[1], params, constants, x)
        elif kind == "unflatten":
            x = x.reshape(len(x), *rest[0])
        elif kind == "pool":
            window = (1, 1, rest[0], rest[0])
            x = lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")
        else:
            x = {
                "Tanh": jnp.tanh,
                "ReLU": jax.nn.relu,
                "Flatten": lambda x: x.reshape(len(x), -1),
                "AdaptiveAvgPool2d": lambda x: x.mean((2, 3), keepdims=True),
            }[kind](x)
    return x


def status(field):
    with open("/proc/self/status") as lines:
        return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main():
    described = json.loads((FOLDER / "net.json").read_text())
    operations, outputs = described["net"], described["outputs"]
    arrays = {name: jnp.asarray(value) for name, value in np.load(FOLDER / "net.npz").items()}

    def constant(operations):
        for kind, *rest in operations:
            if kind == "residual":
                yield from constant(rest[0])
                yield from constant(rest[1])
            elif kind == "norm":
                yield from rest[2:4]

    names = set(constant(operations))
    params = {name: value for name, value in arrays.items() if name not in names}
    constants = {name: arrays[name] for name in names}
    functions = {}
    for line in sys.stdin:
        asked = json.loads(line)
        key = asked["way"], asked["size"], asked["x"]
        try:
            x = jnp.asarray(np.load(asked["x"]))
            if key not in functions:
                function = nt.empirical_ntk_fn(
                    lambda p, x: apply(operations, p, constants, x)[:, :outputs],
                    trace_axes=(),
                    vmap_axes=0,
                    implementation=nt.NtkImplementation(asked["way"]),
                )
                size = asked["size"]
                function = jax.jit(function)
                if size and size < len(x):
                    function = nt.batch(function, batch_size=size, device_count=0)
                function(x, None, params).block_until_ready()  # compiled here
                functions[key] = function
            Path("/proc/self/clear_refs").write_text("5")
            before, start = status("VmRSS"), time.perf_counter()
            kernel = functions[key](x, None, params)
            kernel.block_until_ready()
            seconds, peak = time.perf_counter() - start, max(status("VmHWM") - before, 0.0)
            n, o = len(x), outputs
            out = np.asarray(kernel).transpose(0, 2, 1, 3).reshape(n * o, n * o)  # the order of rows; not timed
            path = str(FOLDER / "out.npy")
            np.save(path, out)
            answer = {"out": path, "seconds": seconds, "peak": peak}
            del kernel, out
        except Exception as problem:  # reported, so that the others are kept
            answer = {
                "error": f"{type(problem).__name__}: {str(problem).splitlines()[0][:200] if str(problem) else ''}"
            }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
