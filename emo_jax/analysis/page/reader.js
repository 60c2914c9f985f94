"use strict";
/* Documents: what is known of them, and the reader that colours every token. */

let store = null;
function documents() {
  const names = ["label", "shown", "starts", "tokens"];
  store ??= Promise.all([...names.map(array), json("title"), json("vocabulary")]).then(([label, shown, starts, tokens, title, vocabulary]) =>
    ({ label, shown, starts, tokens, title, vocabulary, row: new Map(Array.from(shown, (number, s) => [number, s])) }));
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
  const tip = h("div", { id: "tip", role: "status", hidden: true }), panes = h("div", { class: "panes" });
  const at = all.row.get(number), last = all.label.length - 1;
  const models = found.models.map((one, i) => i), shown = () => models.filter((i) => reading.models === "both" || reading.models === i);
  const layers = Math.max(...found.models.map((one) => one.layers)), slider = h("label", { class: "slider" }, "Layer ",
    h("input", { type: "range", min: 0, max: layers - 1, value: reading.layer, oninput: (e) => { reading.layer = Number(e.target.value); draw(); } }), h("output"));
  async function draw() {
    slider.hidden = reading.by !== "expert";
    slider.lastChild.textContent = String(reading.layer);
    tip.hidden = true;
    panes.replaceChildren(...await Promise.all(shown().map((i) => pane(found, i, all, at, tip))));
  }
  const near = known ? await nearest(0, number) : [];
  const link = (d, said) => h("a", { href: `#document=${d}`, class: "quiet" }, said);
  dialog.replaceChildren(...listed([
    h("div", { class: "reader-head" },
      h("div", {}, h("p", { class: "eyebrow" }, known ? `Document ${number} · ${labelName(found.data.labels[all.label[number]])}` : "Documents"),
        h("h2", { id: "reader-title", tabindex: -1 }, known ? all.title[number] : `There is no document ${number}`)),
      h("div", { class: "reader-actions" }, known && number > 0 && link(number - 1, "← Previous"), known && number < last && link(number + 1, "Next →"),
        h("button", { type: "button", id: "close-reader", onclick: () => dialog.close() }, "Close"))),
    at === undefined ? h("p", { class: "lead" }, known ? `Its text is not in this page, which has that of ${count(all.shown.length)} of ${count(last + 1)} documents.` : "")
      : [h("div", { class: "controls" },
        models.length > 1 && choice("Model", "reader-models", [...found.models.map((one, i) => [i, one.name]), ["both", "both"]], reading.models, (v) => { reading.models = v; draw(); }),
        choice("Colour by", "reader-by", [["cluster", "cluster"], ["expert", "expert"]], reading.by, (v) => { reading.by = v; draw(); }), slider),
        h("p", { class: "help" }, "Point at a token, or step through them with the arrow keys. The names below filter."), panes],
    near.length > 0 && h("section", {}, h("h3", {}, `Nearest by the experts of ${found.models[0].name}`),
      h("ul", { class: "plain" }, near.map((d) => h("li", {}, h("a", { href: `#document=${d}` }, all.title[d]), h("span", { class: "help" }, ` ${labelName(found.data.labels[all.label[d]])}`))))),
    tip]));
  if (at !== undefined) await draw();
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  $("reader-title").focus();
}

/** The text as one model sees it. */
async function pane(found, model, all, at, tip) {
  const one = found.models[model], layer = Math.min(reading.layer, one.layers - 1), byCluster = reading.by === "cluster";
  const [clusters, experts] = await Promise.all([array(`clusters_${model}`), array(`experts_${model}_${layer}`)]);
  const low = all.starts[at], size = all.starts[at + 1] - low, keys = (byCluster ? clusters : experts).subarray(low, low + size);
  const named = new Map(one.clusters.map((c) => [c.id, clusterName(c)])), counts = new Map();
  for (const key of keys) counts.set(key, (counts.get(key) ?? 0) + 1);
  const order = [...counts.keys()].sort((a, b) => counts.get(b) - counts.get(a) || a - b);
  const looks = new Map(order.map((key, rank) => [key, look(byCluster ? key : rank, found.colors)]));
  const tokens = Array.from(keys, (key, t) => h("span", { class: "t", tabindex: t ? -1 : 0, "data-t": t, "data-key": key,
    style: { "--c": looks.get(key).color, "--line": looks.get(key).line } }, all.vocabulary[all.tokens[low + t]]));
  const body = h("div", { class: "text", role: "group", "aria-label": `Text, coloured by ${reading.by} of ${one.name}` }, tokens);
  const said = (t) => `“${visible(all.vocabulary[all.tokens[low + t]])}” cluster ${named.get(clusters[low + t]) ?? clusters[low + t]} · expert ${experts[low + t]} of layer ${layer}`;
  function point(event) {
    const token = event.target.closest(".t");
    if (!token) return;
    const t = Number(token.dataset.t), box = token.getBoundingClientRect(), panes = body.closest(".panes");
    panes.querySelectorAll(".same").forEach((other) => other.classList.remove("same"));
    panes.querySelectorAll(`[data-t="${t}"]`).forEach((other) => other.classList.add("same"));
    tip.replaceChildren(h("strong", {}, one.name), " ", said(t));
    tip.hidden = false;
    tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${box.bottom + 8 + tip.offsetHeight > innerHeight ? box.top - tip.offsetHeight - 8 : box.bottom + 8}px`;
  }
  body.addEventListener("pointerover", point);
  body.addEventListener("focusin", point);
  body.addEventListener("pointerleave", () => { tip.hidden = true; });
  body.addEventListener("focusout", () => { tip.hidden = true; });
  body.addEventListener("keydown", (event) => {
    const t = Number(event.target.dataset.t), next = { ArrowRight: t + 1, ArrowDown: t + 1, ArrowLeft: t - 1, ArrowUp: t - 1, Home: 0, End: size - 1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    if (!tokens[next]) return;
    event.target.tabIndex = -1;
    tokens[next].tabIndex = 0;
    tokens[next].focus();
  });
  const filter = (only) => tokens.forEach((token) => token.classList.toggle("faded", only.size > 0 && !only.has(Number(token.dataset.key))));
  return h("section", { class: "pane" }, h("h3", {}, one.name), legend(`Filter the text of ${one.name}`, order.map((key) => ({ key, ...looks.get(key), glyph: "",
    text: `${byCluster ? named.get(key) ?? key : `expert ${key}`} (${counts.get(key)})` })), filter), body);
}
