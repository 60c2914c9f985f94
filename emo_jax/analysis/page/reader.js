"use strict";
/* Documents: what is known of them, and the reader that colours every token. */

let store = null;
function documents() {
  const names = ["label", "shown", "starts", "tokens"];
  store ??= Promise.all([...names.map(array), json("title"), json("vocabulary")]).then(
    ([label, shown, starts, tokens, title, vocabulary]) => (
      { label, shown, starts, tokens, title, vocabulary, row: new Map(Array.from(shown, (number, s) => [number, s])) }));
  return store;
}

/** The documents nearest to one on a model's map. */
async function nearest(model, number, size = 6) {
  const at = await array(`map_${model}`), far = [];
  for (let d = 0; d < at.length / 2; d++) {
    if (d !== number) far.push([(at[2 * d] - at[2 * number]) ** 2 + (at[2 * d + 1] - at[2 * number + 1]) ** 2, d]);
  }
  return far.sort((a, b) => a[0] - b[0]).slice(0, size).map(([, d]) => d);
}

const reading = { models: "both", by: "cluster", layer: 0 };  // kept from one document to the next

async function readDocument(found, number) {
  const all = await documents(), dialog = $("reader"), known = number >= 0 && number < all.label.length;
  const last = all.label.length - 1, label = (d) => labelName(found.data.labels[all.label[d]]);
  const near = known ? await nearest(0, number) : [];
  const to = (d, said) => d >= 0 && d <= last && h("a", { href: `#document=${d}`, class: "quiet" }, said);
  const item = (d) => h("li", {}, link(`document=${d}`, all.title[d] || "(empty)"), note(` ${label(d)}`));
  fill(dialog,
    h("div", { class: "reader-head" },
      h("div", {}, h("p", { class: "eyebrow" }, known ? `Document ${number} · ${label(number)}` : "Documents"),
        h("h2", { id: "reader-title", tabindex: -1 }, known ? all.title[number] || "(empty)" : "There is no such document")),
      h("div", { class: "reader-actions" }, known && [to(number - 1, "← Previous"), to(number + 1, "Next →")],
        h("button", { type: "button", id: "close-reader", onclick: () => dialog.close() }, "Close"))),
    all.row.has(number) ? await coloured(found, all, all.row.get(number)) : known && lead(
      `Its text is not in this page, which has that of ${count(all.shown.length)} of ${count(last + 1)} documents.`),
    near.length > 0 && h("section", {}, h("h3", {}, `Nearest by the experts of ${found.models[0].name}`),
      h("ul", { class: "plain" }, near.map(item))));
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  $("reader-title").focus();
}

/** The text of a document, with what chooses its colours. */
async function coloured(found, all, row) {
  const tip = h("div", { id: "tip", role: "status", hidden: true }), panes = h("div", { class: "panes" }), output = h("output");
  const layers = Math.max(...found.models.map((one) => one.layers)), names = found.models.map((one, i) => [i, one.name]);
  const input = h("input", { type: "range", min: 0, max: layers - 1, value: reading.layer,
    oninput: () => set({ layer: Number(input.value) }) });
  const slider = h("label", { class: "slider" }, "Layer ", input, output);
  async function set(change) {
    Object.assign(reading, change);
    slider.hidden = reading.by !== "expert";
    output.textContent = reading.layer;
    tip.hidden = true;
    const shown = found.models.map((one, i) => i).filter((i) => reading.models === "both" || reading.models === i);
    fill(panes, await Promise.all(shown.map((i) => pane(found, i, all, row, tip))));
  }
  await set({});
  return [
    controls(names.length > 1
      && choice("Model", "reader-models", [...names, ["both", "both"]], reading.models, (models) => set({ models })),
      choice("Colour by", "reader-by", [["cluster", "cluster"], ["expert", "expert"]], reading.by, (by) => set({ by })),
      slider),
    help("Point at a token, or step through them with the arrow keys. The names below filter."), panes, tip,
  ];
}

/** The text as one model sees it. */
async function pane(found, model, all, row, tip) {
  const one = found.models[model], layer = Math.min(reading.layer, one.layers - 1), byCluster = reading.by === "cluster";
  const low = all.starts[row], high = all.starts[row + 1];
  const words = Array.from(all.tokens.subarray(low, high), (v) => all.vocabulary[v]);
  const [clusters, experts] = (await Promise.all([array(`clusters_${model}`), array(`experts_${model}_${layer}`)])).map(
    (of) => of.subarray(low, high));
  const nameOf = new Map(one.clusters.map((c) => [c.id, clusterName(c)]));
  const keys = byCluster ? clusters : experts, counts = new Map();
  for (const key of keys) counts.set(key, (counts.get(key) ?? 0) + 1);
  const order = [...counts.keys()].sort((a, b) => counts.get(b) - counts.get(a) || a - b);
  const looks = new Map(order.map((key, rank) => [key, look(byCluster ? key : rank, found.colors)]));
  const tokens = words.map((word, t) => h("span", { class: "t", tabindex: t ? -1 : 0, "data-t": t, "data-key": keys[t],
    style: { "--c": looks.get(keys[t]).color, "--line": looks.get(keys[t]).line } }, word));
  const label = `Text, coloured by ${reading.by} of ${one.name}`;
  const body = h("div", { class: "text", role: "group", "aria-label": label }, tokens);
  body.addEventListener("pointerover", (event) => point(event.target.closest(".t")));
  body.addEventListener("focusin", (event) => point(event.target.closest(".t")));
  for (const leaving of ["pointerleave", "focusout"]) body.addEventListener(leaving, () => { tip.hidden = true; });
  body.addEventListener("keydown", step);

  /** Says what a token is, and shows it in the other model too. */
  function point(token) {
    if (!token) return;
    const t = Number(token.dataset.t), box = token.getBoundingClientRect();
    for (const other of body.closest(".panes").querySelectorAll(".t")) {
      other.classList.toggle("same", other.dataset.t === token.dataset.t);
    }
    fill(tip, h("strong", {}, one.name),
      ` “${visible(words[t])}” cluster ${nameOf.get(clusters[t]) ?? clusters[t]} · expert ${experts[t]} of layer ${layer}`);
    tip.hidden = false;
    tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${box.bottom + 8 + tip.offsetHeight > innerHeight ? box.top - tip.offsetHeight - 8 : box.bottom + 8}px`;
  }

  function step(event) {
    const t = Number(event.target.dataset.t);
    const next = { ArrowRight: t + 1, ArrowDown: t + 1, ArrowLeft: t - 1, ArrowUp: t - 1, Home: 0,
      End: tokens.length - 1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    if (!tokens[next]) return;
    event.target.tabIndex = -1;
    tokens[next].tabIndex = 0;
    tokens[next].focus();
  }

  const entries = order.map((key) => ({ key, ...looks.get(key), glyph: "",
    text: `${byCluster ? nameOf.get(key) ?? key : `expert ${key}`} (${counts.get(key)})` }));
  const filter = (only) => tokens.forEach((token, t) => token.classList.toggle("faded", only.size > 0 && !only.has(keys[t])));
  const key = legend(`Filter by ${reading.by} of ${one.name}`, entries, filter);
  return h("section", { class: "pane" }, h("h3", {}, one.name), key, body);
}
