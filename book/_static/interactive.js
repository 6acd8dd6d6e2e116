// Draws the figures that ntkbook.publish.figures.interactive() left in the page, with the plotly.min.js beside this
// script. Without Plotly or without JavaScript the static figure stays.
(() => {
  const here = document.currentScript ? document.currentScript.src : "";

  function dark() {
    return document.documentElement.dataset.theme === "dark";
  }

  // Where a legend grows upwards, away from the plot, and a colour bar on a phone has room.
  const above = { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" };
  const below = { orientation: "h", xanchor: "right", y: -0.05, yanchor: "top", len: 0.42 };

  function themed(layout) {
    const ink = dark() ? "#e6e6e6" : "#222222";
    const grid = dark() ? "#444b55" : "#dddddd";
    const look = { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { ...layout.font, color: ink } };
    const axes = Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key));
    for (const key of new Set([...axes, "xaxis", "yaxis"])) {
      look[key] = { ...layout[key], gridcolor: grid, zerolinecolor: grid, linecolor: ink, automargin: true };
      if (layout[key]?.showticklabels === false) Object.assign(look[key], { showgrid: false, showline: false, ticks: "" });
    }
    return look;
  }

  // What is drawn in black or dark grey on a light page is drawn light on a dark one.
  function inked(part) {
    if (!dark() || part === undefined) return part;
    return JSON.parse(JSON.stringify(part).replace(/"#000000"/g, '"#e6e6e6"').replace(/"#4D4D4D"/gi, '"#b0b6bd"'));
  }

  function element(name, attributes, ...inside) {
    const made = Object.assign(document.createElement(name), attributes);
    made.append(...inside);
    return made;
  }

  // The page's own slider or select box in place of Plotly's, which know no keys and no screen reader. `apply` takes
  // the arguments of Plotly's restyle, the only method that the book's figures use.
  function slider({ steps, active = 0, currentvalue }, apply) {
    const range = element("input", { type: "range", min: 0, max: steps.length - 1, value: active });
    const shown = element("output", {});
    const tell = () => {
      shown.textContent = steps[range.value].label;
      range.setAttribute("aria-valuetext", shown.textContent);
    };
    range.addEventListener("input", () => { tell(); apply(steps[range.value].args); });
    tell();
    return element("label", {}, currentvalue?.prefix ?? "shown: ", range, shown);
  }

  function menu({ buttons, active = 0 }, apply) {
    const options = buttons.map(({ label }, i) => element("option", { value: i, selected: i === active }, label));
    const select = element("select", {}, ...options);
    select.addEventListener("change", () => apply(buttons[select.value].args));
    return element("label", {}, "shown: ", select);
  }

  // The names in Plotly's legend, made buttons: Enter and the space bar do what a click does. Plotly waits for a second
  // click and then draws the legend anew, so that the name that keys have pressed needs its focus back.
  function legendKeys(live) {
    let pressed;
    document.addEventListener("pointerdown", () => { pressed = undefined; });
    return () => live.querySelectorAll(".legend .traces").forEach((entry, i) => {
      const toggle = entry.querySelector(".legendtoggle");
      if (!toggle) return;
      Object.entries({ tabindex: 0, role: "button", "aria-label": `show or hide ${entry.textContent}`,
        "aria-pressed": entry.style.opacity !== "0.5" }).forEach((pair) => toggle.setAttribute(...pair));
      toggle.onkeydown = (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        pressed = i;
        for (const kind of ["mousedown", "mouseup"]) toggle.dispatchEvent(new MouseEvent(kind, { bubbles: true }));
      };
      if (i === pressed && document.activeElement === document.body) toggle.focus({ preventScroll: true });
    });
  }

  function draw(box) {
    const figure = JSON.parse(box.querySelector('script[type="application/json"]').textContent);
    const { sliders = [], updatemenus = [], ...own } = figure.layout;
    const live = element("div", { className: "ntk-live" });
    const narrow = window.matchMedia("(max-width: 600px)").matches;
    for (const trace of figure.data.filter(({ type }) => type === "heatmap")) {
      trace.hoverongaps = false; // nothing to say there
      if (narrow) trace.colorbar = { ...trace.colorbar, ...below };
    }
    const margin = narrow ? { l: 40, r: 10, t: 40, b: 40 } : { l: 55, r: 20, t: 50, b: 50 };
    // a click on a name waits that long for a second one, in milliseconds
    const config = { responsive: true, displayModeBar: false, doubleClickDelay: 300 };
    function layout() {
      const look = { ...inked(own), width: undefined, autosize: true, uirevision: "the reader's zoom is kept" };
      if (narrow) look.dragmode = false; // a finger on the plot scrolls the page
      return { ...look, ...themed(look), margin: { ...margin, ...look.margin }, legend: above };
    }
    const show = () => window.Plotly.react(live, inked(figure.data), layout(), config);
    const apply = ([changes]) => {
      for (const [key, values] of Object.entries(changes)) figure.data.forEach((trace, i) => { trace[key] = values[i]; });
      show();
    };
    const controls = [...sliders.map((one) => slider(one, apply)), ...updatemenus.map((one) => menu(one, apply))];
    if (controls.length) box.append(element("div", { className: "ntk-controls" }, ...controls));
    box.append(live);
    show().then(() => {
      const keys = legendKeys(live);
      keys();
      live.on("plotly_afterplot", keys);
      box.querySelector(".ntk-static").hidden = true;
      new MutationObserver(show).observe(
        document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
    }).catch((error) => giveUp(box, error));
  }

  // The static figure stays, and the page's other figures are drawn.
  function giveUp(box, error) {
    box.querySelectorAll(".ntk-live, .ntk-controls").forEach((part) => part.remove());
    box.querySelector(".ntk-static").hidden = false;
    console.error("interactive figure:", error);
  }

  function start() {
    const boxes = document.querySelectorAll(".ntk-interactive");
    if (!boxes.length) return;
    const script = document.createElement("script");
    script.src = new URL("plotly.min.js", here).href;
    script.onload = () => boxes.forEach((box) => {
      try {
        draw(box);
      } catch (error) {
        giveUp(box, error);
      }
    });
    document.head.appendChild(script);
  }

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
