// Draws the figures that ntkbook.publish.figures.interactive() left in the page, with the plotly.min.js beside this
// script. Without Plotly or without JavaScript the static figure stays.
(() => {
  const here = document.currentScript ? document.currentScript.src : "";

  function dark() {
    return document.documentElement.dataset.theme === "dark";
  }

  function themed(layout) {
    const ink = dark() ? "#e6e6e6" : "#222222";
    const grid = dark() ? "#444b55" : "#dddddd";
    const look = { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { ...layout.font, color: ink } };
    const axes = Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key));
    for (const key of new Set([...axes, "xaxis", "yaxis"])) {
      look[key] = { ...layout[key], gridcolor: grid, zerolinecolor: grid, linecolor: ink, automargin: true };
    }
    return look;
  }

  function draw(box) {
    const figure = JSON.parse(box.querySelector('script[type="application/json"]').textContent);
    const still = box.querySelector(".ntk-static");
    const live = document.createElement("div");
    live.className = "ntk-live";
    box.appendChild(live);
    const layout = { ...figure.layout, width: undefined, autosize: true };
    const narrow = window.matchMedia("(max-width: 600px)").matches;
    const margin = narrow ? { l: 40, r: 10, t: 40, b: 40 } : { l: 55, r: 20, t: 50, b: 50 };
    const legend = { orientation: "h", y: -0.2, ...layout.legend };
    const config = { responsive: true, displaylogo: false, displayModeBar: !narrow };
    const page = () => ({ ...layout, ...themed(layout), margin: { ...margin, ...layout.margin }, legend });
    window.Plotly.newPlot(live, figure.data, page(), config).then(() => {
      if (figure.frames) window.Plotly.addFrames(live, figure.frames);
      still.hidden = true;
      new MutationObserver(() => window.Plotly.relayout(live, themed(live.layout))).observe(
        document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
    }).catch((error) => { live.remove(); console.error("interactive figure:", error); });
  }

  function start() {
    const boxes = document.querySelectorAll(".ntk-interactive");
    if (!boxes.length) return;
    const script = document.createElement("script");
    script.src = new URL("plotly.min.js", here).href;
    script.onload = () => boxes.forEach(draw);
    document.head.appendChild(script);
  }

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
