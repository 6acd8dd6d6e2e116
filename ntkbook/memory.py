"""How much memory there is: chunk sizes follow it, and what cannot fit is refused before it is begun."""

import os

import torch

GIB = 2**30


def total_memory(device: torch.device) -> int:
    """Memory of `device` in bytes: the machine's for the CPU, the card's for a GPU; 8 GiB where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 8 * GIB


def available_memory(device: torch.device) -> int:
    """Bytes that can be had now: free memory plus, on Linux, what the page cache would give up."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return total_memory(device)


def working_memory(device: torch.device) -> int:
    """Bytes that one chunk of work may take.

    From the total and not from what is free, so that chunks, and with them the last bits of a result, are the
    same in every run on one machine.
    """
    return min(total_memory(device) // 16, GIB // 2)


def require_memory(nbytes: int, device: torch.device, what: str, instead: str) -> None:
    """Raise MemoryError, saying how much `what` takes and what to do `instead`, if it cannot fit on `device`."""
    available = available_memory(device)
    if nbytes > available:
        raise MemoryError(
            f"{what} takes {nbytes / GIB:.1f} GiB, and {available / GIB:.1f} GiB are available on {device}. {instead}"
        )
