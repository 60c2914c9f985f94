"use strict";
/* The overview and the table of measures. */

function overviewView(found) {
  const names = found.models.map((one) => one.name), one = found.models[0];
  const tiles = [["effective_experts", `of ${one.experts} experts a document uses in effect`], ["top_quarter", "of the routing goes to the quarter that a document prefers", percent],
    ["cluster_label", "nats that a cluster tells of a text's label"], ["gap_eighth", "nats/token lost with an eighth of the experts a document"]];
  return [
    h("div", { class: "hero" },
      h("p", { class: "eyebrow" }, "What the experts became"),
      h("h1", {}, names[0], names[1] && [h("span", { class: "beside" }, " beside "), names[1]])),
    h("div", { class: "tiles" }, tiles.map(([key, said, form = number]) => tile(found, key, said, form))),
    h("div", { class: "prose" }, found.overview.map((part) => h("section", {}, h("h2", {}, part.title), h("p", {}, part.text)))),
    h("section", {}, h("h2", {}, "Questions"),
      h("p", { class: "help" }, "Each answer is computed from these data; the link leads to the view that shows it."),
      h("dl", { class: "questions" }, found.questions.map((q) => h("div", {}, h("dt", {}, q.question),
        h("dd", {}, q.answer, " ", h("a", { href: `#${q.link}`, "aria-label": `${q.view}: ${q.question}` }, q.view, h("span", { "aria-hidden": "true" }, " →"))))))),
    found.charts.includes("measures-share") && chart("measures-share", { level: "h2" }),
  ];
}

/** A number of the first model, beside those of the second and of a random router. */
function tile(found, key, said, form) {
  const [first, second] = found.models.map((one) => one.measures[key]);
  const random = found.random_router?.measures[key];
  if (first?.value == null) return null;
  const interval = (m) => m.low == null ? "" : `${form(m.low)} to ${form(m.high)}`;
  return h("div", { class: "tile" }, h("p", { class: "big" }, form(first.value)), h("p", {}, said),
    h("p", { class: "help" }, interval(first) && `95 %: ${interval(first)}`,
      second?.value != null && [h("br"), `${found.models[1].name}: `, h("strong", {}, form(second.value))],
      random?.value != null && [h("br"), "random router: ", h("strong", {}, form(random.value))]));
}

function measuresView(found) {
  const random = found.random_router, two = found.difference != null;
  const columns = [...found.models, ...(random ? [random] : [])];
  const is = `${found.models[0].name} is`, heads = ["Measure", ...found.models.map((one) => one.name), ...(two ? ["Difference", is] : []), ...(random ? ["Random router"] : [])];
  const said = { better: ["▲", "better"], worse: ["▼", "worse"], "": ["≈", "not clear"] };
  const td = (name, attributes, ...children) => h("td", { role: "cell", "data-column": name, ...attributes }, ...children);
  const cell = (name, m, signed) => m?.value == null ? td(name, { class: "none" }, "–") : td(name, {}, h("span", { class: "value" }, number(m.value, signed)),
    m.low != null && h("span", { class: "interval" }, `${number(m.low, signed)} to ${number(m.high, signed)}`));
  const row = (r) => h("tr", { role: "row" },  // with roles, because on a phone the table is laid out as blocks
    h("th", { scope: "row", role: "rowheader" }, h("span", { class: "measure" }, r.title), h("span", { class: "unit" }, [r.unit, r.better && `${r.better} is better`].filter(Boolean).join(", ")),
      h("span", { class: "help" }, r.help)),
    found.models.map((one) => cell(one.name, one.measures[r.key])),
    two && cell("Difference", found.difference[r.key], true),
    two && td(is, { class: `verdict ${r.verdict}` }, found.difference[r.key] && r.better && h("span", {}, h("span", { "aria-hidden": "true" }, said[r.verdict][0] + " "), said[r.verdict][1])),
    random && cell("Random router", random.measures[r.key]));
  return [
    h("h1", {}, "Measures"),
    h("p", { class: "lead" }, "Small figures are 95 % intervals by bootstrap over documents.",
      two && ` The difference is ${found.models[0].name} minus ${found.models[1].name}, paired over documents; it is clear where its interval does not contain 0.`,
      random && " A random router is the same network with its routers as at initialisation: what a measure shows without any modules."),
    h("div", { class: "wide", tabindex: 0, role: "group", "aria-label": "Table of measures" },
      h("table", { class: "measures", role: "table" }, h("caption", { class: "unseen" }, "Measures of modularity"),
        h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, heads.map((name) => h("th", { scope: "col", role: "columnheader" }, name)))),
        h("tbody", { role: "rowgroup" }, found.measures.filter((r) => columns.some((one) => one.measures[r.key])).map(row)))),
    ["measures-share", "measures-nats"].filter((name) => found.charts.includes(name)).map((name) => chart(name, { level: "h2" })),
  ];
}
