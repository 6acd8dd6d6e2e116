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

  // What is drawn in black or dark grey on a light page is drawn light on a dark one.
  function inked(part) {
    if (!dark() || part === undefined) return part;
    return JSON.parse(JSON.stringify(part).replace(/"#000000"/g, '"#e6e6e6"').replace(/"#4D4D4D"/gi, '"#b0b6bd"'));
  }

  function draw(box) {
    const figure = JSON.parse(box.querySelector('script[type="application/json"]').textContent);
    for (const trace of figure.data) if (trace.type === "heatmap") trace.hoverongaps = false; // nothing to say there
    const live = document.createElement("div");
    live.className = "ntk-live";
    box.appendChild(live);
    const narrow = window.matchMedia("(max-width: 600px)").matches;
    const margin = narrow ? { l: 40, r: 10, t: 40, b: 40 } : { l: 55, r: 20, t: 50, b: 50 };
    const config = { responsive: true, displaylogo: false, displayModeBar: !narrow };
    function layout() {
      const own = { ...inked(figure.layout), width: undefined, autosize: true };
      const legend = { orientation: "h", y: -0.2, ...own.legend };
      return { ...own, ...themed(own), margin: { ...margin, ...own.margin }, legend };
    }
    const show = () => window.Plotly.react(live, inked(figure.data), layout(), config);
    show().then(() => {
      if (figure.frames) window.Plotly.addFrames(live, figure.frames);
      box.querySelector(".ntk-static").hidden = true;
      new MutationObserver(show).observe(
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
