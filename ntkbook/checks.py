"""What a network must be for a linearisation to mean something, and errors that say what to do where it is not."""

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

BATCH_NORM = nn.modules.batchnorm._BatchNorm
INSTANCE_NORM = nn.modules.instancenorm._InstanceNorm
RANDOM = (nn.modules.dropout._DropoutNd, nn.RReLU)
CALLING = threading.RLock()
"""Held while a network is called: meanwhile it holds other tensors and hooks, which another thread, also with a network
that shares its modules, would find there and leave there. Of forward mode, too, torch has one for all threads."""


def outside_inference_mode(method: Callable) -> Callable:
    """Derivatives need autograd, which inference mode turns off for good: leave it, with copies of its tensors."""

    def normal(value):
        if isinstance(value, Mapping):
            return {name: normal(entry) for name, entry in value.items()}
        return value.clone() if isinstance(value, Tensor) and value.is_inference() else value

    @wraps(method)
    def wrapped(self, *args, **kwargs):
        enabled = torch.is_grad_enabled()  # inference_mode(False) would turn gradients on inside no_grad
        with torch.inference_mode(False), torch.set_grad_enabled(enabled):
            return method(self, *map(normal, args), **normal(kwargs))

    return wrapped


def require_tensor(value: Any, name: str, shape: str) -> None:
    """Raise TypeError for anything else: a list or an array is not turned into a tensor on the quiet."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name}: expected a torch.Tensor {shape}, got {type(value).__name__}. torch.as_tensor({name}) makes one."
        )


def require_variance(name: str, value: float | Tensor) -> None:
    """Raise ValueError for what is not one positive, finite number."""
    if isinstance(value, Tensor) and value.ndim:
        raise ValueError(
            f"{name}: expected one number (a variance), got {tuple(value.shape)}. A noise for each point is for "
            "condition(x, y, noise=...)."
        )
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a positive number (a variance), got {value}.")


def require_module(net: Any) -> None:
    """Raise TypeError for what is no network, and for one that wraps another or has no parameters yet."""
    if not isinstance(net, nn.Module):
        raise TypeError(f"net: expected a torch.nn.Module, got {type(net).__name__}.")
    for name, module in net.named_modules():
        what = f"net: {type(module).__name__} {name!r}"
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise TypeError(f"{what} spreads calls itself. Pass the network in it, its .module.")
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"{what} is compiled, and its tensors cannot be replaced. Pass the module it was made from."
            )
        if any(map(is_lazy, module.parameters(recurse=False))):
            raise TypeError(f"{what} has no parameters before its first call. Run the network once, net(x).")


@contextmanager
def named(what: str, x: Tensor, dtype: torch.dtype) -> Iterator[None]:
    """Say what it was given, and the usual causes, where torch refuses examples x (n, ...) in a call of the user's.

    Errors about something else than types and shapes are the user's own, and fly as they are.
    """
    try:
        yield
    except (RuntimeError, IndexError) as error:
        message = str(error)
        own = not any(word in message.lower() for word in ("type", "size", "shape", "dimension", "index", "indices"))
        if own or isinstance(error, torch.OutOfMemoryError | NotImplementedError):
            raise
        if not x.is_floating_point():
            hint = f"Unless these are tokens, and within an embedding's size, convert them: x.to({dtype})."
        elif "indices" in message or "Long" in message:
            hint = "Tokens are integers: x.long(); where inputs have to be real numbers, that is for forward to say."
        elif "type" in message:  # "must have the same dtype", "Input type (double) and bias type (float) should be"
            hint = (
                f"All has to be {dtype}, as x is: x.new_zeros and torch.zeros_like make such tensors inside a network, "
                f".to({dtype}) such a module. NTKGP works in float64 unless it is given dtype=torch.float32."
            )
        elif x.ndim == 1:
            hint = "n examples of one number each are (n, 1): x[:, None]."
        else:
            hint = "x is (n, ...), n examples of the shape that the network takes."
        raise ValueError(
            f"x: {what} fails on examples of shape {tuple(x.shape[1:])} in {x.dtype} "
            f"({message.partition(chr(10))[0]}). {hint}"
        ) from error


def place(where: tuple, device: Any, dtype: torch.dtype | None) -> tuple[Any, torch.dtype | None]:
    """The device and dtype of .to(device), .to(dtype) and .to(device, dtype), as torch's own take them."""
    for value in where:
        if isinstance(value, torch.dtype):
            dtype = value
        else:
            device = torch.device(value)
    return device, dtype


def require_pure(net: nn.Module) -> None:
    """Raise ValueError where a module makes an example's output depend on its batch or on chance."""
    for name, module in net.named_modules():
        what = f"{type(module).__name__} {name!r}"
        if isinstance(module, BATCH_NORM) and module.running_mean is None:
            raise ValueError(
                f"{what} keeps no running statistics, so an example's output depends on its batch. "
                "Use track_running_stats=True, or another normalisation."
            )
        statistics = isinstance(module, BATCH_NORM) or (
            isinstance(module, INSTANCE_NORM) and module.track_running_stats
        )
        if module.training and statistics:
            raise ValueError(
                f"{what} is in train mode, where an example's output depends on its batch and the running statistics "
                "change. Call net.eval() first."
            )
        rate = getattr(module, "dropout", 0.0)  # a number in RNNs and attention
        if module.training and (isinstance(module, RANDOM) or (isinstance(rate, float) and rate > 0)):
            raise ValueError(f"{what} is in train mode, where outputs are random. Call net.eval() first.")


def probe(
    call: Callable[[Mapping[str, Tensor], Tensor], Any], params: Mapping[str, Tensor], example: Tensor
) -> tuple[int, int]:
    """Run one example, (1, ...); return the number of outputs, and the bytes that autograd keeps of its forward pass.

    Raises ValueError for outputs other than (1,) or (1, o), and for a network that draws random numbers.
    """
    saved = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal saved
        if tensor.untyped_storage().data_ptr() not in weights:  # these are there once, whatever the examples
            saved += tensor.numel() * tensor.element_size()
        return tensor.detach()  # itself, saved by the operation that made it, would never be freed

    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    weights = {value.untyped_storage().data_ptr() for value in leaves.values()}
    cuda = [example.device] if example.device.type == "cuda" else []
    with torch.random.fork_rng(cuda), torch.enable_grad():
        before = _rng_states(cuda)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = call(leaves, example)
        if any(not torch.equal(a, b) for a, b in zip(before, _rng_states(cuda))):
            raise ValueError(
                "The network draws random numbers, so it has no one Jacobian. Turn that off: net.eval() does for "
                "Dropout, and for functional.dropout where it is given training=self.training."
            )
    if not isinstance(outputs, Tensor) or outputs.ndim not in (1, 2) or len(outputs) != 1:
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(
            f"The network must map n examples to (n,) or (n, o); from one example it made {got}. Flatten its "
            "outputs to (n, o); where it squeezes, name the dimension: squeeze(-1)."
        )
    return (1 if outputs.ndim == 1 else outputs.shape[1]), max(saved, 8 * outputs.numel())


def require_separate(
    call: Callable[[Mapping[str, Tensor], Tensor], Any], params: Mapping[str, Tensor], pair: Tensor
) -> None:
    """Raise ValueError unless each of two examples (2, ...) has the outputs that it has alone, in either order."""
    with torch.no_grad():
        both, turned = call(params, pair), call(params, pair.flip(0))
        alone = [call(params, example) for example in pair.split(1)]
    if both.shape != (2, *alone[0].shape[1:]):
        raise ValueError(f"The network must map n examples to (n,) or (n, o); from two it made {tuple(both.shape)}.")
    alone = torch.cat(alone)
    differences = torch.stack([both - alone, turned.flip(0) - alone]).abs()
    if differences.max() > torch.finfo(alone.dtype).eps ** 0.5 * alone.abs().max():
        raise ValueError(
            "An example's output depends on the others in its batch, so the network has no Jacobian of one example. "
            "Usual causes: nn.RNN, nn.GRU, nn.LSTM, nn.MultiheadAttention or nn.TransformerEncoderLayer without "
            "batch_first=True, which take dimension 0 for time; a statistic or a sum over dimension 0; attention "
            "between examples."
        )


def require_one_derivative(
    push: Callable[[Tensor], Tensor], pull: Callable[[Tensor], Tensor], v: Float[Tensor, " p"]
) -> None:
    """Raise where forward and reverse mode differ on one example, uᵀ(J v) ≠ (Jᵀu)ᵀ v, for push = J and pull = Jᵀ.

    torch.no_grad stops reverse mode only, so a network that uses it has another Jacobian in each.
    """
    forward = push(v)
    u = 1 + 0.1 * torch.arange(forward.shape[1], dtype=v.dtype, device=v.device).sin()
    back = pull(u[None])
    one, other = (forward[0] * u).sum(), (back * v).sum()
    size = u.norm() * forward.norm() + back.norm() * v.norm() / len(v) ** 0.5  # what signs at random leave of it
    if (one - other).abs() > torch.finfo(v.dtype).eps ** 0.5 * size:
        raise NotImplementedError(
            "jvp: forward and reverse mode differentiate this network differently. Usual causes: torch.no_grad() "
            "inside forward, which stops reverse mode only (use .detach(), or linearise in the other parameters), "
            "or a custom autograd.Function whose jvp and backward disagree."
        )


def _rng_states(cuda: list[torch.device]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in cuda)]


def require_double(device: torch.device | str, dtype: torch.dtype) -> None:
    """Raise ValueError where dtype is torch.float64 and the device, such as Apple's MPS, has none."""
    if dtype != torch.float64 or torch.device(device).type in ("cpu", "cuda"):
        return
    torch.empty(0, dtype=torch.float32, device=device).neg()  # what fails here has nothing to do with the dtype
    try:
        torch.empty(0, dtype=dtype, device=device).neg()
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"device: {device} has no {dtype}, in which NTKGP computes unless told otherwise: pass "
            "dtype=torch.float32, which loses the kernel's small eigenvalues, or stay on the CPU."
        ) from error


@contextmanager
def explained(method: str) -> Iterator[None]:
    """Say what to do where torch.func meets an operation that it cannot transform.

    The fused nn.TransformerEncoderLayer and nn.MultiheadAttention of evaluation, which have no derivatives, are off
    inside; the fused kernels of functional.scaled_dot_product_attention are the caller's choice, and stay. One
    thread at a time.
    """
    CALLING.acquire()
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        first = str(error).partition("\n")[0]
        if "forward AD" in str(error) or "forward-mode" in str(error):
            fused_attention = "run it under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
            others = "torch.cdist, nn.EmbeddingBag, nn.LSTM and weight_norm are among those without."
            raise NotImplementedError(
                f"{method}: the network uses an operation without a forward-mode derivative ({first}). "
                + (f"Fused attention has none: {fused_attention}" if "attention" in first else others)
                + " vjp, jacobian, gram, diagonal and Fisher-vector products by double_backward need none."
            ) from error
        if any(word in str(error) for word in ("vmap", "functorch", "data-dependent", "torch.func", "broadcast shape")):
            raise NotImplementedError(
                f"{method}: torch.func cannot transform this network ({first}). Usual causes: "
                "a torch.autograd.Function without setup_context, an in-place operation on a constant, .item() or an "
                "if on a tensor's value."
            ) from error
        raise
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        CALLING.release()
