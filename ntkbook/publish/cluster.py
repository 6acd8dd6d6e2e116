"""A Dask cluster for sweeps: workers of this machine that share its cores and GPUs, or a running one by its address."""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class ClusterError(ValueError):
    """No Dask, no scheduler, or workers that cannot do a sweep's jobs; the message says what to do."""


def check_installed() -> None:
    """ClusterError when the dask extra is not installed."""
    try:
        import distributed  # noqa: F401
    except ImportError as missing:
        raise ClusterError(
            f"a sweep needs the dask extra ({missing.name} is not installed): pip install 'ntkbook[book,dask]'"
        ) from missing


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, each as ``CUDA_VISIBLE_DEVICES`` would name it alone."""
    import torch

    count = torch.cuda.device_count()
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return listed.split(",")[:count] if listed else [str(i) for i in range(count)]


def environments(n_jobs: int, cores: int, gpus: list[str], workers: int = 0) -> list[dict[str, str]]:
    """What each worker of this machine has of its own: a share of the cores, and one GPU.

    Args:
        n_jobs: there are never more workers than jobs.
        cores: to divide among them, as numbers of threads; a number the user has set is kept.
        gpus: as ``CUDA_VISIBLE_DEVICES`` names them; none when the jobs run on the CPU.
        workers: how many, more than there are GPUs share them in turn; if 0, one a GPU or else one per two cores.

    Returns:
        For each worker its environment variables.
    """
    n = min(workers or len(gpus) or max(1, cores // 2), n_jobs)
    threads = {key: os.environ.get(key, str(max(1, cores // n))) for key in THREADS}
    return [threads | ({"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {}) for i in range(n)]


@contextmanager
def local(n_jobs: int, *, cuda: bool, workers: int = 0) -> Iterator[Any]:
    """A client of a cluster on this machine, one process with one thread a worker; see :func:`environments`."""
    from dask.system import CPU_COUNT
    from distributed import Client, Nanny, Scheduler, SpecCluster

    shares = environments(n_jobs, CPU_COUNT, visible_gpus() if cuda else [], workers)
    # A job's memory is its kernel's, which Dask cannot see: no limit. No dashboard: it wants bokeh and a port.
    quiet: Any = logging.CRITICAL  # a level, whatever SpecCluster's annotation says
    common = {"nthreads": 1, "memory_limit": 0, "dashboard": False, "silence_logs": quiet}
    spec = {i: {"cls": Nanny, "options": {**common, "env": share}} for i, share in enumerate(shares)}
    here = {"host": "127.0.0.1", "port": 0, "dashboard": False, "dashboard_address": "127.0.0.1:0"}  # any free ports
    scheduler = {"cls": Scheduler, "options": here}
    with (
        SpecCluster(workers=spec, scheduler=scheduler, silence_logs=quiet) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        client.run(_leave_interrupts_to_the_client)
        yield client


@contextmanager
def remote(address: str, timeout: float = 30.0) -> Iterator[Any]:
    """A client of a running scheduler; ClusterError when it does not answer or has no workers with one thread each."""
    from distributed import Client

    try:
        client: Any = Client(address, timeout=timeout, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"no Dask scheduler answers at {address!r} ({error}); expected an address such as tcp://host:8786"
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=timeout)
        except TimeoutError as error:
            raise ClusterError(f"the scheduler at {address} has no workers; start some with `dask worker`") from error
        wide = [worker for worker, threads in client.nthreads().items() if threads != 1]
        if wide:
            raise ClusterError(f"expected workers with one thread, not so {', '.join(wide)}: dask worker --nthreads 1")
        yield client


def _leave_interrupts_to_the_client() -> None:
    """A terminal sends Ctrl-C to all of its processes, but the client is the one to end the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def check_workers(client: Any, check: Callable[..., None], *arguments: Any) -> None:
    """Call ``check`` on every worker; ClusterError that names the first worker where it fails, and why."""
    for worker, told in client.run(check, *arguments, on_error="return").items():
        if isinstance(told, BaseException):
            raise ClusterError(f"worker {worker} cannot run the sweep: {told}") from told
