"""House style: what figures of all chapters share, so that a method has one colour and a figure one look."""

import base64
import html
import io
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from ntkbook.publish.claims import STAND_INS, Bundle
from ntkbook.publish.results import keep_figure, keep_table

_COORDINATES = re.compile(r'(?<=\s)(?:d|x|y)="[^"]*"')
_DIGITS = re.compile(r"(\.\d\d)\d+")
SVG_METADATA = {"Date": None, "Creator": None}  # what matplotlib would stamp on a file, left out


class Method(NamedTuple):
    """How a method is drawn, everywhere."""

    label: str
    colour: str
    line: str = "-"
    marker: str = "o"


# Okabe and Ito's colours, which readers with any colour vision tell apart; line styles tell them apart in print.
METHOD = {
    "ntk": Method("NTK", "#0072B2"),
    "ntk_fitted": Method("NTK, s² and σ² fitted", "#56B4E9", "--", "s"),
    "ntk_untrained": Method("NTK of the untrained network", "#7F7F7F", ":", "^"),
    "rbf": Method("RBF GP per task", "#D55E00", "-", "D"),
    "rbf_shared": Method("RBF GP, shared", "#E69F00", "--", "v"),
    "ablr": Method("ABLR", "#009E73", "-", "P"),
    "source": Method("network, not adapted", "#000000", ":", "x"),
    "last_layer": Method("last layer retrained", "#CC79A7", "--", "<"),
    "last_layer_converged": Method("last layer, until converged", "#CC79A7", "-", "p"),
    "last_layer_exact": Method("last layer, Bayesian", "#AA3377", ":", "X"),
    "rbf_residual": Method("RBF GP on the network's residuals", "#E69F00", "--", "v"),
    "rbf_source": Method("RBF GP of the source, not adapted", "#8C6D31", ":", "d"),
    "ntk_refitted": Method("NTK, fitted to the task", "#117733", "--", "s"),
    "ntk_around_network": Method("NTK around the network", "#332288", "--", "s"),
    "season": Method("yearly sine, least squares", "#999933", "-.", "h"),
    "zero": Method("zero", "#AAAAAA", ":", "."),
    "fine_tuning": Method("full fine-tuning", "#882255", "-.", ">"),
}
CONTEXT, TRUTH, TEST = "#4D4D4D", "#000000", "#B22222"


def style() -> None:
    """Set the house style: SVG figures, byte-identical from run to run, readable at a phone's width."""
    from IPython.core.getipython import get_ipython
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    mpl.rcParams.update(
        {
            "figure.figsize": (7.0, 3.2),
            "figure.constrained_layout.use": True,
            "figure.facecolor": "white",
            "savefig.facecolor": "white",  # a dark page must not show through
            "font.size": 10,
            "axes.titlesize": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "legend.frameon": False,
            "lines.linewidth": 1.5,
            "lines.markersize": 4,
            "svg.hashsalt": "ntkbook",
            "svg.fonttype": "path",  # letters as outlines: the same on every machine
        }
    )
    set_matplotlib_formats("svg")
    shell: Any = get_ipython()
    if shell is not None:
        shell.display_formatter.formatters["image/svg+xml"].for_type(Figure, svg)  # smaller than IPython's own


def title(where: Axes | Figure, text: str, profile: str, *, paper: str = "") -> None:
    """Title a figure or axes, after the paper's figure that it redraws, such as "Figure 1".

    In the quick profile, and where data stand in for the paper's, words that say so take that name's place, so that
    nobody takes it for a result.
    """
    if profile == "quick":
        text = f"{text} (quick)"
    elif STAND_INS:
        text = f"{text} (stand-in data)"
    elif paper:
        text = f"{paper}: {text}"
    if isinstance(where, Figure):
        where.suptitle(text)
    else:
        where.set_title(text)


def posterior_panel(
    ax: Axes,
    x: ArrayLike,
    mean: ArrayLike,
    sd: ArrayLike,
    *,
    method: str = "ntk",
    context: tuple[ArrayLike, ArrayLike] | None = None,
    test: tuple[ArrayLike, ArrayLike] | None = None,
    truth: ArrayLike | None = None,
    source: ArrayLike | None = None,
) -> None:
    """One posterior: its mean with a band of two standard deviations, and what it is compared with.

    Args:
        ax: where to draw.
        x: inputs, (m,).
        mean: posterior mean at x, (m,).
        sd: posterior standard deviation at x, (m,), in the units of mean.
        method: a key of METHOD.
        context: the points conditioned on, (x, y).
        test: the points held out, (x, y).
        truth: the noiseless curve at x, (m,).
        source: the source network's prediction at x, (m,).

    Raises:
        KeyError: no such method.
        ValueError: mean or sd is not of x's shape.
    """
    look = METHOD[method]
    x, mean, sd = (np.asarray(v).squeeze() for v in (x, mean, sd))
    if not x.shape == mean.shape == sd.shape:
        raise ValueError(f"expected x, mean and sd of one shape (m,), got {x.shape}, {mean.shape}, {sd.shape}")
    order = np.argsort(x)
    x, mean, sd = x[order], mean[order], sd[order]
    ax.fill_between(x, mean - 2 * sd, mean + 2 * sd, color=look.colour, alpha=0.2, linewidth=0)
    ax.plot(x, mean, color=look.colour, linestyle=look.line, label=look.label)
    if truth is not None:
        ax.plot(x, np.asarray(truth).squeeze()[order], color=TRUTH, linewidth=1, linestyle="--", label="truth")
    if source is not None:
        grey = METHOD["source"]
        curve = np.asarray(source).squeeze()[order]
        ax.plot(x, curve, color=grey.colour, linestyle=grey.line, linewidth=1, label=grey.label)
    for points, colour, marker, label in ((test, TEST, ".", "held out"), (context, CONTEXT, "o", "context")):
        if points is not None:
            xs, ys = (np.asarray(v).squeeze() for v in points)
            many = np.size(xs) > 100  # as one picture in the SVG: hundreds of paths a panel add up to megabytes
            ax.plot(xs, ys, marker, color=colour, markersize=4, linestyle="none", label=label, rasterized=many)


def metric_table(
    rows: Mapping[str, Mapping[str, Any]], profile: str = "cpu", caption: str = "", *, head: str = "method"
) -> Any:
    """Methods by metrics, each a mean with the half-width of its 95 % interval, as something a notebook displays.

    Args:
        rows: a method's key or a name of your own → metric name → value, or (value, half-width).
        profile: *quick* is added to the caption.
        caption: what the numbers are over.
        head: what a row is.

    Returns:
        An object shown as an HTML table, or as plain text.
    """
    texts = {key: {name: _number(value) for name, value in row.items()} for key, row in rows.items()}
    return _table(texts, rows, profile, caption, head)


def text_table(
    rows: Mapping[str, Mapping[str, str]], profile: str = "cpu", caption: str = "", *, head: str = "method"
) -> Any:
    """A table as `metric_table` makes it, of texts that are shown as they are."""
    return _table(rows, rows, profile, caption, head)


def _table(
    rows: Mapping[str, Mapping[str, str]], kept: Mapping[str, Mapping[str, Any]], profile: str, caption: str, head: str
) -> Any:
    """A table of texts; ``kept`` is what a run keeps of it, numbers as they are."""
    metrics = list(dict.fromkeys(name for row in rows.values() for name in row))
    caption += " (quick)" if profile == "quick" else ""
    keep_table({METHOD[key].label if key in METHOD else key: row for key, row in kept.items()}, head, caption)
    names = "".join(f"<th>{html.escape(name)}</th>" for name in [head, *metrics])
    body, plain = "", [" | ".join([head, *metrics])]
    for key, row in rows.items():
        label = METHOD[key].label if key in METHOD else key
        cells = [row.get(name, "") for name in metrics]
        body += f"<tr><th>{html.escape(label)}</th>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>"
        plain.append(" | ".join([label, *cells]))
    table = f'<table class="metrics"><caption>{html.escape(caption)}</caption>'
    table += f"<thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>"
    return Bundle({"text/html": table, "text/plain": "\n".join([caption, *plain])})


def interactive(figure: Any, static: Figure, alt: str) -> Any:
    """A plotly figure that a local script draws where Plotly is there, over a static figure that shows everywhere else.

    Args:
        figure: a plotly figure.
        static: the same as a matplotlib figure, which is closed.
        alt: what the figure shows, in words.

    Returns:
        An object to leave as a cell's last expression.
    """
    data = figure.to_json() if hasattr(figure, "to_json") else json.dumps(figure)
    return live("ntk-interactive", data, static, alt)


def live(kind: str, data: str, static: Figure, alt: str) -> Any:
    """A static figure, and data as JSON for the local script that finds elements of this class and draws over it."""
    picture = svg(static)
    plt.close(static)
    data = data.replace("</", "<\\/")  # nothing in the data may close the script element
    image = base64.b64encode(picture.encode()).decode()
    words = html.escape(alt, quote=True)
    page = (
        f'<div class="{kind}" role="group" aria-label="{words}">'
        f'<img class="ntk-static" alt="{words}" src="data:image/svg+xml;base64,{image}">'
        f'<script type="application/json">{data}</script></div>'
    )
    return Bundle({"text/html": page, "text/plain": alt})


def svg(figure: Figure) -> str:
    """A figure as SVG text, the same from run to run; coordinates to 0.01 point and no line breaks halve its size."""
    with mpl.rc_context({"svg.hashsalt": "ntkbook"}), io.StringIO() as text:
        figure.savefig(text, format="svg", metadata=SVG_METADATA, bbox_inches="tight")
        lines = text.getvalue()
    rounded = _COORDINATES.sub(lambda found: _DIGITS.sub(r"\1", found[0]), lines)
    text = re.sub(r"\s*\n\s*", " ", rounded).strip()
    keep_figure(figure, text)
    return text


def _number(value: Any) -> str:
    if value is None:
        return ""
    mean, half = value if isinstance(value, tuple) else (value, None)
    return f"{float(mean):.3g}" if half is None else f"{float(mean):.3g} ± {float(half):.2g}"
