"""The paper's claims, what a chapter measured for each, and the verdict.

A criterion stands here before anything is measured. A chapter calls :func:`record` once a claim, which makes the
verdict by one rule, shows it, and stores it in the executed notebook, whence prose quotes it
(``{glue:text}`claim-id` ``, ``{glue:text}`claim-id-verdict` ``) and :func:`collect` reads it back.
"""

import html
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ntkbook.publish.verdicts import Claim, Record, make_record

MIME_PREFIX = "application/papermill.record/"  # what myst_nb puts before the type of a glued output that is hidden


def _sinusoids(network: str, figure: str) -> tuple[Claim, ...]:
    prefix = "sinusoids" if network == "tanh" else f"sinusoids-{network.lower()}"
    rmse = f"RMSE of the NTK ({network}) on the noiseless curves of nine new tasks, minus that of"
    return (
        Claim(
            id=f"{prefix}-adapts",
            chapter="02_sinusoids",
            place=figure,
            sentence=f"Conditioning the trained {network} network's NTK on ten points adapts it to a new sinusoid.",
            quantity=f"{rmse} the network without adaptation",
            direction="<",
            threshold=0.0,
        ),
        Claim(
            id=f"{prefix}-features",
            chapter="02_sinusoids",
            place=figure,
            sentence=f"The features that a {network} network learns on one sinusoid are transferable to others.",
            quantity=f"{rmse} the untrained network's NTK",
            direction="<",
            threshold=0.0,
        ),
        Claim(
            id=f"{prefix}-coverage",
            chapter="02_sinusoids",
            place=figure,
            sentence=f"The {network} network's NTK gives reasonable posterior predictive distributions.",
            quantity="share of the noiseless curves inside the central 95 % predictive interval",
            direction="in",
            threshold=(0.9, 0.99),
        ),
    )


CLAIMS = (
    Claim(
        id="linearisation-duality",
        chapter="01_linearisation",
        place="Section 2.1",
        sentence="Function space and parameter space are two ways to the same posterior.",
        quantity="largest difference between the two spaces in mean, variance (relative to the prior's) and log "
        "marginal likelihood (relative to its own size)",
        direction="<",
        threshold=1e-8,
        paper_value="equal, by Woodbury's identity",
    ),
    Claim(
        id="linearisation-spectra",
        chapter="01_linearisation",
        place="Section 2.2",
        sentence="In regression the Fisher information matrix and the NTK have the same eigenvalues up to a factor.",
        quantity="largest difference between the eigenvalues of the two, relative to the largest eigenvalue",
        direction="<",
        threshold=1e-10,
        paper_value="equal",
    ),
    Claim(
        id="linearisation-general-losses",
        chapter="01_linearisation",
        place="Appendix C.1",
        sentence="For general losses both Gram matrices of the Jacobian follow from the Fisher matrix's eigenvectors "
        "and the root of H, by the two displayed equations.",
        quantity="largest relative error of the two equations as printed, with L a Cholesky root",
        direction="<",
        threshold=1e-8,
        paper_value="equal",
    ),
    Claim(
        id="linearisation-three-calls",
        chapter="01_linearisation",
        place="Appendix A",
        sentence="A product of a vector with the NTK takes three backward calls.",
        quantity="backward calls of one product by double backward, its error against the dense product below 1e-10",
        direction="in",
        threshold=(1.0, 3.0),
        paper_value="3",
    ),
    Claim(
        id="linearisation-convex",
        chapter="01_linearisation",
        place="Section 2.1.1",
        sentence="Linearising makes adaptation convex: the closed form is where every descent ends.",
        quantity="largest excess of the final loss over the closed form's, relative to it, over gradient descents of "
        "the linearised network from random starts",
        direction="<",
        threshold=1e-6,
    ),
    Claim(
        id="linearisation-width",
        chapter="01_linearisation",
        place="Section 2.1 and the talk's appendix",
        sentence="Wide networks evolve as linear models under gradient descent.",
        quantity="slope, in log-log, of the distance between a trained network and its trained linearisation against "
        "the width (theory's bound: -0.5)",
        direction="<",
        threshold=-0.25,
    ),
    Claim(
        id="linearisation-scaling",
        chapter="01_linearisation",
        place="Appendix A, Figure 4",
        sentence="The log marginal likelihood by Jacobian-vector products takes nearly linear time in the data.",
        quantity="slope, in log-log, of the time in function space against n, solved to a relative residual of 1e-6",
        direction="<",
        threshold=1.25,
        paper_value="nearly linear",
    ),
    Claim(
        id="linearisation-scaling-parameter",
        chapter="01_linearisation",
        place="Appendix A, Figure 4",
        sentence="The log marginal likelihood by Fisher-vector products takes nearly linear time in the data.",
        quantity="slope, in log-log, of the time in parameter space against n, solved to a relative residual of 1e-6",
        direction="<",
        threshold=1.25,
        paper_value="nearly linear",
    ),
    Claim(
        id="linearisation-cached",
        chapter="01_linearisation",
        place="the talk of February 2020",
        sentence="The difficult parts of a prediction can be cached.",
        quantity="time of the thousandth prediction, mean and variance, over that of the first with its conditioning",
        direction="<",
        threshold=0.1,
    ),
    *_sinusoids("tanh", "Section 3, Figure 1"),
    *_sinusoids("ReLU", "Appendix E, Figure 8"),
    Claim(
        id="sinusoids-parameter-space",
        chapter="02_sinusoids",
        place="Section 3; Appendix E, Figure 7",
        sentence="Parameter space gives similar predictive means.",
        quantity="largest difference of the means in function and in parameter space (tanh), nine new tasks, in "
        "predictive standard deviations",
        direction="<",
        threshold=1e-3,
        paper_value="similar",
    ),
    Claim(
        id="sinusoids-fine-tuning",
        chapter="02_sinusoids",
        place="implied by Section 2.1.1 and the 2021 abstract",
        sentence="The closed form, free of fine-tuning's local optima, predicts better than fine-tuning the network.",
        quantity="RMSE of the NTK (tanh) on the noiseless curves of nine new tasks, minus that of full fine-tuning",
        direction="<",
        threshold=0.0,
    ),
    Claim(
        id="precipitation-source",
        chapter="03_precipitation",
        place="Appendix E, Figure 10",
        sentence="The NTK markedly improves the fit of the neural network on the source task.",
        quantity="standardised RMSE of the NTK on the source station's last 65 days, minus that of the network itself",
        direction="<",
        threshold=0.0,
    ),
    Claim(
        id="precipitation-adapts",
        chapter="03_precipitation",
        place="Section 3, Figures 2 and 11",
        sentence="One station's NTK, conditioned on another station's 300 days, adapts the network to that station.",
        quantity="standardised RMSE of the NTK at all other stations, minus that of the network without adaptation",
        direction="<",
        threshold=0.0,
    ),
    *(
        Claim(
            id=f"precipitation-{key}",
            chapter="03_precipitation",
            place=place,
            sentence=sentence,
            quantity=f"standardised RMSE of the NTK at all other stations, minus that of {what}",
            direction="<",
            threshold=0.0,
        )
        for key, place, sentence, what in (
            (
                "shared-rbf",
                "implied by Section 3, Figure 2, and Appendix E, Figure 11",
                "Sharing the NTK across related tasks is effective: better than sharing an RBF kernel.",
                "an RBF GP with the source station's hyperparameters",
            ),
            (
                "independent-rbf",
                "implied by Section 3, Figure 2",
                "A shared NTK predicts better than RBF GPs trained independently at each station.",
                "an RBF GP fitted to each station",
            ),
            (
                "ablr",
                "implied by Section 3, Figure 2",
                "The NTK predicts better than adaptive Bayesian linear regression on the last layer's features.",
                "ABLR",
            ),
            (
                "features",
                "Appendix B, footnote 6; Section 2.2",
                "What the network learned at one station makes its NTK a better prior at the others.",
                "the untrained network's NTK",
            ),
        )
    ),
    Claim(
        id="precipitation-coverage",
        chapter="03_precipitation",
        place="Section 3, Figure 2",
        sentence="The NTK provides the predictive variances that regression on real data needs.",
        quantity="share of the last 65 days of all other stations inside the central 95 % predictive interval",
        direction="in",
        threshold=(0.9, 0.99),
    ),
    Claim(
        id="precipitation-unrelated",
        chapter="03_precipitation",
        place="Appendix E, Figure 10",
        sentence="The NTK fails when the climate pattern is not related to the source station's.",
        quantity="standardised RMSE of the NTK at stations whose 300 days correlate negatively with the source's, "
        "minus that at the others",
        direction=">",
        threshold=0.0,
    ),
)


def registry(claims: tuple[Claim, ...] | None = None) -> dict[str, Claim]:
    """The claims by id, in order; ValueError when two share an id."""
    claims = CLAIMS if claims is None else claims
    by_id = {claim.id: claim for claim in claims}
    if len(by_id) != len(claims):
        raise ValueError("two claims share an id; give each its own")
    return by_id


def record(
    claim_id: str,
    value: float | None,
    low: float | None,
    high: float | None,
    provenance: Any,
    profile: str,
    n: int,
    note: str = "",
) -> None:
    """Judge a claim in a notebook: show one row, and store it under the claim's id.

    It is glued as ``<id>`` (value and interval), ``<id>-verdict`` and ``<id>-record`` (all of it). Nothing is returned:
    a cell would show it too.

    Args:
        claim_id: an id of the registry.
        value: the measured value, None when nothing was measured (say why in the note).
        low: lower end of the 95 % interval over seeds or pairs.
        high: its upper end.
        provenance: where the data came from (``ntkbook.experiments.data.sources.Provenance``).
        profile: the run's profile.
        n: number of seeds, stations or pairs behind the interval.
        note: a short remark shown in the row.

    Raises:
        KeyError: the registry has no such claim.
        ValueError: a value without an interval, or outside it.
    """
    known = registry()
    if claim_id not in known:
        raise KeyError(f"no claim {claim_id!r}; ntkbook/publish/claims.py has {', '.join(known)}")
    result = make_record(known[claim_id], value, low, high, provenance, profile, n, note)
    _glue(claim_id, result.text)
    _glue(f"{claim_id}-verdict", result.verdict)
    _glue(f"{claim_id}-record", asdict(result))
    plain = f"{claim_id}: {result.text}, {result.verdict}"
    _display({"text/html": row_html(known[claim_id], result), "text/plain": plain})


def show_data(*provenances: Any) -> None:
    """Say at the top of a chapter which data it uses, and store it for the run's card."""
    for provenance in provenances:
        _display({"text/markdown": provenance.banner(), "text/plain": provenance.description})
        _glue(f"data-{provenance.name}", asdict(provenance))


def collect(notebook: str | Path | Mapping[str, Any]) -> dict[str, Record]:
    """The records stored in an executed notebook, by claim id, in the order of its cells."""
    glued = glued_json(notebook)
    return {key.removesuffix("-record"): Record(**value) for key, value in glued.items() if key.endswith("-record")}


def collect_data(notebook: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """The data an executed notebook declared with :func:`show_data`, by name."""
    return {key.removeprefix("data-"): v for key, v in glued_json(notebook).items() if key.startswith("data-")}


def glued_json(notebook: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Everything stored as JSON in an executed notebook, by name."""
    texts = {name: data.get("text/plain", "") for name, data in glued(notebook).items()}
    return {name: json.loads(text) for name, text in texts.items() if text.startswith("{")}


def glued(notebook: str | Path | Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Everything glued in an executed notebook: name to {type: content}."""
    return {
        output["metadata"]["scrapbook"]["name"]: {
            kind.removeprefix(MIME_PREFIX): "".join(content) if isinstance(content, list) else content
            for kind, content in output["data"].items()
        }
        for output in outputs(notebook)
        if "scrapbook" in output.get("metadata", {})
    }


def outputs(notebook: str | Path | Mapping[str, Any]) -> list[dict[str, Any]]:
    """The outputs of an executed notebook that carry data, in the order of its cells."""
    nb = notebook if isinstance(notebook, Mapping) else json.loads(Path(notebook).read_text("utf8"))
    return [output for cell in nb["cells"] for output in cell.get("outputs", []) if "data" in output]


def badge(verdict: str) -> str:
    """A verdict as HTML, coloured by the book's style sheet."""
    return f'<span class="verdict verdict-{verdict.replace(" ", "-")}">{verdict}</span>'


def row_html(claim: Claim, result: Record) -> str:
    """The row that :func:`record` shows."""
    paper = claim.paper_value or "no number given"
    cells = [
        ("claim", html.escape(claim.sentence) + f" <small>{html.escape(claim.place)}</small>"),
        ("measured", html.escape(claim.quantity) + f"; criterion {html.escape(claim.criterion)}"),
        ("paper", html.escape(paper)),
        ("here (95 % interval)", f"{result.text} <small>n = {result.n}, profile {result.profile}</small>"),
        ("data", html.escape(result.description)),
        ("verdict", badge(result.verdict) + (f" <small>{html.escape(result.note)}</small>" if result.note else "")),
    ]
    head = "".join(f"<th>{name}</th>" for name, _ in cells)
    body = "".join(f'<td data-label="{name}">{text}</td>' for name, text in cells)
    return f'<table class="claims"><thead><tr>{head}</tr></thead><tbody><tr>{body}</tr></tbody></table>'


class Bundle:
    """Something to display under exactly the types given, such as ``{"text/html": ...}``."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = {"text/plain": "", **data}

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return self.data


def _display(data: dict[str, Any]) -> None:
    from IPython.display import display

    display(data, raw=True)


def _glue(name: str, value: Any) -> None:
    from myst_nb import glue

    # JSON goes as text: nbformat takes an object only under the bare type application/json, not with a prefix.
    stored = value if isinstance(value, str) else Bundle({"text/plain": json.dumps(value, ensure_ascii=False)})
    glue(name, stored, display=False)
