// The figure that ntkbook.publish.posterior_widget left in the page: observations that the reader adds, drags and
// removes, and the Gaussian processes' posteriors that follow. No library, no network; without JavaScript the static
// figure stays. The algebra stands first and needs no page: `node` and the tests load it as a module.
const ntkPosterior = (() => {
  // Φ as stored, integers of a unit a column: (columns, n) numbers of which K = ΦᵀΦ is the Gram matrix, n × n, by rows.
  function gram({ unit, columns }) {
    const n = columns[0].length;
    const K = new Float64Array(n * n);
    for (const column of columns) {
      for (let i = 0; i < n; i++) {
        const a = column[i] * unit * unit;
        for (let j = 0; j <= i; j++) K[i * n + j] += a * column[j];
      }
    }
    for (let i = 0; i < n; i++) for (let j = 0; j < i; j++) K[j * n + i] = K[i * n + j];
    return K;
  }

  // The lower triangle L of A = L Lᵀ, n × n by rows, in A's place.
  function cholesky(A, n) {
    for (let j = 0; j < n; j++) {
      for (let i = j; i < n; i++) {
        let sum = A[i * n + j];
        for (let k = 0; k < j; k++) sum -= A[i * n + k] * A[j * n + k];
        if (i === j && !(sum > 0)) throw new Error("the Gram matrix is not positive definite: the noise is too small");
        A[i * n + j] = i === j ? Math.sqrt(sum) : sum / A[j * n + j];
      }
    }
    return A;
  }

  // L⁻¹ b, in b's place.
  function forward(L, b, n) {
    for (let i = 0; i < n; i++) {
      let sum = b[i];
      for (let k = 0; k < i; k++) sum -= L[i * n + k] * b[k];
      b[i] = sum / L[i * n + i];
    }
    return b;
  }

  // Mean and variance of the latent f at every grid point, given y at points of the grid.
  // prior: {K, mean}; observations: [{at: index into the grid, y}]; outputscale s² multiplies K; noise is σ².
  function posterior(prior, observations, outputscale, noise) {
    const { K, mean: m } = prior;
    const n = m.length;
    const k = observations.length;
    const L = new Float64Array(k * k);
    observations.forEach((a, i) => observations.forEach((b, j) => {
      L[i * k + j] = outputscale * K[a.at * n + b.at] + (i === j ? noise : 0);
    }));
    cholesky(L, k);
    const w = forward(L, Float64Array.from(observations, (o) => o.y - m[o.at]), k);
    const mean = new Float64Array(n);
    const variance = new Float64Array(n);
    const v = new Float64Array(k);
    for (let s = 0; s < n; s++) {
      observations.forEach((o, i) => { v[i] = outputscale * K[o.at * n + s]; });
      forward(L, v, k);
      let rise = 0;
      let known = 0;
      for (let i = 0; i < k; i++) { rise += v[i] * w[i]; known += v[i] * v[i]; }
      mean[s] = m[s] + rise;
      variance[s] = Math.max(outputscale * K[s * n + s] - known, 0);
    }
    return { mean, variance };
  }

  return { gram, posterior };
})();

if (typeof module !== "undefined") module.exports = ntkPosterior;

if (typeof document !== "undefined") (() => {
  const SVG = "http://www.w3.org/2000/svg";
  const Z = 1.959963984540054; // 95 % of a normal distribution
  const TWICE = 400; // ms between the two taps that remove a point
  const STILL = 3; // px that a finger may slip in a tap
  const made = new WeakSet();
  let figures = 0;

  function element(name, attributes = {}, parent = null, text = "") {
    const node = name.startsWith("svg:")
      ? document.createElementNS(SVG, name.slice(4)) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text) node.textContent = text;
    if (parent) parent.appendChild(node);
    return node;
  }

  const number = (value, digits = 2) => {
    const text = value.toFixed(digits);
    return (Number(text) === 0 ? text.replace("-", "") : text).replace("-", "−");
  };

  function ticks(low, high, about) {
    const rough = (high - low) / about;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= rough);
    const out = [];
    for (let i = Math.ceil(low / step); i * step <= high + 1e-9; i++) out.push(i * step);
    return out;
  }

  function draw(box) {
    if (made.has(box)) return;
    made.add(box);
    const figure = JSON.parse(box.querySelector('script[type="application/json"]').textContent);
    const { x, networks, compared, tasks } = figure;
    const id = `ntk-posterior-${++figures}`;
    const priors = new Map();
    for (const p of [...networks, compared]) priors.set(p.name, { ...p, K: ntkPosterior.gram(p.features) });

    const state = {
      network: networks[0].name, task: 0, observations: [], selected: null, beside: true,
      noise: figure.noise, outputscale: 1, reach: 0, cursor: { at: x.length >> 1, y: 0 }, next: 1,
    };

    // --- what stands in the page ---
    const live = element("div", { class: "ntk-live ntk-play" });
    const head = element("div", { class: "ntk-play-head" }, live);
    element("p", { class: "ntk-play-title" }, head, figure.title);
    const group = (label) => element("div", { role: "group", "aria-label": label, class: "ntk-play-buttons" }, head);

    const kinds = group("Network");
    const buttons = networks.map((p) => {
      const b = element("button", { type: "button", "data-network": p.name }, kinds, p.name);
      b.addEventListener("click", () => {
        state.network = p.name;
        if (p.noise) noise.set(p.noise);
        fit();
      });
      return b;
    });
    const actions = group("Observations");
    element("label", { for: `${id}-task` }, actions, "points of");
    const choice = element("select", { id: `${id}-task` }, actions);
    tasks.forEach((task, i) => element("option", { value: i }, choice, task.name));
    choice.addEventListener("change", () => start(Number(choice.value)));
    const action = (text, does) => {
      const b = element("button", { type: "button" }, actions, text);
      b.addEventListener("click", does);
      return b;
    };
    action("reset", () => start(state.task));
    action("clear", () => { state.observations = []; state.selected = null; fit(); });
    const removal = action("remove point", () => remove(state.selected, true));

    const plot = element("div", { class: "ntk-play-plot" }, live);
    const svg = element("svg:svg", { role: "group", "aria-label": figure.alt }, plot);
    const clip = element("svg:rect", {}, element("svg:clipPath", { id }, element("svg:defs", {}, svg)));
    const axes = element("svg:g", { class: "axes", "aria-hidden": "true" }, svg);
    const curves = element("svg:g", { "clip-path": `url(#${id})`, "aria-hidden": "true" }, svg);
    const shape = (name) => element("svg:path", { class: name }, curves);
    const paths = {
      rbf: [shape("band rbf"), null], ntk: [shape("band ntk"), null], truth: shape("truth"),
    };
    paths.rbf[1] = shape("mean rbf");
    paths.ntk[1] = shape("mean ntk");
    const cross = element("svg:path", { class: "cross" }, curves);
    const ground = element("svg:rect", {
      class: "ground", tabindex: 0, role: "button",
      "aria-label": "Plot. Arrow keys move a cross, Enter adds an observation there.",
    }, svg);
    const dots = element("svg:g", { role: "list", "aria-label": "Observations" }, svg);

    const legend = element("p", { class: "ntk-play-legend" }, live);
    const key = (name) => {
      const entry = element("span", { class: "entry" }, legend);
      element("span", { class: `key ${name}`, "aria-hidden": "true" }, entry);
      return element("span", {}, entry);
    };
    const ntkKey = key("ntk");
    const toggle = element("label", { class: "entry" }, legend);
    const check = element("input", { type: "checkbox", checked: "" }, toggle);
    element("span", { class: "key rbf", "aria-hidden": "true" }, toggle);
    element("span", {}, toggle, compared.name);
    check.addEventListener("change", () => { state.beside = check.checked; fit(); });
    const truthKey = key("truth");

    const sliders = element("div", { class: "ntk-play-sliders" }, live);
    function slider(name, label, low, high, from) {
      const row = element("label", {}, sliders);
      element("span", {}, row, label);
      const input = element("input", {
        type: "range", min: low, max: high, step: 0.02, value: Math.log10(from), "data-slider": name,
      }, row);
      const shown = element("output", {}, row);
      const read = () => {
        state[name] = 10 ** Number(input.value);
        shown.textContent = Number(state[name].toPrecision(2)).toString();
        input.setAttribute("aria-valuetext", shown.textContent);
      };
      input.addEventListener("input", () => { read(); update(true); });
      input.addEventListener("change", () => fit());
      read();
      return { set: (value) => { input.value = Math.log10(value); read(); } };
    }
    const noise = slider("noise", "noise σ", ...figure.noiseRange.map(Math.log10), figure.noise);
    slider("outputscale", "outputscale s²", -2, 2, 1);
    const words = element("p", { class: "ntk-play-status", "aria-live": "polite", role: "status" }, live);
    const help = element("p", { class: "ntk-play-help" }, live, figure.help);
    if (window.matchMedia("(max-width: 600px)").matches) live.insertBefore(help, plot); // a phone shows no more at once

    // --- coordinates ---
    const frame = { left: 38, right: 10, top: 8, bottom: 34, width: 0, height: 0 };
    const [first, last] = [x[0], x[x.length - 1]];
    const px = (value) => frame.left + (value - first) / (last - first) * (frame.width - frame.left - frame.right);
    const py = (value) => {
      const inner = frame.height - frame.top - frame.bottom;
      return frame.top + (1 - (value + state.reach) / (2 * state.reach)) * inner;
    };
    const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
    const nearest = (value) =>
      clamp(Math.round((value - first) / (last - first) * (x.length - 1)), 0, x.length - 1); // an even grid
    function place(event) {
      const r = svg.getBoundingClientRect();
      const right = (event.clientX - r.left - frame.left) / (frame.width - frame.left - frame.right);
      const down = (event.clientY - r.top - frame.top) / (frame.height - frame.top - frame.bottom);
      return { at: nearest(first + right * (last - first)), y: clamp(1 - 2 * down, -1, 1) * state.reach };
    }

    // --- what the reader does ---
    function start(task) {
      state.task = task;
      const { at, y } = tasks[task];
      state.observations = at.map((where, i) => ({ at: where, y: y[i], id: state.next++ }));
      state.selected = null;
      state.reach = 0;
      fit();
    }

    // How far the y axis goes: to 1.7 times the task's truth and points, to an observation beyond that and, where fewer
    // than two say little, to two standard deviations of the priors shown. Not while a point or a slider is dragged.
    function fit() {
      const { observations, outputscale } = state;
      const task = tasks[state.task];
      let reach = 1.7 * Math.max(...task.truth.map(Math.abs), ...task.y.map(Math.abs));
      for (const { y } of observations) if (Math.abs(y) > reach) reach = 1.1 * Math.abs(y);
      if (observations.length < 2) {
        for (const { K, mean } of shown()) {
          mean.forEach((m, i) => {
            const sd = Math.sqrt(outputscale * K[i * mean.length + i] + state.noise ** 2);
            reach = Math.max(reach, Math.abs(m) + 2 * sd);
          });
        }
      }
      if (reach === state.reach) { update(true); return; }
      state.reach = reach;
      state.cursor.y = clamp(state.cursor.y, -reach, reach);
      size();
    }

    function add(at, y, focus) {
      const point = { at, y, id: state.next++ };
      state.observations.push(point);
      fit();
      select(point, focus);
    }

    function remove(point, focus) {
      const i = state.observations.indexOf(point);
      if (i < 0) return;
      state.observations.splice(i, 1);
      state.selected = null;
      fit();
      if (focus) ground.focus();
    }

    function select(point, focus) {
      state.selected = point;
      update(true);
      if (focus) dots.querySelector(`[data-id="${point.id}"]`).focus();
    }

    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
    function moved(point, event) {
      const [right, up] = moves[event.key].map((v) => v * (event.shiftKey ? 10 : 1));
      point.at = clamp(point.at + right, 0, x.length - 1);
      point.y = clamp(point.y + up * state.reach / 50, -state.reach, state.reach);
      event.preventDefault();
      update(true);
    }

    ground.addEventListener("click", (event) => {
      const { at, y } = place(event);
      add(at, y, true);
    });
    ground.addEventListener("keydown", (event) => {
      if (event.key in moves) moved(state.cursor, event);
      else if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        add(state.cursor.at, state.cursor.y, true);
      }
    });
    for (const kind of ["focus", "blur"]) ground.addEventListener(kind, () => update(kind === "focus"));

    let tapped = { id: 0, time: -Infinity };
    let dragged = null;
    function pointer(node, point) {
      node.addEventListener("pointerdown", (event) => {
        if (event.button) return;
        event.preventDefault(); // no text is marked and no page scrolled by a drag
        const from = place(event);
        dragged = {
          point, right: point.at - from.at, up: point.y - from.y, pointer: event.pointerId,
          x: event.clientX, y: event.clientY, far: false,
        };
        select(point, true);
      });
      // Removal waits for the second click: removed at its pointerdown, the click would go to the plot and add one.
      node.addEventListener("click", (event) => {
        if (tapped.id === point.id && event.timeStamp - tapped.time < TWICE) remove(point, true);
        else tapped = { id: point.id, time: event.timeStamp };
      });
      node.addEventListener("touchmove", (event) => event.preventDefault(), { passive: false });
      node.addEventListener("focus", () => { if (state.selected !== point) select(point, false); });
      node.addEventListener("keydown", (event) => {
        if (event.key in moves) moved(point, event);
        else if (event.key === "Delete" || event.key === "Backspace") { event.preventDefault(); remove(point, true); }
        else if (event.key === "Enter") {
          event.preventDefault();
          add(clamp(point.at + 10, 0, x.length - 1), point.y, true);
        }
      });
    }
    document.addEventListener("pointermove", (event) => {
      if (!dragged || dragged.pointer !== event.pointerId) return;
      const far = Math.hypot(event.clientX - dragged.x, event.clientY - dragged.y);
      if (!dragged.far && far < STILL) return;
      dragged.far = true;
      const to = place(event);
      const { point } = dragged;
      point.at = clamp(to.at + dragged.right, 0, x.length - 1);
      point.y = clamp(to.y + dragged.up, -state.reach, state.reach);
      update(false);
    });
    for (const kind of ["pointerup", "pointercancel"]) {
      document.addEventListener(kind, (event) => {
        if (!dragged || dragged.pointer !== event.pointerId) return;
        if (dragged.far) tapped = { id: 0, time: -Infinity }; // the click that ends a drag is counted anew
        dragged = null;
        fit();
      });
    }

    // --- drawing ---
    const line = (values, back = false) => {
      const parts = Array.from(values, (v, i) => `${px(x[i]).toFixed(1)},${py(v).toFixed(1)}`);
      return (back ? parts.reverse() : parts).join("L");
    };
    let current = {};
    const steered = () => ground.matches(":focus-visible"); // by keys: a click focuses the plot as well

    const ours = () => ({ ntk: priors.get(state.network), rbf: state.beside ? priors.get(compared.name) : null });
    const shown = () => Object.values(ours()).filter(Boolean);

    function update(speak) {
      const { observations, selected } = state;
      current = {};
      for (const [name, prior] of Object.entries(ours())) {
        for (const p of paths[name]) p.style.display = prior ? "" : "none";
        if (!prior) continue;
        const { mean, variance } = ntkPosterior.posterior(prior, observations, state.outputscale, state.noise ** 2);
        const sd = variance.map((v) => Math.sqrt(v + state.noise ** 2));
        current[name] = { mean, sd };
        const [band, middle] = paths[name];
        const upper = mean.map((v, i) => v + Z * sd[i]);
        band.setAttribute("d", `M${line(upper)}L${line(mean.map((v, i) => v - Z * sd[i]), true)}Z`);
        middle.setAttribute("d", `M${line(mean)}`);
      }
      paths.truth.setAttribute("d", `M${line(tasks[state.task].truth)}`);
      const { cursor } = state;
      const [cx, cy] = [px(x[cursor.at]), py(cursor.y)];
      cross.setAttribute("d", `M${cx - 9},${cy}h18M${cx},${cy - 9}v18`);
      cross.style.display = steered() ? "" : "none";

      const known = new Map(Array.from(dots.children, (node) => [Number(node.dataset.id), node]));
      observations.forEach((point, i) => {
        let node = known.get(point.id);
        known.delete(point.id);
        if (!node) {
          node = element("svg:g", { class: "dot", tabindex: 0, role: "listitem", "data-id": point.id }, dots);
          element("svg:circle", { class: "reach", r: 16 }, node);
          element("svg:circle", { class: "point", r: 5 }, node);
          pointer(node, point);
        }
        node.setAttribute("transform", `translate(${px(x[point.at]).toFixed(1)},${py(point.y).toFixed(1)})`);
        node.classList.toggle("selected", point === selected);
        node.setAttribute("aria-label",
          `Observation ${i + 1} of ${observations.length}: x ${number(x[point.at])}, y ${number(point.y)}. ` +
          "Arrow keys move it, Delete removes it, Enter adds another.");
      });
      for (const node of known.values()) node.remove();

      for (const b of buttons) b.setAttribute("aria-pressed", String(b.dataset.network === state.network));
      removal.disabled = !selected;
      ntkKey.textContent = `NTK, ${state.network}`;
      truthKey.textContent = `truth of ${tasks[state.task].name}`;
      if (speak) say();
    }

    function say() {
      const { observations, selected, cursor } = state;
      const many = `${observations.length} observation${observations.length === 1 ? "" : "s"}.`;
      const where = selected || (steered() ? cursor : null);
      const at = where ? where.at : null;
      if (at === null) { words.textContent = `${many} Select one for the posterior there.`; return; }
      const interval = ({ mean, sd }) => `${number(mean[at])} ± ${number(Z * sd[at])}`;
      const parts = [`NTK ${interval(current.ntk)}`];
      if (current.rbf) parts.push(`${compared.name} ${interval(current.rbf)}`);
      const what = selected ? `Selected: y = ${number(selected.y)} at x = ${number(x[at])}` : `At x = ${number(x[at])}`;
      words.textContent = `${many} ${what}; posterior there (95 %): ${parts.join(", ")}.`;
    }

    function size() {
      const width = plot.clientWidth || 640;
      frame.width = width;
      frame.height = width < 500 ? 300 : 360;
      svg.setAttribute("viewBox", `0 0 ${width} ${frame.height}`);
      svg.setAttribute("height", frame.height);
      const inside = {
        x: frame.left, y: frame.top, width: width - frame.left - frame.right,
        height: frame.height - frame.top - frame.bottom,
      };
      for (const [name, value] of Object.entries(inside)) {
        clip.setAttribute(name, value);
        ground.setAttribute(name, value);
      }
      axes.replaceChildren();
      const bottom = frame.height - frame.bottom;
      for (const t of ticks(first, last, width < 500 ? 5 : 10)) {
        element("svg:path", { d: `M${px(t)},${frame.top}V${bottom}` }, axes);
        element("svg:text", { x: px(t), y: bottom + 16, "text-anchor": "middle" }, axes, number(t, 0));
      }
      for (const t of ticks(-state.reach, state.reach, 6)) {
        element("svg:path", { d: `M${frame.left},${py(t)}H${width - frame.right}` }, axes);
        const digits = state.reach < 1.5 ? 1 : 0;
        element("svg:text", { x: frame.left - 6, y: py(t) + 4, "text-anchor": "end" }, axes, number(t, digits));
      }
      element("svg:text", { x: px((first + last) / 2), y: frame.height - 3, "text-anchor": "middle" }, axes, "x");
      element("svg:text", { x: 8, y: py(0) + 4, "text-anchor": "middle" }, axes, "y");
      update(true);
    }

    box.appendChild(live);
    box.querySelector(".ntk-static").hidden = true;
    start(0);
    new ResizeObserver(() => { if (plot.clientWidth !== frame.width) size(); }).observe(plot);
  }

  function all() {
    for (const box of document.querySelectorAll(".ntk-posterior")) {
      try {
        draw(box);
      } catch (error) {
        for (const part of box.querySelectorAll(".ntk-live")) part.remove();
        box.querySelector(".ntk-static").hidden = false;
        console.error("posterior figure:", error);
      }
    }
  }

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", all);
  else all();
})();
