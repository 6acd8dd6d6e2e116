"""Executing one notebook with papermill, and asking its kernel how much memory it used."""

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import Any

from nbclient.exceptions import DeadKernelError
from papermill import execute_notebook
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from papermill.utils import remove_args

from ntkbook.publish import notebooks
from ntkbook.publish.results import FOLDER
from ntkbook.publish.runcard import environment

_PEAK = "__import__('resource').getrusage(0).ru_maxrss"  # KiB on Linux, bytes on macOS, not there on Windows


class ChapterError(RuntimeError):
    """A cell of a chapter failed; the message says which and why."""


class _Client(PapermillNotebookClient):
    peak_mib: float | None = None

    def papermill_execute_cells(self) -> None:
        super().papermill_execute_cells()
        reply = self.wait_for_reply(self.kc.execute("", silent=True, user_expressions={"peak": _PEAK}))  # pyright: ignore
        with contextlib.suppress(KeyError, TypeError, ValueError):
            peak = float(reply["content"]["user_expressions"]["peak"]["data"]["text/plain"])  # type: ignore[index]
            _Client.peak_mib = peak / (1024**2 if sys.platform == "darwin" else 1024)


class _Engine(NBClientEngine):
    """papermill's engine with a client that also asks for the kernel's peak memory."""

    @classmethod
    def execute_managed_notebook(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, nb_man: Any, kernel_name: str, start_timeout: int = 60, variables: Any = None, **kwargs: Any
    ) -> Any:
        kwargs = remove_args(["input_path", "log_output", "stdout_file", "stderr_file"], **kwargs)
        kwargs |= {"kernel_name": kernel_name, "startup_timeout": start_timeout}
        # ipykernel warns at every start that its local sockets are not encrypted, and tells of errors when interrupted.
        client = _Client(nb_man, extra_arguments=["--IPKernelApp.log_level=50"], **kwargs)
        return client.execute(env={**os.environ, **(variables or {})})


papermill_engines.register("ntkbook", _Engine)


def execute(
    nb: Any, output: Path, values: dict[str, Any], *, cwd: Path, name: str, progress: bool = True
) -> float | None:
    """Execute a notebook into ``output``, which is written after every cell, so that it is there when one fails.

    Figures and tables go beside it: `ntkbook.publish.results`.

    Args:
        nb: the chapter without outputs.
        output: where the executed notebook goes; an absolute path.
        values: parameters to inject; nothing is injected when empty.
        cwd: the kernel's folder.
        name: the chapter, for the progress bar and messages.
        progress: a bar over cells on standard error.

    Returns:
        The kernel's peak resident memory in MiB, None where the system does not tell.

    Raises:
        ChapterError: a cell failed, or the kernel died.
    """
    bare = output.with_suffix(".input.ipynb")
    notebooks.write(nb, bare)
    logging.getLogger("papermill").setLevel(logging.ERROR)
    bar: Any = {"desc": f"  {name}", "position": 1, "leave": False, "file": sys.stderr, "ncols": 90}
    bar = bar if progress else False
    _Client.peak_mib = None
    try:
        execute_notebook(
            _literal(bare), _literal(output), values, engine_name="ntkbook", kernel_name="python3", cwd=cwd,
            progress_bar=bar, variables={**environment(), FOLDER: str(output.parent)},
        )  # fmt: skip
    except PapermillExecutionError as failure:
        where = f"cell {failure.cell_index + 1} (In [{failure.exec_count}]), {_starts(failure.source)}"
        raise ChapterError(
            f"{name}: {where}\n  {failure.ename}: {failure.evalue}\n  what ran so far is in {output}"
        ) from failure
    except DeadKernelError as failure:
        raise ChapterError(
            f"{name}: the kernel died in {_last_cell(output)}; perhaps it ran out of memory\n"
            f"  what ran so far is in {output}"
        ) from failure
    except KeyboardInterrupt:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it tells of the kernel's tasks that are left behind
        raise
    finally:
        bare.unlink(missing_ok=True)
    return _Client.peak_mib


def _literal(path: Path) -> str:
    """A path that means itself to papermill, which puts parameters in where it finds braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _starts(source: str) -> str:
    return f"which starts with: {(source.strip().splitlines() or [''])[0]}"


def _last_cell(output: Path) -> str:
    """The last cell that papermill started, as its notebook tells."""
    cells = enumerate(notebooks.read(output).cells if output.exists() else [], start=1)
    started = [(number, cell) for number, cell in cells if cell.metadata.get("papermill", {}).get("start_time")]
    return f"cell {started[-1][0]}, {_starts(started[-1][1].source)}" if started else "no cell, before the first"
