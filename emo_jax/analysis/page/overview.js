"use strict";
/* The overview and the table of measures. */

function overviewView(found) {
  const [one, second] = found.models;
  const tiles = [
    ["effective_experts", `of ${one.experts} experts a document uses in effect`],
    ["top_quarter", "of the routing goes to the quarter that a document prefers", percent],
    ["cluster_label", "nats that a cluster tells of a text's label"],
    ["gap_eighth", "nats/token lost with an eighth of the experts a document"],
  ];
  const answered = (q) => h("div", {}, h("dt", {}, q.question), h("dd", {}, q.answer, " ",
    h("a", { href: `#${q.link}`, "aria-label": `${q.view}: ${q.question}` }, q.view,
      h("span", { "aria-hidden": "true" }, " →"))));
  return [
    h("div", { class: "hero" }, h("p", { class: "eyebrow" }, "What the experts became"),
      h("h1", {}, one.name, second && [h("span", { class: "beside" }, " beside "), second.name])),
    h("div", { class: "tiles" }, tiles.map((tiled) => tile(found, ...tiled))),
    h("div", { class: "prose" }, found.overview.map((part) => section(part.title, h("p", {}, part.text)))),
    section("Questions", help("Each answer is computed from these data; the link leads to the view that shows it."),
      h("dl", { class: "questions" }, found.questions.map(answered))),
    found.charts.includes("measures-share") && chart("measures-share", { level: "h2" }),
  ];
}

/** A number of the first model, beside those of the second and of a random router. */
function tile(found, key, said, form = number) {
  const [first, second] = found.models.map((one) => one.measures[key]), random = found.random_router?.measures[key];
  if (first?.value == null) return null;
  const beside = (name, m) => m?.value != null && [h("br"), `${name}: `, h("strong", {}, form(m.value))];
  return h("div", { class: "tile" }, h("p", { class: "big" }, form(first.value)), h("p", {}, said),
    help(first.low != null && `95\u00a0%: ${form(first.low)} to ${form(first.high)}`, beside(found.models[1]?.name, second),
      beside("random router", random)));
}

function measuresView(found) {
  const random = found.random_router, [a, b] = found.models.map((one) => one.name), is = `${a} is`;
  const heads = listed(["Measure", found.models.map((one) => one.name), b && ["Difference", is], random && "Random router"]);
  const columns = listed([found.models, random]);
  const said = { better: ["▲ ", "better"], worse: ["▼ ", "worse"], "": ["≈ ", "not clear"] };
  // roles are told because on a phone the table is laid out as blocks
  const td = (name, attributes, ...children) => h("td", { role: "cell", "data-column": name, ...attributes }, children);
  const cell = (name, m, signed) => (m?.value == null ? td(name, { class: "none" }, "–")
    : td(name, {}, h("span", { class: "value" }, number(m.value, signed)),
      m.low != null && h("span", { class: "interval" }, `${number(m.low, signed)} to ${number(m.high, signed)}`)));
  const verdict = (r) => td(is, { class: `verdict ${r.verdict}` }, found.difference[r.key] && r.better
    && h("span", {}, h("span", { "aria-hidden": "true" }, said[r.verdict][0]), said[r.verdict][1]));
  const row = (r) => h("tr", { role: "row" },
    h("th", { scope: "row", role: "rowheader" }, h("span", { class: "measure" }, r.title),
      h("span", { class: "unit" }, listed([r.unit, r.better && `${r.better} is better`]).join(", ")), note(r.help)),
    found.models.map((one) => cell(one.name, one.measures[r.key])),
    b && [cell("Difference", found.difference[r.key], true), verdict(r)],
    random && cell("Random router", random.measures[r.key]));
  return [
    h("h1", {}, "Measures"),
    lead("Small figures are 95\u00a0% intervals by bootstrap over documents.",
      b && ` The difference is ${a} minus ${b}, paired over documents; it is clear where its interval does not contain 0.`,
      random && ` A random router is the same network with its routers as at initialisation: what a measure shows without
        modules.`),
    wide("Table of measures", h("table", { class: "measures", role: "table" },
      h("caption", { class: "unseen" }, "Measures of modularity"),
      h("thead", { role: "rowgroup" },
        h("tr", { role: "row" }, heads.map((name) => h("th", { scope: "col", role: "columnheader" }, name)))),
      h("tbody", { role: "rowgroup" }, found.measures.filter((r) => columns.some((one) => one.measures[r.key])).map(row)))),
    ["measures-share", "measures-nats"].map((name) => found.charts.includes(name) && chart(name, { level: "h2" })),
  ];
}
