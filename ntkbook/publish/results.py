"""A run's figures and tables as files of their own, beside the executed notebook that shows them.

`ntkbook run` tells a chapter's kernel the folder of the run; without one, as in JupyterLab, nothing is written. Files
are numbered as the chapter shows them and named after their titles: ``figures/02-test-error.svg`` and ``.png``,
``tables/01-two-methods.csv`` and ``.parquet``.
"""

import csv
import os
import re
import shutil
import unicodedata
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

FOLDER = "NTKBOOK_RESULTS"  # the environment variable with the run's folder
DPI = 200  # a figure as wide as a page becomes 1400 pixels


def clear(folder: Path) -> None:
    """Remove the figures and tables of an earlier run."""
    for part in ("figures", "tables"):
        shutil.rmtree(folder / part, ignore_errors=True)


def keep_figure(figure: Any, svg: str) -> None:
    """Write a matplotlib figure as SVG, whose text is given, and as PNG, where this kernel has a folder for it."""
    titles = [figure.get_suptitle(), *(ax.get_title() for ax in figure.axes)]
    path = _next("figures", next(filter(None, titles), ""), ".svg")
    if path:
        path.write_text(svg, "utf8")
        layout = figure.get_layout_engine()
        figure.set_layout_engine("none")  # as laid out for the SVG; pixels of another size would move the axes a little
        try:
            figure.savefig(path.with_suffix(".png"), dpi=DPI, bbox_inches="tight", metadata={"Software": None})
        finally:
            figure.set_layout_engine(layout)


def keep_table(rows: Mapping[str, Mapping[str, Any]], head: str, caption: str) -> None:
    """Write a table as CSV and, where pyarrow is installed, as Parquet, where this kernel has a folder for it.

    Args:
        rows: a row's label → column → a number, (value, half-width of its interval), a text, or None. Half-widths get a
            column of their own, ``NAME ±``.
        head: the name of the column of labels.
        caption: what the file is named after.
    """
    path = _next("tables", caption, ".csv")
    if path:
        write_table(path, _columns(rows, head))


def write_table(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write columns of one length to ``path``, a .csv, and to a .parquet beside it where pyarrow is installed."""
    with path.open("w", newline="", encoding="utf8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    if find_spec("pyarrow"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table({name: _one_type(values) for name, values in columns.items()})
        pq.write_table(table, path.with_suffix(".parquet"))


def _one_type(values: Sequence[Any]) -> list[Any]:
    """A column as Parquet takes it: all texts where some are."""
    texts = any(isinstance(value, str) for value in values)
    return [str(value) if texts and value is not None else value for value in values]


def _columns(rows: Mapping[str, Mapping[str, Any]], head: str) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for row in rows.values() for name in row)
    columns: dict[str, list[Any]] = {f"{head} (row)" if head in names else head: list(rows)}
    for name in names:
        cells = [row.get(name) for row in rows.values()]
        pairs = [cell if isinstance(cell, tuple) else (cell, None) for cell in cells]
        columns[name] = [_plain(value) for value, _ in pairs]
        if any(half is not None for _, half in pairs):
            columns[f"{name} ±"] = [_plain(half) for _, half in pairs]
    return columns


def _plain(value: Any) -> str | float | None:
    return value if value is None or isinstance(value, str) else float(value)


def _next(part: str, title: str, suffix: str) -> Path | None:
    folder = os.environ.get(FOLDER)
    if not folder:
        return None
    (Path(folder) / part).mkdir(parents=True, exist_ok=True)
    number = len(list((Path(folder) / part).glob(f"*{suffix}"))) + 1
    ascii_title = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode().lower()
    name = "-".join(re.findall(r"[a-z0-9]+", ascii_title))[:60].strip("-")
    return Path(folder) / part / f"{number:02d}{'-' if name else ''}{name}{suffix}"
