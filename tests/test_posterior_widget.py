"""The figure to play with: what the notebook exports, the algebra in the browser, and what a reader can do there."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from chromium import CHROMIUM, dumped
from gpytorch.kernels import RBFKernel
from torch import nn

from ntkbook import NTKGP, Linearization
from ntkbook.publish.posterior_widget import Prior, Task, features, payload, posterior, widget

STATIC = Path(__file__).parents[1] / "book" / "_static"
NODE = shutil.which("node")
GRID = torch.linspace(-5, 5, 201, dtype=torch.float64)[:, None]
AT, Y = [3, 40, 41, 77, 120, 160, 199], [1.0, -2.0, -1.9, 0.5, 4.0, 3.0, -5.0]


def network(activation, gain):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 40), activation(), nn.Linear(40, 40), activation(), nn.Linear(40, 1)).double()
    with torch.no_grad():  # a kernel as large and rough as a trained network's
        for parameter in net.parameters():
            parameter.mul_(gain)
    return net


OWN_NOISE = {"tanh": 0.01, "untrained": 0.09}  # the ReLU network leaves σ² as it is
NETWORKS = {"tanh": network(nn.Tanh, 2.0), "ReLU": network(nn.ReLU, 2.0), "untrained": network(nn.Tanh, 1.0)}


@pytest.fixture(scope="module")
def grams():
    rbf = RBFKernel().to(GRID)
    rbf.lengthscale = 1.2
    with torch.no_grad():
        return {**{k: Linearization(v).gram(GRID).numpy() for k, v in NETWORKS.items()}, "RBF": 4 * rbf(GRID).numpy()}


@pytest.fixture(scope="module")
def shown(grams):
    """What the page gets, and the page's HTML."""
    networks = {name: Prior(grams[name], noise=OWN_NOISE.get(name)) for name in NETWORKS}
    curve = 2 * np.sin(GRID[:, 0].numpy())
    tasks = {f"task {a}": Task(np.array([-3.01, 0.02, 2.0]), a * curve) for a in (1, 2)}
    arguments = (GRID, networks, {"RBF": Prior(grams["RBF"], 0.3)}, tasks)
    data = payload(*arguments, noise=0.01, title="posteriors", alt='a "figure"')
    with plt.rc_context({"backend": "agg"}):
        return data, widget(*arguments, noise=0.01, profile="quick")._repr_mimebundle_()["text/html"]


def restored(stored):
    phi = np.array(stored["columns"], dtype=np.float64) * stored["unit"]
    return phi.T @ phi


def test_the_exported_features_give_the_gram_matrix(grams):
    for name, K in grams.items():
        stored = features(K)
        # what is left out is below 1e-13 of the trace an eigenvalue, what is rounded below 1e-13 of Φ's largest row
        assert np.abs(restored(stored) - K).max() < 2e-12 * K.trace(), name
        assert len(stored["columns"]) < 120, name
        assert len(json.dumps(stored)) < 250_000, name


def test_posteriors_of_the_exported_features_agree_with_the_kernels(grams):
    for name, net in NETWORKS.items():
        for scale, noise in ((1.0, 3e-3), (10.0, 1e-2), (0.1, 1e-3)):
            exact = NTKGP(net, outputscale=scale, noise=noise).condition(GRID[AT], torch.tensor(Y).double())
            mean, variance = posterior(Prior(restored(features(grams[name]))), AT, Y, scale, noise)
            assert np.abs(mean - exact.mean(GRID).numpy()).max() < 1e-6, (name, scale, noise)
            assert np.abs(variance - exact.variance(GRID).numpy()).max() < 1e-6, (name, scale, noise)


def test_a_coarser_truncation_is_worse_by_what_it_leaves_out(grams):
    K = grams["ReLU"]
    values = np.linalg.eigvalsh(K)
    stored = features(K, truncation=1e-4)
    left = values[values <= 1e-4 * K.trace()]
    assert len(stored["columns"]) == len(K) - len(left)
    assert np.linalg.norm(restored(stored) - K, 2) == pytest.approx(left[-1], rel=1e-6)


def test_tasks_snap_to_the_grid_with_the_curves_values(shown):
    task = shown[0]["tasks"][1]
    assert task["at"] == [40, 100, 140]
    np.testing.assert_allclose(
        task["y"], 4 * np.sin(GRID[[40, 100, 140], 0].numpy()), atol=5e-5
    )  # four digits are stored


def test_the_static_figure_stands_in_the_page_and_says_quick(shown):
    page = shown[1]
    assert 'class="ntk-posterior"' in page
    assert "data:image/svg+xml;base64," in page
    stored = json.loads(re.search(r'<script type="application/json">(.*)</script>', page)[1])
    assert stored["title"].endswith("(quick)")
    assert stored["networks"] == shown[0]["networks"]


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (np.ones((2, 3)), "square"),
        (np.array([[1.0, np.nan], [np.nan, 1.0]]), "finite"),
        (np.array([[1.0, 0.5], [0.2, 1.0]]), "symmetric"),
        (np.array([[1.0, 2.0], [2.0, 1.0]]), "eigenvalue"),
        (np.zeros((2, 2)), "positive"),
    ],
)
def test_what_is_no_gram_matrix_is_an_error(gram, message):
    with pytest.raises(ValueError, match=message):
        features(gram)


def test_what_does_not_fit_the_grid_is_an_error(grams):
    good, other, task = {"a": Prior(grams["tanh"])}, {"b": Prior(grams["RBF"])}, {"t": Task([0.0], np.ones(201))}
    words = {"noise": 0.01, "title": "", "alt": ""}
    with pytest.raises(ValueError, match="even"):
        payload(GRID**3, good, other, task, **words)
    with pytest.raises(ValueError, match="gram"):
        payload(GRID, {"a": Prior(np.eye(3))}, other, task, **words)
    with pytest.raises(ValueError, match="one prior of"):
        payload(GRID, good, {}, task, **words)
    with pytest.raises(ValueError, match="of another name"):
        payload(GRID, good, good, task, **words)
    with pytest.raises(ValueError, match="variance"):
        payload(GRID, good, other, task, **{**words, "noise": 2.0})
    with pytest.raises(ValueError, match="variance"):
        payload(GRID, {"a": Prior(grams["tanh"], noise=1e-6)}, other, task, **words)


def test_a_network_with_a_noise_of_its_own_brings_it_along(grams, shown):
    assert [p.get("noise") for p in shown[0]["networks"]] == [0.1, None, 0.3]
    assert "noise" not in shown[0]["compared"]
    assert "Choosing a network sets σ" in shown[0]["help"]
    task = {"t": Task([0.0], np.ones(201))}
    alone = payload(GRID, {"a": Prior(grams["tanh"])}, {"b": Prior(grams["RBF"])}, task, noise=0.01, title="", alt="")
    assert "σ stays as it is" in alone["help"]


@pytest.mark.skipif(NODE is None, reason="node runs the page's algebra: not installed")
def test_the_algebra_of_the_page_agrees_with_the_gp(shown, tmp_path):
    """Against NTKGP's own posterior, which never saw the features: at three settings, and without observations."""
    settings = [(1.0, 3e-3), (10.0, 1e-2), (0.1, 1e-3)]
    script = """
      const fs = require("fs"), algebra = require(process.argv[1]);
      const { data, at, y, settings } = JSON.parse(fs.readFileSync(0, "utf8")), out = {};
      for (const p of [...data.networks, data.compared]) {
        const prior = { mean: p.mean, K: algebra.gram(p.features) };
        const seen = at.map((where, i) => ({ at: where, y: y[i] }));
        out[p.name] = settings.map(([s2, noise]) => algebra.posterior(prior, seen, s2, noise));
        out[p.name].push(algebra.posterior(prior, [], 1, 1));
        for (const r of out[p.name]) { r.mean = Array.from(r.mean); r.variance = Array.from(r.variance); }
      }
      console.log(JSON.stringify(out));"""
    given = json.dumps({"data": shown[0], "at": AT, "y": Y, "settings": settings})
    command = [str(NODE), "-e", script, str(STATIC / "posterior.js")]
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=True)
    answers = json.loads(done.stdout)
    for name, net in NETWORKS.items():
        for (scale, noise), answer in zip(settings, answers[name]):
            exact = NTKGP(net, outputscale=scale, noise=noise).condition(GRID[AT], torch.tensor(Y).double())
            assert np.abs(answer["mean"] - exact.mean(GRID).numpy()).max() < 1e-6, (name, scale, noise)
            assert np.abs(answer["variance"] - exact.variance(GRID).numpy()).max() < 1e-6, (name, scale, noise)
        prior = answers[name][-1]
        np.testing.assert_array_equal(prior["mean"], np.zeros(201))
        np.testing.assert_allclose(prior["variance"], Linearization(net).diagonal(GRID).numpy(), atol=1e-8)
    for (scale, noise), answer in zip(settings, answers["RBF"]):  # and with a prior mean
        mean, variance = posterior(Prior(restored(shown[0]["compared"]["features"]), 0.3), AT, Y, scale, noise)
        np.testing.assert_allclose(answer["mean"], mean, atol=1e-6)
        np.testing.assert_allclose(answer["variance"], variance, atol=1e-6)


DRIVER = """
const out = {}, live = document.querySelector(".ntk-play"), svg = live.querySelector("svg");
const dots = () => Array.from(svg.querySelectorAll(".dot")), label = (d) => d.getAttribute("aria-label");
const ground = svg.querySelector(".ground"), status = () => live.querySelector("[role=status]").textContent;
const curve = (name) => svg.querySelector(name).getAttribute("d");
const key = (node, key, more) => node.dispatchEvent(
  new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true, ...more }));
const pointer = (node, type, x, y) => node.dispatchEvent(
  new PointerEvent(type, { clientX: x, clientY: y, pointerId: 1, bubbles: true, cancelable: true }));
const button = (text) => Array.from(live.querySelectorAll("button")).find((b) => b.textContent === text);
const note = (name) => { out[name] = { labels: dots().map(label), status: status(), ntk: curve(".mean.ntk"),
  rbf: curve(".mean.rbf"), band: curve(".band.ntk"), focus: document.activeElement.getAttribute("class"),
  ticks: Array.from(svg.querySelectorAll(".axes text[text-anchor=end]"), (text) =>
    Number(text.textContent.replace("−", "-"))),
  sigma: live.querySelector("[data-slider=noise] + output").textContent }; };
note("start");
const box = ground.getBoundingClientRect();
ground.dispatchEvent(new MouseEvent("click", { clientX: box.left + box.width * 0.755, clientY: box.top + box.height / 4,
  bubbles: true }));
note("added");
const point = dots()[3], r = point.querySelector(".point").getBoundingClientRect();
const [x, y] = [r.left + r.width / 2, r.top + r.height / 2];
pointer(point, "pointerdown", x, y);
pointer(document, "pointermove", x - box.width * 0.1, y + box.height / 4);
note("dragging");
pointer(document, "pointerup", x - box.width * 0.1, y + box.height / 4);
pointer(document, "pointermove", x, y);
note("dragged");
for (let i = 0; i < 2; i++) {
  const under = document.elementFromPoint(x - box.width * 0.1, y + box.height / 4);  // a click goes to what is there
  pointer(under, "pointerdown", x - box.width * 0.1, y + box.height / 4);
  pointer(document, "pointerup", x - box.width * 0.1, y + box.height / 4);
  under.dispatchEvent(new MouseEvent("click", { bubbles: true, cancelable: true }));
}
note("tapped twice");
document.activeElement.blur(); ground.focus();
key(ground, "ArrowRight", { shiftKey: true }); note("crossed"); key(ground, "Enter"); note("entered");
key(dots()[3], "ArrowRight"); key(dots()[3], "ArrowUp"); note("moved");
key(dots()[3], "Delete"); note("deleted");
button("ReLU").click(); note("ReLU"); out.pressed = button("ReLU").getAttribute("aria-pressed");
button("untrained").click(); note("untrained"); button("ReLU").click(); note("ReLU after it");
button("tanh").click(); note("tanh");
for (const name of ["noise", "outputscale"]) {
  const input = live.querySelector(`[data-slider=${name}]`), before = input.value;
  input.value = 0.5; input.dispatchEvent(new Event("input", { bubbles: true })); note(name);
  out[name].valuetext = input.getAttribute("aria-valuetext");
  input.value = before; input.dispatchEvent(new Event("input", { bubbles: true }));
}
live.querySelector("input[type=checkbox]").click(); note("alone");
out.alone.hidden = getComputedStyle(svg.querySelector(".mean.rbf")).display;
live.querySelector("input[type=checkbox]").click();
dots()[0].focus(); button("remove point").click(); note("removed");
button("clear").click(); note("clear");
out.height = ground.getBoundingClientRect().height;
const high = ground.getBoundingClientRect(), slide = (value) => {
  const input = live.querySelector("[data-slider=outputscale]");
  input.value = value; input.dispatchEvent(new Event("input", { bubbles: true })); note(`sliding to ${value}`);
  input.dispatchEvent(new Event("change", { bubbles: true })); note(`at ${value}`);
};
slide(2); slide(0);
for (const share of [0.25, 0.75]) {
  ground.dispatchEvent(new MouseEvent("click", { clientX: high.left + high.width * share, clientY: high.top + 1,
    bubbles: true }));
  note(`high at ${share}`);
}
button("clear").click(); note("cleared again");
const choice = live.querySelector("select"); choice.value = 1;
choice.dispatchEvent(new Event("change")); note("task 2");
out.static = document.querySelector(".ntk-static").hidden;
out.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
"""


def in_chromium(page, folder, width=1000):
    """What the driver notes in a page of this body, opened from a file, and the errors that it met."""
    (folder / "posterior.js").write_text((STATIC / "posterior.js").read_text("utf8"), "utf8")
    (folder / "book.css").write_text((STATIC / "book.css").read_text("utf8"), "utf8")
    (folder / "driver.js").write_text(
        'window.errors = [];\nwindow.addEventListener("error", (e) => window.errors.push(e.message));\n'
        "console.error = (...words) => window.errors.push(words.join(' '));\n"
        # after a frame: the plot takes its width anew when a scroll bar has come beside it
        'window.addEventListener("load", () => setTimeout(() => {\n' + DRIVER + "\nout.errors = window.errors;\n"
        'const pre = document.createElement("pre"); pre.id = "out"; pre.textContent = JSON.stringify(out);\n'
        "document.body.replaceChildren(pre); }, 300));\n",
        "utf8",
    )
    (folder / "page.html").write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><link rel="stylesheet" href="book.css">'
        f'<script src="driver.js"></script><script src="posterior.js"></script></head><body>{page}</body></html>',
        "utf8",
    )
    html_now = dumped(folder / "page.html", width=width, milliseconds=4000)
    found = re.search(r'<pre id="out">(.*?)</pre>', html_now, re.DOTALL)
    assert found, html_now[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.skipif(CHROMIUM is None, reason="a browser plays with the figure: no Chromium installed")
@pytest.mark.parametrize("width", [1000, 500])  # the narrowest window that headless Chromium opens is 500
def test_a_reader_adds_drags_and_removes_observations(shown, tmp_path, width):
    seen = in_chromium(shown[1], tmp_path, width)
    assert seen["errors"] == []
    assert seen["static"] is True  # the static figure made room
    assert seen["wide"] <= 0  # nothing to scroll sideways for

    def labels(name):
        found = [re.search(r"x (\S+), y (\S+)\.", text) for text in seen[name]["labels"]]
        return [tuple(float(v.replace("−", "-")) for v in f.groups()) for f in found if f]

    start = [(-3.0, pytest.approx(2 * np.sin(-3), abs=0.01)), (0.0, 0.0), (2.0, pytest.approx(1.82, abs=0.01))]
    assert labels("start") == start
    assert seen["start"]["status"].startswith("3 observations.")
    reach = 1.7 * 2
    close = 2 * reach / seen["height"] + 0.005  # a pointer's place is a whole pixel, a label has two digits
    assert labels("added") == [*start, (2.55, pytest.approx(reach / 2, abs=close))]
    assert seen["added"]["ntk"] != seen["start"]["ntk"] != seen["start"]["rbf"] != seen["added"]["rbf"]
    assert re.search(r"4 observations. Selected: y = 1.\d\d at x = 2.55", seen["added"]["status"])
    assert labels("dragged") == [*start, (1.55, pytest.approx(0, abs=close))]
    assert seen["dragged"]["ntk"] != seen["added"]["ntk"]
    assert labels("tapped twice") == start
    assert seen["tapped twice"]["ntk"] == seen["start"]["ntk"]  # the posterior is back as well
    assert "At x = 0.50" in seen["crossed"]["status"]
    assert labels("entered") == [*start, (0.5, 0.0)]
    assert seen["entered"]["focus"].startswith("dot")
    assert labels("moved") == [*start, (0.55, pytest.approx(reach / 50, abs=0.01))]
    assert labels("deleted") == start
    assert seen["deleted"]["focus"] == "ground"
    assert seen["ReLU"]["ntk"] != seen["start"]["ntk"]
    assert seen["ReLU"]["rbf"] == seen["start"]["rbf"]  # which knows nothing of the network
    assert seen["pressed"] == "true"
    for name, value in (("noise", "1"), ("outputscale", "3.2")):  # the noise slider ends at 1
        assert seen[name]["valuetext"] == value
        assert seen[name]["band"] != seen["start"]["band"]
    assert seen["alone"]["hidden"] == "none"
    assert "RBF" not in seen["alone"]["status"]
    assert labels("removed") == start[1:]
    assert labels("clear") == []
    assert seen["clear"]["status"].startswith("0 observations.")
    assert [seen[name]["sigma"] for name in ("start", "ReLU", "untrained", "ReLU after it", "tanh")] == [
        "0.1", "0.1", "0.3", "0.3", "0.1",
    ]  # fmt: skip

    # the y axis: as far as 1.7 times the task, and never moved by a drag; without observations as far as the priors
    for name in ("start", "added", "dragging", "dragged", "tapped twice", "ReLU", "removed"):
        assert seen[name]["ticks"] == [-2, 0, 2], name
    diagonal = Linearization(NETWORKS["tanh"]).diagonal(GRID).max()
    prior = 2 * float((diagonal + 0.01).sqrt())
    for name, most in (("clear", prior), ("at 2", 10 * prior), ("at 0", prior), ("cleared again", prior)):
        ticks = seen[name]["ticks"]
        assert most - (ticks[1] - ticks[0]) < ticks[-1] <= most * 1.01, name
        ys = [float(pair.split(",")[1]) for pair in re.findall(r"[-\d.]+,[-\d.]+", seen[name]["band"])]
        assert min(ys) >= 8, name  # the top of the plot
    assert seen["sliding to 2"]["ticks"] == seen["clear"]["ticks"]  # and not while a slider moves
    assert seen["high at 0.25"]["ticks"] == seen["clear"]["ticks"]
    assert max(y for _, y in labels("high at 0.75")) > prior * 0.98
    assert seen["high at 0.75"]["ticks"] == pytest.approx(seen["clear"]["ticks"], abs=prior * 0.3)  # both still shown
    assert [x for x, _ in labels("task 2")] == [-3.0, 0.0, 2.0]


@pytest.mark.skipif(CHROMIUM is None, reason="a browser shows the numbers: no Chromium installed")
def test_the_page_says_what_the_gp_says(shown, tmp_path):
    """The posterior read out at the selected point, against NTKGP, to the digits that are read."""
    status = in_chromium(shown[1], tmp_path)["entered"]["status"]
    task = shown[0]["tasks"][0]
    at, y = [*task["at"], 110], torch.tensor([*task["y"], 0.0], dtype=torch.float64)
    exact = NTKGP(NETWORKS["tanh"], noise=shown[0]["noise"] ** 2).condition(GRID[at], y)
    mean, sd = float(exact.mean(GRID[[110]])), float((exact.variance(GRID[[110]]) + shown[0]["noise"] ** 2).sqrt())
    read = re.search(r"NTK (\S+) ± (\d+\.\d+)", status)
    assert read, status
    # two digits are read out, and the noise slider's steps are 5 % apart
    assert float(read[1].replace("−", "-")) == pytest.approx(mean, abs=0.02)
    assert float(read[2]) == pytest.approx(1.96 * sd, abs=0.03)
