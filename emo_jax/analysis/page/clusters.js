"use strict";
/* The cluster explorer: cards, and one cluster. */

function clustersView(found, value) {
  const model = value === "b" && found.models.length > 1 ? 1 : 0, one = found.models[model];
  const total = one.clusters.reduce((sum, c) => sum + c.tokens, 0);
  const grid = h("ul", { class: "cards" });
  const order = { size: (a, b) => b.tokens - a.tokens, number: (a, b) => a.id - b.id, purity: (a, b) => purest(b)[1] - purest(a)[1] };
  const show = (by) => grid.replaceChildren(...[...one.clusters].sort(order[by]).map((c) => card(c, model, total)));
  show("size");
  return [
    h("h1", {}, "Clusters"),
    h("p", { class: "lead" }, `Tokens of ${one.name} that the routers send to the same experts. A cluster is named by the words that it has more often than other text.`),
    h("div", { class: "controls" }, modelChoice("clusters-model", found.models, model, (i) => go(`clusters=${letter(i)}`)),
      choice("Order", "clusters-order", [["size", "largest"], ["purity", "one label first"], ["number", "number"]], "size", show)),
    grid,
    h("div", { class: "pair" }, [`removal-${model}`, `overlap-${model}`].filter((name) => found.charts.includes(name)).map((name) => chart(name, { wide: true, level: "h2" }))),
  ];
}

const purest = (c) => Object.entries(c.labels)[0] ?? ["", 0];

function card(c, model, total) {
  const shown = Object.entries(c.labels).slice(0, 3);
  return h("li", {}, h("a", { class: "card", href: `#cluster=${letter(model)}:${c.id}` },
    h("span", { class: "number" }, `Cluster ${c.id}`), h("span", { class: "name" }, c.name || "(no words)"),
    h("span", { class: "help" }, `${plural(c.tokens, "token")} (${percent(c.tokens / total)}) in ${plural(c.documents, "document")}`),
    bars(shown.map(([label, share]) => [labelName(label), share]))));
}

async function clusterView(found, value) {
  const [which, id] = value.split(":"), model = which === "b" && found.models.length > 1 ? 1 : 0, one = found.models[model];
  const c = one.clusters.find((other) => String(other.id) === id);
  if (!c) return clustersView(found, which);
  const total = one.clusters.reduce((sum, other) => sum + other.tokens, 0);
  const next = one.clusters[(one.clusters.indexOf(c) + 1) % one.clusters.length];
  const pair = found.alignment?.find((p) => p[letter(model)] === c.id), other = pair && found.models[1 - model];
  const paired = pair && other.clusters.find((o) => o.id === pair[letter(1 - model)]);
  return [
    h("p", { class: "crumbs" }, h("a", { href: `#clusters=${letter(model)}` }, "← All clusters"), h("a", { href: `#cluster=${letter(model)}:${next.id}` }, `Cluster ${next.id} →`)),
    h("p", { class: "eyebrow" }, `Cluster ${c.id} of ${one.name}`), h("h1", {}, c.name || "(no words)"),
    h("p", { class: "lead" }, `${plural(c.tokens, "token")} (${percent(c.tokens / total)}) in ${plural(c.documents, "document")}.`,
      paired && [` In ${other.name} its pair is `, h("a", { href: `#cluster=${letter(1 - model)}:${paired.id}` }, clusterName(paired)), `: they share ${percent(pair.tokens)} of their tokens.`]),
    h("div", { class: "pair" },
      h("section", {}, h("h2", {}, "Labels of its tokens"), bars(Object.entries(c.labels).slice(0, 10).map(([label, share]) => [labelName(label), share]))),
      h("section", {}, h("h2", {}, "Words"), h("p", { class: "help" }, "How many times as often as in all text."),
        h("ul", { class: "words" }, c.words.map((w) => h("li", {}, h("span", { class: "token" }, visible(w.text)), h("span", { class: "help" }, `×${number(w.lift)}`)))))),
    h("section", {}, h("h2", {}, "Contexts"), h("ul", { class: "contexts" }, c.contexts.map((x) => h("li", {}, h("a", { href: `#document=${x.document}` }, "…", x.before.trimStart(), marked(x.token), x.after.trimEnd(), "…"))))),
    h("div", { class: "pair" }, expertsSection(c), removalSection(c)),
    overlapSection(one, model, c),
    await documentsSection(found, model, c),
  ];
}

/** A token as it is read alone. */
const visible = (token) => token.trim() || token.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "␣";

function expertsSection(c) {
  return h("section", {}, h("h2", {}, "Experts by layer"), h("p", { class: "help" }, "The strongest of each layer: their share of the router's probability, and how many times that is their share in all text."),
    expertsTable(c.experts));
}

/** layers: [[[expert, share, lift]]]. */
function expertsTable(layers) {
  return h("div", { class: "wide", tabindex: 0, role: "group", "aria-label": "Experts by layer" }, h("table", { class: "experts" },
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Layer"), h("th", { scope: "col", colspan: Math.max(1, ...layers.map((l) => l.length)) }, "Experts"))),
    h("tbody", {}, layers.map((experts, layer) => h("tr", {}, h("th", { scope: "row" }, layer), experts.map(([e, share, lift]) =>
      h("td", { style: { "--share": share } }, h("strong", {}, e), h("span", { class: "help" }, `${percent(share)} ×${number(lift)}`))))))));
}

function removalSection(c) {
  const title = h("h2", {}, "What removing it costs");
  if (!c.removal) return h("section", {}, title, h("p", { class: "help" }, "Not measured for this cluster."));
  const rows = Object.entries(c.removal.loss).sort(([a, x], [b, y]) => (b === "all") - (a === "all") || y - x);
  const most = Math.max(...rows.map(([, rise]) => Math.abs(rise)), 1e-9), removed = c.removal.experts[0].length;
  return h("section", {}, title, h("p", { class: "help" }, `Change of the loss, nats/token, without ${plural(removed, "expert")} of every layer.`),
    h("dl", { class: "bars" }, rows.map(([label, rise]) => h("div", {}, h("dt", {}, label === "all" ? h("strong", {}, "all text") : labelName(label)),
      h("dd", {}, h("span", { class: rise < 0 ? "bar gain" : "bar cost", style: { "--share": Math.abs(rise) / most } }), h("span", { class: "amount" }, number(rise, true)))))));
}

function overlapSection(one, model, c) {
  const rows = one.clusters.filter((o) => o !== c).map((o) => [o, c.overlap[one.clusters.indexOf(o)]]).filter(([, share]) => share > 0).sort((a, b) => b[1] - a[1]).slice(0, 8);
  return h("section", {}, h("h2", {}, "Clusters that use the same experts"), rows.length ? bars(rows.map(([o, share]) => [h("a", { href: `#cluster=${letter(model)}:${o.id}` }, clusterName(o)), share]))
    : h("p", { class: "help" }, "No other cluster uses its strongest experts."));
}

/** Documents with most of its tokens, these marked. */
async function documentsSection(found, model, c) {
  const store = await documents(), of = await array(`clusters_${model}`), counts = [];
  store.shown.forEach((number, s) => {
    let n = 0;
    for (let t = store.starts[s]; t < store.starts[s + 1]; t++) n += of[t] === c.id;
    if (n) counts.push([s, number, n]);
  });
  counts.sort((a, b) => b[2] - a[2]);
  const list = h("ul", { class: "documents" }), make = ([s, number, n]) => {
    const pieces = [];  // neighbours that are marked alike are one piece
    for (let t = store.starts[s]; t < store.starts[s + 1]; t++) {
      const inside = of[t] === c.id, token = store.vocabulary[store.tokens[t]];
      if (pieces.length && pieces.at(-1)[0] === inside) pieces.at(-1)[1] += token;
      else pieces.push([inside, token]);
    }
    return h("li", {}, h("a", { href: `#document=${number}` }, h("span", { class: "help" }, `${labelName(found.data.labels[store.label[number]])} · ${plural(n, "token")} of it`),
      h("span", { class: "excerpt" }, pieces.map(([inside, token]) => inside ? marked(token) : token))));
  };
  return h("section", {}, h("h2", {}, "Its documents"), h("p", { class: "help" }, `Those with most of its tokens, which are marked${store.shown.length < found.data.documents ? `, of the ${count(store.shown.length)} whose text is in this page` : ""}.`),
    growing(counts, 8, make, list));
}
