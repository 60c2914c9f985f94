"use strict";
/* Charts: Vega-Lite specifications of figures.py, drawn when they come into sight, in the colours of the page, each with its data as a
   table. */

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
    const script = h("script", {});
    script.textContent = `(() => {${code}})()`;
    document.head.append(script);
  });
  return library;
}

function theme() {
  const style = getComputedStyle(document.documentElement), of = (name) => style.getPropertyValue(name).trim();
  const [ink, soft, line] = [of("--ink"), of("--soft"), of("--line")];
  return {
    background: "transparent", font: of("--sans"), view: { stroke: null },
    axis: { gridColor: line, domainColor: line, tickColor: line, labelColor: soft, titleColor: soft, titleFontWeight: 400, labelFontSize: 12, titleFontSize: 12 },
    legend: { labelColor: ink, titleColor: soft, labelFontSize: 12.5 },
  };
}

/** A figure: chart, layers' slider, table. change(spec) before it is drawn; after(view) each time it has been. */
function chart(name, { change = () => {}, after = () => {}, wide = false, level = "h3" } = {}) {
  const id = `figure-${name}-${Math.random().toString(36).slice(2, 8)}`;
  const title = h(level, { id, class: "chart-title" }), help = h("p", { class: "help" });
  const target = h("div", { class: "plot", role: "img", "aria-labelledby": id });
  const area = h("div", wide ? { class: "wide", tabindex: 0, role: "group", "aria-labelledby": id } : {}, target);
  const controls = h("div", { class: "controls" }), data = h("details", { class: "data" }, h("summary", {}, "The same as a table"));
  const figure = h("figure", { class: "chart", "data-chart": name }, h("figcaption", {}, title, help), controls, area, data);
  let spec = null, view = null, layer = null;

  async function draw() {
    const [raw] = await Promise.all([json(`chart-${name}`), loadLibrary()]);
    if (!spec) {
      spec = structuredClone(raw);
      await change(spec);
      layer = spec.params?.find((p) => p.name === "layer")?.value ?? null;
      if (layer !== null) controls.append(slider());
      data.addEventListener("toggle", table);
    }
    const { title: shown, description, ...rest } = spec;
    title.textContent = shown;
    help.textContent = description;
    view?.finalize();
    const made = await vegaEmbed(target, { ...rest, config: theme() }, {
      mode: "vega-lite", logLevel: 1, renderer: name.startsWith("map_") ? "canvas" : "svg", tooltip: { theme: "custom" },
      actions: { export: true, source: false, compiled: false, editor: false }, downloadFileName: name,
    });
    view = made.view;
    if (layer !== null) await view.signal("layer", layer).runAsync();
    target.querySelector("summary")?.setAttribute("aria-label", `Save: ${shown}`);
    figure.dataset.drawn = "";
    after(view);
  }

  function slider() {
    const last = Math.max(...spec.data.values.map((row) => row.layer)), output = h("output", {}, String(layer));
    return h("label", { class: "slider" }, "Layer ", h("input", { type: "range", min: 0, max: last, step: 1, value: layer, oninput: (event) => {
      layer = Number(event.target.value);
      output.textContent = String(layer);
      view?.signal("layer", layer).runAsync();
      table();
    } }), output);
  }

  /** Of the fields that the tooltips tell. */
  function table() {
    if (!data.open) return;
    const marks = spec.layer ?? [spec], fields = marks.map((mark) => mark.encoding.tooltip).find(Boolean).map((t) => [t.field, t.title ?? t.field]);
    const rows = spec.data.values.filter((row) => layer === null || row.layer === layer);
    const body = h("tbody"), tableOf = h("table", {}, h("caption", { class: "unseen" }, title.textContent),
      h("thead", {}, h("tr", {}, fields.map(([, shown]) => h("th", { scope: "col" }, shown)))), body);
    const [, more] = growing(rows, 200, (row) => h("tr", {}, fields.map(([field]) =>
      h("td", {}, typeof row[field] === "number" && !Number.isInteger(row[field]) ? number(row[field]) : String(row[field] ?? "–")))), body);
    data.replaceChildren(data.firstChild, h("div", { class: "wide", tabindex: 0, role: "group", "aria-label": "Table" }, tableOf), more);
  }

  figure.draw = draw;
  drawn.add(() => { if (spec && figure.isConnected) draw(); });
  inSight.observe(figure);
  return figure;
}
