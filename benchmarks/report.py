"""The table and the plot of a run's results."""

import json
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.harness import LATE, MEMORY
from ntkbook.publish import figures

# Okabe and Ito's, and three more
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#7F7F7F", "#56B4E9", "#000000", "#882255", "#999933"
)  # fmt: skip
MARKERS = "osD^vP"


def table(results: dict[str, Any]) -> str:
    """Markdown: a row a competitor, and one for the estimate, under a heading a problem."""
    machine = results["machine"]
    rates = f"torch {machine['torch']}, {machine['threads']} threads, {machine['cpu']}"
    lines = [
        f"{rates}. Medians of {machine['repeats']} rounds in which all take turns, each at its best chunk size; ratios",
        "are to the first row of a problem. Memory is the peak above the process before the call; errors are relative",
        "to the largest entry. The estimate: multiply-adds of one route, at this run's rate of such products; it is no",
        "bound, and a faster route goes below it.",
        "",
    ]
    for name, found in results["problems"].items():
        lines += [f"### {singular(name)}", ""]
        if "reason" in found:
            lines += [found["reason"], ""]
            continue
        lines += [
            "| way | median | range | ratio | peak memory | error | chunk size | chunk sizes tried |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in found["rows"]:
            tried = ", ".join(f"{trial['chunk_size'] or 'its own'}: {outcome(trial)}" for trial in row["sweep"])
            if "reason" in row:
                cells = [row["name"], row["reason"], "", "", "", "", "", tried]
            else:
                low, high = min(row["seconds"]), max(row["seconds"])
                median = time(row["median"]) + (" (once)" if len(row["seconds"]) == 1 else "")
                cells = [
                    row["name"], median, f"{time(low)} to {time(high)}", ratio(row["ratio"]),
                    f"{row['peak'] / 1e6:,.0f} MB", f"{row['error']:.0e}", str(row["chunk_size"] or "its own"), tried,
                ]  # fmt: skip
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines += [f"| estimate | {time(found['floor'])} | | {ratio(found['floor_ratio'])} | | | | |", ""]
    return "\n".join(lines)


def singular(name: str) -> str:
    """A problem's name, where it has one vector."""
    return name.replace(" 1 vectors", " 1 vector")


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def outcome(trial: dict[str, Any]) -> str:
    return time(trial["seconds"]) if "seconds" in trial else trial["reason"]


def time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def plot(results: dict[str, Any]) -> str:
    """SVG: a line of dots a problem, time relative to ours on a log scale, the estimate, how many passed a limit."""
    figures.style()
    shown = {name: found for name, found in results["problems"].items() if found.get("floor_ratio")}
    styles: dict[str, dict[str, Any]] = {}
    libraries: dict[str, list[str]] = {}
    figure, ax = plt.subplots(figsize=(7, 1.6 + 0.27 * len(shown)))
    for y, found in enumerate(shown.values()):
        ax.plot(found["floor_ratio"], y, "|", color=figures.TRUTH, markersize=11, label="estimate" if y == 0 else None)
        beyond = sum(any(limit in row.get("reason", "") for limit in (LATE, MEMORY)) for row in found["rows"])
        if beyond:
            ax.text(1.01, y, f"{beyond} over a limit", transform=ax.get_yaxis_transform(), fontsize=7, va="center")
        for row in found["rows"]:
            if "ratio" not in row:
                continue
            new = row["name"] not in styles
            if new:  # a colour a library, a marker a way
                library = re.split("[ ,]", row["name"])[0]
                ways = libraries.setdefault(library, [])
                colour = COLOURS[list(libraries).index(library) % len(COLOURS)]
                styles[row["name"]] = {"color": colour, "marker": MARKERS[len(ways) % len(MARKERS)]}
                ways.append(row["name"])
            ax.plot(row["ratio"], y, linestyle="", label=row["name"] if new else None, **styles[row["name"]])
    ax.axvline(1, color=figures.CONTEXT, linewidth=0.8)
    ax.set(xscale="log", xlabel="time relative to ntkbook; Fisher-vector products: to one gradient")
    ax.set_yticks(range(len(shown)), [singular(name) for name in shown], fontsize=7)
    ax.invert_yaxis()
    if shown:
        figure.legend(loc="outside lower center", ncols=3, fontsize=7)
    picture = figures.svg(figure)
    plt.close(figure)
    return picture


def write(results: dict[str, Any], out: Path) -> None:
    """results.json, table.md and plot.svg, each replaced whole."""
    texts = {"results.json": json.dumps(results, indent=1), "table.md": table(results), "plot.svg": plot(results)}
    for name, text in texts.items():
        part = out / f"{name}.part"
        part.write_text(text, "utf8")
        part.replace(out / name)
