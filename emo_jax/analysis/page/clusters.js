"use strict";
/* The cluster explorer: cards, and one cluster. */

const ORDERS = {
  size: ["largest", (a, b) => b.tokens - a.tokens],
  purity: ["one label first", (a, b) => purest(b) - purest(a)],
  number: ["number", (a, b) => a.id - b.id],
};
const purest = (cluster) => Object.values(cluster.labels)[0] ?? 0;
const named = (cluster) => cluster.name || "(no words)";
const clusterHash = (model, cluster) => `cluster=${letter(model)}:${cluster.id}`;

/** Tokens and documents of a cluster of a model. */
function size(one, c) {
  const total = one.clusters.reduce((sum, other) => sum + other.tokens, 0);
  return `${plural(c.tokens, "token")} (${percent(c.tokens / total)}) in ${plural(c.documents, "document")}`;
}

const labelBars = (c, most) => bars(Object.entries(c.labels).slice(0, most).map(([label, share]) => [labelName(label), share]));

function clustersView(found, value) {
  const model = value === "b" && found.models.length > 1 ? 1 : 0, one = found.models[model];
  const grid = h("ul", { class: "cards" });
  const card = (c) => h("li", {}, h("a", { class: "card", href: `#${clusterHash(model, c)}` },
    h("span", { class: "number" }, `Cluster ${c.id}`), h("span", { class: "name" }, named(c)), note(size(one, c)),
    labelBars(c, 3)));
  const show = (order) => fill(grid, [...one.clusters].sort(ORDERS[order][1]).map(card));
  show("size");
  return [
    h("h1", {}, "Clusters"),
    lead(`Tokens that the routers of ${one.name} send to the same experts. A cluster is named by the words that it has more
      often than other text.`),
    controls(modelChoice("clusters-model", found.models, model, (i) => go(`clusters=${letter(i)}`)),
      choice("Order", "clusters-order", Object.entries(ORDERS).map(([key, [shown]]) => [key, shown]), "size", show)),
    grid,
    h("div", { class: "pair" }, [`removal-${model}`, `overlap-${model}`].map((name) =>
      found.charts.includes(name) && chart(name, { scrolls: true, level: "h2" }))),
    subsetParts(one),
  ];
}

async function clusterView(found, value) {
  const [which, id] = value.split(":"), model = which === "b" && found.models.length > 1 ? 1 : 0, one = found.models[model];
  const c = one.clusters.find((other) => String(other.id) === id);
  if (!c) return clustersView(found, which);
  const next = one.clusters[(one.clusters.indexOf(c) + 1) % one.clusters.length];
  return [
    h("p", { class: "crumbs" }, link(`clusters=${letter(model)}`, "← All clusters"),
      link(clusterHash(model, next), `Cluster ${next.id} →`)),
    h("p", { class: "eyebrow" }, `Cluster ${c.id} of ${one.name}`), h("h1", {}, named(c)),
    lead(`${size(one, c)}.`, pairedWith(found, model, c)),
    ...moduleParts(c),
    overlapSection(one, model, c),
    await documentsSection(found, model, c),
  ];
}

/** What a cluster and a subset have in common. */
function moduleParts(c) {
  const word = (w) => h("li", {}, h("span", { class: "token" }, visible(w.text)), note(`×${number(w.lift)}`));
  const context = (x) => h("li", {},
    link(`document=${x.document}`, "…", x.before.trimStart(), marked(x.token), x.after.trimEnd(), "…"));
  return [
    h("div", { class: "pair" }, section("Labels of its tokens", labelBars(c, 10)),
      section("Words", help("How many times as often as in all text."), h("ul", { class: "words" }, c.words.map(word)))),
    section("Contexts", h("ul", { class: "contexts" }, c.contexts.map(context))),
    h("div", { class: "pair" }, section("Experts by layer", help("The strongest of each layer: their share of the router's ",
      "probability, and how many times that is their share in all text."), expertsTable(c.experts)), removalSection(c)),
  ];
}

/** A subset that was given: its tokens are those that give its experts most of their probability. */
const subsetParts = (one) => (one.subsets ?? []).map((s) => h("div", { class: "subset" },
  section(`Subset ${s.name}`, help(`${percent(s.share)} of the experts; ${size(one, s)} prefer them most.`)), moduleParts(s)));

/** A token as it is read alone. */
function visible(token) {
  return token.trim() || token.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "␣";
}

/** The cluster of the other model that has most of the same tokens. */
function pairedWith(found, model, c) {
  const pair = found.alignment?.find((p) => p[letter(model)] === c.id), other = found.models[1 - model];
  const paired = pair && other.clusters.find((o) => o.id === pair[letter(1 - model)]);
  return paired && [` In ${other.name} its pair is `, link(clusterHash(1 - model, paired), clusterName(paired)),
    `: they share ${percent(pair.tokens)} of their tokens.`];
}

/** layers: [[[expert, share, lift]]]. */
function expertsTable(layers) {
  const most = Math.max(1, ...layers.map((experts) => experts.length));
  const cell = ([e, share, lift]) => h("td", { style: { "--share": share } }, h("strong", {}, e),
    note(`${percent(share)} ×${number(lift)}`));
  return wide("Experts by layer", h("table", { class: "experts" },
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Layer"), h("th", { scope: "col", colspan: most }, "Experts"))),
    h("tbody", {}, layers.map((experts, layer) => h("tr", {}, h("th", { scope: "row" }, layer), experts.map(cell))))));
}

function removalSection(c) {
  const title = "What removing it costs";
  if (!c.removal) return section(title, help("Not measured."));
  const rises = Object.entries(c.removal.loss).filter(([, rise]) => rise !== null);
  const most = Math.max(...rises.map(([, rise]) => Math.abs(rise)), 1e-9);
  const rows = rises.sort(([a, x], [b, y]) => (b === "all") - (a === "all") || y - x).map(([label, rise]) => [
    label === "all" ? h("strong", {}, "all text") : labelName(label), Math.abs(rise) / most, number(rise, true),
    rise < 0 ? "" : "cost"]);
  const removed = plural(c.removal.experts[0].length, "expert");
  return section(title, help(`Change of the loss, nats/token, without ${removed} of every layer.`), bars(rows));
}

function overlapSection(one, model, c) {
  const rows = one.clusters.map((other, i) => [link(clusterHash(model, other), clusterName(other)), c.overlap[i], other]);
  const shared = rows.filter(([, share, other]) => share > 0 && other !== c).sort((a, b) => b[1] - a[1]).slice(0, 8);
  return section("Clusters that use the same experts", shared.length ? bars(shared.map((row) => row.slice(0, 2)))
    : help("No other cluster uses its strongest experts."));
}

/** Documents with most of its tokens, these marked. */
async function documentsSection(found, model, c) {
  const all = await documents(), of = await array(`clusters_${model}`), counts = [];
  all.shown.forEach((number, s) => {
    let n = 0;
    for (let t = all.starts[s]; t < all.starts[s + 1]; t++) n += of[t] === c.id;
    if (n) counts.push([s, number, n]);
  });
  counts.sort((a, b) => b[2] - a[2]);
  function excerpt(s) {
    const pieces = [];  // neighbours that are marked alike are one piece
    for (let t = all.starts[s]; t < all.starts[s + 1]; t++) {
      const inside = of[t] === c.id, token = all.vocabulary[all.tokens[t]];
      if (pieces.at(-1)?.[0] === inside) pieces.at(-1)[1] += token;
      else pieces.push([inside, token]);
    }
    return pieces.map(([inside, token]) => (inside ? marked(token) : token));
  }
  const item = ([s, number, n]) => h("li", {}, link(`document=${number}`,
    note(`${labelName(found.data.labels[all.label[number]])} · ${plural(n, "token")} of it`),
    h("span", { class: "excerpt" }, excerpt(s))));
  const part = all.shown.length < found.data.documents && `, of the ${count(all.shown.length)} whose text is in this page`;
  return section("Its documents", help("Those with most of its tokens, which are marked", part, "."),
    growing(counts, 8, item, h("ul", { class: "documents" })));
}
