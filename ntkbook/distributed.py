"""A linearisation whose work is spread over processes by torch.distributed: one a GPU, or one a machine.

Every process (rank) runs the same program on the same data and network, takes its share of the examples in every
product and Gram matrix, and gets the whole result. So `NTKGP`, `NTKKernel` and `ntkbook.operators` are spread too:

    # script.py; start it by: torchrun --nproc-per-node 2 script.py
    import torch
    import torch.distributed as dist
    from ntkbook import NTKGP, DistributedLinearization

    dist.init_process_group("gloo")  # or "nccl", after torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.manual_seed(0)  # the same network and data everywhere; on a GPU, move both to it
    net = torch.nn.Sequential(torch.nn.Linear(1, 50), torch.nn.Tanh(), torch.nn.Linear(50, 1))
    x = torch.linspace(-2, 2, 500)[:, None]
    gp = NTKGP(DistributedLinearization(net), noise=0.1, solver="cg")  # or space="parameter", or by Cholesky
    mean = gp.condition(x, x.sin()).mean(x)  # every rank makes every call, or the others wait for it
    if dist.get_rank() == 0:
        print(mean)
    dist.destroy_process_group()

What is not made of these products and matrices (Cholesky factors, orthogonalisation, `jacobian`, the passes of
Fisher-vector products) every rank does for itself, so ranks should be alike: the same kind of device, torch and number
of threads. Where they come to differ, the next call raises an error on all of them. An error on one rank alone, such as
too little memory, ends the others when it exits (torchrun sees to that) or when the process group's timeout is over:
`init_process_group(timeout=...)`.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from ntkbook.checks import outside_inference_mode
from ntkbook.linearize import Linearization


class DistributedLinearization(Linearization):
    """`Linearization` with `outputs`, `jvp`, `vjp`, `gram` and `diagonal` shared among the ranks of torch.distributed.

    To be called on every rank in the same order with the same arguments, as is compared in every call. Communicated
    are p numbers a vector in `vjp`, n·o in `jvp`, half the matrix in `gram`. The result is that of one process to
    rounding, and to the last bit the same on every rank. Arguments are `Linearization`'s.

    Raises:
        RuntimeError: torch.distributed is not initialised; or a rank has gone.
        ValueError: ranks disagree in network, inputs, or calls; nccl and a network on the CPU; as `Linearization`.
        NotImplementedError: inputs or vectors that require a gradient, which does not cross ranks.
    """

    @outside_inference_mode
    def __init__(
        self,
        net: nn.Module,
        params: Iterable[str] | Mapping[str, Tensor] | None = None,
        *,
        chunk_size: int | None = None,
    ) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "torch.distributed is not initialised. Start the script by `torchrun --nproc-per-node 2 script.py`, "
                'and in it call torch.distributed.init_process_group("gloo") first, or "nccl" with a GPU a process.'
            )
        super().__init__(net, params, chunk_size=chunk_size)
        if dist.get_backend() == "nccl" and self.device.type != "cuda":
            raise ValueError(
                f'net: expected parameters on a GPU for the backend "nccl", got {self.device}. Move the network there '
                'first, or use "gloo".'
            )
        values = {**self.params, **self.constants}
        facts = {
            "parameters to linearise in": list(self.params),
            "networks": (repr(net), [(name, tuple(value.shape), value.dtype) for name, value in values.items()]),
            "values in the network": [_checksum(value) for value in values.values()],
        }
        self._require_agreement(facts)

    def to(
        self,
        *where: torch.device | torch.dtype | str | int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Linearization:
        """The same linearisation on another device or in another precision, on every rank."""
        other = object.__new__(type(self))
        vars(other).update(vars(super().to(*where, device=device, dtype=dtype)))
        return other

    @outside_inference_mode
    def outputs(self, x: Tensor) -> Float[Tensor, "n o"]:
        o = self._begin("outputs", x)
        return self._gather(super().outputs, x, 1, o)

    @outside_inference_mode
    def jvp(self, x: Tensor, v: Tensor | Mapping[str, Tensor]) -> Float[Tensor, "n o"] | Float[Tensor, "n o k"]:
        v = self.flatten(v) if isinstance(v, Mapping) else v
        o, local = self._begin("jvp", x, vectors=v), super().jvp
        return self._gather(lambda part: local(part, v), x, 1, o, *v.shape[1:])

    @outside_inference_mode
    def vjp(self, x: Tensor, u: Tensor) -> Float[Tensor, " p"] | Float[Tensor, "p k"]:
        o, mine = self._begin("vjp", x, vectors=u), self.share(len(x))
        if u.shape[:1] != x.shape[:1]:  # which a rank's part need not show
            raise ValueError(f"u: expected ({len(x)}, {o}) or ({len(x)}, {o}, k), got {tuple(u.shape)}.")
        total = super().vjp(_some(x, mine), _some(u, mine)).contiguous()
        if mine.start == mine.stop:
            total.zero_()
        dist.all_reduce(total)
        return total

    @outside_inference_mode
    def gram(
        self,
        x: Tensor,
        x2: Tensor | None = None,
        *,
        output: int | None = None,
        trace: bool = False,
        memory: int | None = None,
    ) -> Float[Tensor, "rows columns"]:
        o = self._begin(f"gram, output={output}, trace={trace}", x, x2)
        n, m, per = len(x), len(x if x2 is None else x2), o if output is None and not trace else 1
        self._require_room((n * per, m * per), "The Gram matrix", "Use gram_rows, or fewer points.")
        local = partial(super().gram, output=output, trace=trace, memory=memory)
        if x2 is not None:  # shared along the longer side: predictions can be few
            if n >= m:
                return self._gather(lambda part: local(part, x2), x, per, m * per)
            return self._gather(lambda part: local(part, x), x2, per, n * per).T
        strips = _strips(n, dist.get_world_size())
        mine = strips[dist.get_rank()]
        strip = local(_some(x, mine))[: (mine.stop - mine.start) * per]
        if mine.start < mine.stop < n:
            strip = torch.cat([strip, local(x[mine], x[mine.stop :])], 1)
        out = self._empty(n * per, n * per)
        for rank, rows in enumerate(strips):
            a, b = rows.start * per, rows.stop * per
            if a < b:
                block = strip if rows is mine else self._empty(b - a, n * per - a)
                dist.broadcast(block, rank)
                out[a:b, a:] = block
                out[b:, a:b] = block[:, b - a :].T
        return out

    @outside_inference_mode
    def gram_rows(self, x: Tensor, x2: Tensor | None = None) -> Float[Tensor, "rows columns"]:
        """This rank's rows of J(x) J(x2)ᵀ, those of the examples x[share(n)]: no rank holds the whole matrix."""
        o, mine = self._begin("gram_rows", x, x2), self.share(len(x))
        return super().gram(_some(x, mine), x if x2 is None else x2)[: (mine.stop - mine.start) * o]

    @outside_inference_mode
    def diagonal(self, x: Tensor, *, output: int | None = None, memory: int | None = None) -> Float[Tensor, " rows"]:
        o = self._begin(f"diagonal, output={output}", x)
        local = partial(super().diagonal, output=output, memory=memory)
        return self._gather(local, x, o if output is None else 1)

    def share(self, n: int) -> slice:
        """Which of n examples are this rank's: as many as any other rank's, or one more."""
        return _shares(n, dist.get_world_size())[dist.get_rank()]

    # ------------------------------------------------------------------ inside

    def _begin(self, call: str, x: Tensor, x2: Tensor | None = None, vectors: Tensor | None = None) -> int:
        """Raise on every rank where one has other arguments; return the number of outputs."""
        inputs = [x] if x2 is None else [x, x2]
        given = inputs if vectors is None else [x, vectors]
        facts = {
            "calls": call,
            "shapes or dtypes": [(tuple(tensor.shape), tensor.dtype) for tensor in given],
            "inputs": [_checksum(tensor) for tensor in inputs],
        }
        self._require_agreement(facts, 0.0 if vectors is None else float(vectors.norm()))
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
            raise NotImplementedError(
                f"{call}: gradients do not cross ranks. Use Linearization for derivatives in these arguments, or "
                "detach() them."
            )
        return max(self._inspect(tensor)[0] for tensor in inputs)

    def _require_agreement(self, facts: Mapping[str, object], size: float = 0.0) -> None:
        """Raise ValueError where ranks differ in three facts, or in the vectors' size by more than rounding."""
        codes = [zlib.crc32(repr(fact).encode()) for fact in facts.values()]
        numbers = torch.tensor([*codes, size if math.isfinite(size) else -1.0], dtype=torch.double, device=self.device)
        extremes = torch.stack([numbers, -numbers])
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
        spread = extremes.sum(0)
        spread[-1] -= torch.finfo(self.dtype).eps ** 0.5 * extremes[0, -1].abs()
        names = [name for name, differs in zip([*facts, "vectors"], (spread > 0).tolist()) if differs]
        if names:
            raise ValueError(
                f"Ranks have different {', '.join(names)}; rank {dist.get_rank()} here: {[*facts.values()][:2]}. Every "
                "rank has to make the same calls, with the same network and all of the data, of which it takes its "
                "share itself. Usual causes: a shard a rank, no torch.manual_seed, a call on one rank alone, devices "
                "or numbers of threads that are not the same."
            )

    def _gather(self, compute: Callable[[Tensor], Tensor], x: Tensor, per: int, *shape: int) -> Tensor:
        """Every rank's rows of a result, `per` an example and of this shape, as `compute` makes them of its part."""
        out, mine = self._empty(len(x) * per, *shape), self.share(len(x))
        local = compute(_some(x, mine))
        for rank, part in enumerate(_shares(len(x), dist.get_world_size())):
            rows = out[part.start * per : part.stop * per]
            if part == mine:
                rows.copy_(local[: len(rows)])
            if len(rows):
                dist.broadcast(rows, rank)
        return out

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)


def _shares(n: int, ranks: int) -> list[slice]:
    return [slice(*ends) for ends in pairwise(n * rank // ranks for rank in range(ranks + 1))]


def _strips(n: int, ranks: int) -> list[slice]:
    """Rows of a symmetric matrix whose parts from the diagonal to the right have about equal areas."""
    ends = (round(n * (1 - math.sqrt(1 - rank / ranks))) for rank in range(ranks + 1))
    return [slice(*pair) for pair in pairwise(ends)]


def _some(tensor: Tensor, part: slice) -> Tensor:
    """A rank's part; where that is empty the first example, so that what is wrong is an error on every rank."""
    return tensor[part] if part.start < part.stop else tensor[:1]


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
