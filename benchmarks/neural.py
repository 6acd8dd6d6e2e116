"""neural-tangents in an environment of its own: made here, given the same weights and inputs, and timed in there."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness import Competitor, Skipped
from ntkbook.experiments.convnets import Residual

WAYS = {1: "Jacobian contraction", 2: "NTK-vector products", 3: "structured derivatives"}
# neural-tangents 0.6.5, the last one; its structured derivatives fail with jax 0.4.30, its import with jax 0.5.
# Without its dependency on TensorFlow, 2 GB that only a part of it needs which the worker leaves out.
PINS = ("jax==0.4.23", "jaxlib==0.4.23", "numpy<2", "scipy<1.13", "frozendict>=2.3.8")
WORKER = Path(__file__).with_name("neural_worker.py")


def environment(cache: Path, install: bool) -> Path:
    """The environment's Python; made where it is not there yet."""
    folder = cache / "neural-tangents-0.6.5"
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        if not install:
            raise Skipped("no environment for neural-tangents, and none may be made")
        shutil.rmtree(folder, ignore_errors=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        for command in (
            [sys.executable, "-m", "venv", str(folder)],
            [*pip, *PINS],
            [*pip, "--no-deps", "neural-tangents==0.6.5"],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                last = (done.stderr.strip() or "no message").splitlines()[-1][:150]
                raise Skipped(f"the environment for neural-tangents could not be made on this Python: {last}")
        ready.touch()
    return python


def described(net: nn.Module, arrays: dict[str, np.ndarray]) -> list[Any]:
    """The network as a list of operations for the worker, and its weights and constants into `arrays`."""

    def store(*values: Tensor | None) -> list[str | None]:
        names = []
        for value in values:
            names.append(None if value is None else f"a{len(arrays)}")
            if value is not None:
                arrays[f"a{len(arrays)}"] = value.detach().numpy()
        return names

    if isinstance(net, nn.Sequential):
        return [operation for part in net for operation in described(part, arrays)]
    if isinstance(net, Residual):
        inside = []
        for norm, convolution in zip(net.norms, net.convolutions):
            inside += [*described(norm, arrays), ["ReLU"], *described(convolution, arrays)]
        return [["residual", inside, described(net.shortcut, arrays)]]
    if isinstance(net, nn.Linear):
        return [["linear", *store(net.weight, net.bias)]]
    if isinstance(net, nn.Conv2d):
        assert isinstance(net.padding[0], int)
        return [["conv", *store(net.weight, net.bias), net.stride[0], net.padding[0]]]
    if isinstance(net, nn.BatchNorm2d):
        return [["norm", *store(net.weight, net.bias, net.running_mean, net.running_var), net.eps]]
    if isinstance(net, nn.Unflatten):
        return [["unflatten", list(net.unflattened_size)]]
    if isinstance(net, nn.MaxPool2d):
        return [["pool", net.kernel_size]]
    return [[type(net).__name__]] if not isinstance(net, nn.Identity) else []


class Worker:
    """One process for a problem, fed by lines of JSON; started when first asked."""

    def __init__(self, net: nn.Module, outputs: int, cache: Path, install: bool) -> None:
        self.net, self.outputs = net, outputs
        self.python: Path | Skipped
        try:  # here, where no time is limited
            self.python = environment(cache, install)
        except Skipped as problem:
            self.python = problem
        self.folder = Path(tempfile.mkdtemp(prefix="neural-"))
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> subprocess.Popen[str]:
        if isinstance(self.python, Skipped):
            raise self.python
        arrays: dict[str, np.ndarray] = {}
        operations = described(self.net, arrays)
        np.savez(self.folder / "net.npz", **arrays)
        (self.folder / "net.json").write_text(json.dumps({"net": operations, "outputs": self.outputs}))
        names = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": str(int(next(self.net.parameters()).dtype == torch.double))}
        threads = sorted(os.sched_getaffinity(0))[: torch.get_num_threads()]  # how XLA learns of it
        return subprocess.Popen(
            [str(self.python), str(WORKER), str(self.folder), ",".join(map(str, threads))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=os.environ | names,
        )  # fmt: skip

    def cost(self, way: int, inputs: tuple, size: int | None) -> tuple[Tensor, float, float]:
        """The answer, and seconds and peak as measured over there, after compiling."""
        if self.process is None or self.process.poll() is not None:
            self.process = self.start()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        (x,) = inputs
        path = self.folder / f"x{len(x)}.npy"
        np.save(path, x.numpy())
        try:
            print(json.dumps({"way": way, "x": str(path), "size": size}), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BaseException:  # a limit of time above all: what it is at is not wanted any more
            self.stop()
            raise
        if not answer:
            self.stop()
            raise MemoryError("the process of neural-tangents ended: it could not allocate, or was killed")
        found = json.loads(answer)
        if "error" in found:
            raise RuntimeError(found["error"])
        return torch.from_numpy(np.load(found["out"], mmap_mode="c")), found["seconds"], found["peak"]

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for stream in (self.process.stdin, self.process.stdout):
                if stream:
                    stream.close()
            self.process = None

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


def competitors(worker: Worker, sizes: tuple[int | None, ...]) -> Mapping[str, Competitor]:
    return {
        f"neural-tangents {name}": Competitor(
            lambda inputs, size, way=way: worker.cost(way, inputs, size)[0], sizes, cost=partial(worker.cost, way)
        )
        for way, name in WAYS.items()
    }
