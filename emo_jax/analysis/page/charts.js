"use strict";
/* Charts: Vega-Lite specifications of figures.py, drawn when they come into sight, in the colours of the page, each with its
   data as a table. */

const drawn = new Set();  // functions that draw a chart again, for another theme
const inSight = new IntersectionObserver((entries) => {
  for (const entry of entries.filter((e) => e.isIntersecting)) {
    inSight.unobserve(entry.target);
    entry.target.draw();
  }
}, { rootMargin: "200px" });

/** The library, run once when the first chart is drawn. */
let library = null;
function loadLibrary() {
  library ??= text("library").then((code) => {
    const script = h("script");
    script.textContent = `(() => {${code}})()`;
    document.head.append(script);
  });
  return library;
}

function theme() {
  const probe = document.body.appendChild(h("span", { hidden: true }));
  const [ink, soft, line] = ["--ink", "--soft", "--line"].map((name) => {
    probe.style.color = `var(${name})`;
    return getComputedStyle(probe).color;
  });
  const font = getComputedStyle(probe).fontFamily;
  probe.remove();
  return {
    aria: false, background: "transparent", font, view: { stroke: null },
    axis: { gridColor: line, domainColor: line, tickColor: line, labelColor: soft, titleColor: soft, titleFontWeight: 400,
      labelFontSize: 12, titleFontSize: 12 },
    legend: { labelColor: ink, titleColor: soft, labelFontSize: 12.5 },
  };
}

/** A figure: chart, slider for the layer, table. change(spec): before it is drawn; after(view): each time it has been. */
function chart(name, { change = () => {}, after = () => {}, scrolls = false, level = "h3" } = {}) {
  const id = `figure-${name}`, title = h(level, { id, class: "chart-title" }), told = help(), above = controls();
  const target = h("div", { class: "plot" });
  const data = h("details", { class: "data" }, h("summary", {}, "The same as a table"));
  const figure = h("figure", { class: "chart" }, h("figcaption", {}, title, told), above,
    scrolls ? wide("Chart", target) : target, data);
  let spec = null, view = null, layer = null;

  async function draw() {
    const [raw] = await Promise.all([json(`chart-${name}`), loadLibrary()]);
    if (!spec) {
      spec = structuredClone(raw);
      await change(spec);
      layer = spec.params?.find((param) => param.name === "layer")?.value ?? null;
      if (layer !== null) above.append(slider());
      data.addEventListener("toggle", table);
    }
    const { title: shown, description, ...rest } = spec;
    title.textContent = shown;
    told.textContent = description;
    view?.finalize();
    ({ view } = await vegaEmbed(target, { ...rest, config: theme() }, {
      mode: "vega-lite", logLevel: 1, renderer: name.startsWith("map_") ? "canvas" : "svg", tooltip: { theme: "custom" },
      actions: { export: true, source: false, compiled: false, editor: false }, downloadFileName: name,
    }));
    if (layer !== null) await view.signal("layer", layer).runAsync();
    const picture = target.querySelector("svg.marks, canvas");
    picture.setAttribute("role", "img");
    picture.setAttribute("aria-label", `${shown}. ${description}`);
    target.querySelector("summary").setAttribute("aria-label", `Save: ${shown}`);
    figure.dataset.drawn = "";
    after(view);
  }

  function slider() {
    const last = Math.max(...spec.data.values.map((row) => row.layer)), output = h("output", {}, String(layer));
    const input = h("input", { type: "range", min: 0, max: last, step: 1, value: layer, oninput: () => {
      layer = Number(input.value);
      output.textContent = input.value;
      view?.signal("layer", layer).runAsync();
      table();
    } });
    return h("label", { class: "slider" }, "Layer ", input, output);
  }

  /** Of the fields that the tooltips tell. */
  function table() {
    if (!data.open) return;
    const tooltip = (spec.layer ?? [spec]).map((mark) => mark.encoding.tooltip).find(Boolean);
    const cell = (value) => (typeof value === "number" && !Number.isInteger(value) ? number(value) : String(value ?? "–"));
    const rows = spec.data.values.filter((row) => layer === null || row.layer === layer), body = h("tbody");
    const [, more] = growing(rows, 200, (row) => h("tr", {}, tooltip.map((t) => h("td", {}, cell(row[t.field])))), body);
    fill(data, data.firstChild, wide("Table", h("table", {}, h("caption", { class: "unseen" }, title.textContent),
      h("thead", {}, h("tr", {}, tooltip.map((t) => h("th", { scope: "col" }, t.title ?? t.field)))), body)), more);
  }

  figure.draw = draw;
  drawn.add(() => { if (spec && figure.isConnected) draw(); });
  inSight.observe(figure);
  return figure;
}
