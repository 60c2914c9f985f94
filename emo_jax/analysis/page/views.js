"use strict";
/* Labels, layers, the map of documents, and the loss with few experts. */

const shownModel = { labels: 0, documents: 0 }, shownKind = { similarity: "cosine", by: "label" };

function labelsView(found, value) {
  const { labels } = found.data, chosen = Math.max(0, labels.indexOf(value)), heatmaps = h("div", {}), experts = h("div", { class: "pair" });
  const kinds = [["cosine", "cosine similarity"], ["distance", "distance"], ["pool_overlap", "pools in common"]];
  const similar = h("div", {});
  const have = (name) => found.charts.includes(name) && chart(name, { wide: true });
  const showSimilar = () => similar.replaceChildren(...listed([have(`${shownKind.similarity}-${shownModel.labels}`)]));
  function show(model) {
    shownModel.labels = model;
    showSimilar();
    heatmaps.replaceChildren(...listed([have(`use-${model}`), h("div", { class: "pair" }, have(`effective-${model}`), have(`covered-${model}`))]));
  }
  const showExperts = (g) => experts.replaceChildren(...found.models.map((one) => h("section", {}, h("h3", {}, one.name), expertsTable(one.experts_of_label[g]))));
  show(shownModel.labels);
  showExperts(chosen);
  return [
    h("h1", {}, "Labels"),
    h("p", { class: "lead" }, "Which experts serve which kind of text, and which kinds share them."),
    h("section", {}, h("h2", {}, "Experts of a label"),
      h("div", { class: "controls" }, h("label", {}, "Label ", h("select", { id: "label-experts", onchange: (e) => { showExperts(Number(e.target.value)); history.replaceState(null, "", `#labels=${encodeURIComponent(labels[e.target.value])}`); } },
        labels.map((label, g) => h("option", { value: g, selected: g === chosen }, labelName(label)))))),
      h("p", { class: "help" }, "The most used of each layer: their share of the label's choices, and how many times that is their mean share over labels."), experts),
    h("section", {}, h("h2", {}, "Coverage"), h("div", { class: "controls" }, modelChoice("labels-model", found.models, shownModel.labels, show)), heatmaps),
    h("section", {}, h("h2", {}, "Similarity"), h("div", { class: "controls" },
      choice("Show", "labels-kind", kinds, shownKind.similarity, (kind) => { shownKind.similarity = kind; showSimilar(); })), similar),
  ];
}

function layersView(found) {
  return [h("h1", {}, "Layers"), h("p", { class: "lead" }, "Where in the network modules are. Bands are 95 % intervals by bootstrap over documents."),
    h("div", { class: "pair" }, found.charts.filter((name) => name.startsWith("layers-")).map((name) => chart(name, { level: "h2" })))];
}

function keepView() {
  return [h("h1", {}, "Few experts"), h("p", { class: "lead" }, "What is lost when only the experts that a label needs are kept, as measured by emo-jax eval --keep."),
    chart("keep-curves", { level: "h2" })];
}

async function documentsView(found) {
  const all = await documents(), { labels } = found.data, map = h("div", {});
  function draw() {
    const model = shownModel.documents, one = found.models[model], byLabel = shownKind.by === "label";
    const names = byLabel ? labels.map(labelName) : one.clusters.map(clusterName), name = `map_${byLabel ? "labels" : "clusters"}-${model}`;
    let view = null, only = [];
    const filter = (chosen) => { only = [...chosen]; view?.signal("only", only).runAsync(); };
    const entries = names.map((category, n) => ({ key: category, text: category, ...look(n, found.colors), line: "none" }));
    map.replaceChildren(legend("Show only", entries, filter), chart(name, {
      level: "h2",
      change: async (spec) => {
        spec.data = { values: await mapRows(found, all, model, byLabel, names) };
        spec.encoding.color.legend = spec.encoding.shape.legend = null;
        spec.height = Math.min(520, Math.max(320, map.clientWidth * 0.7));
      },
      after: (made) => {
        view = made;
        filter(only);
        view.addEventListener("click", (event, item) => { if (item?.datum?.document !== undefined) go(`document=${item.datum.document}`); });
      },
    }));
  }
  draw();
  return [
    h("h1", {}, "Documents"),
    h("p", { class: "lead" }, `${count(found.data.documents)} documents by the experts that they use${all.shown.length < found.data.documents ? `; the text of ${count(all.shown.length)} is in this page` : ""}. Click one to read it.`),
    h("div", { class: "controls" }, modelChoice("map-model", found.models, shownModel.documents, (i) => { shownModel.documents = i; draw(); }),
      choice("Colour by", "map-by", [["label", "label"], ["cluster", "strongest cluster"]], shownKind.by, (by) => { shownKind.by = by; draw(); })),
    map,
    documentList(found, all),
  ];
}

/** As document_rows in figures.py. */
async function mapRows(found, all, model, byLabel, names) {
  const [at, strongest] = await Promise.all([array(`map_${model}`), array(`strongest_${model}`)]), of = byLabel ? all.label : strongest, rows = [];
  of.forEach((category, d) => { if (category >= 0) rows.push({ document: d, x: at[2 * d], y: at[2 * d + 1], category: names[category], title: all.title[d] }); });
  return rows;
}

function documentList(found, all) {
  const { labels } = found.data, result = h("div", {}), told = h("p", { class: "help", role: "status" });
  const search = h("input", { type: "search", id: "find-document", autocomplete: "off", oninput: show });
  const label = h("select", { id: "find-label", onchange: show }, h("option", { value: "" }, "all"), labels.map((name, g) => h("option", { value: g }, labelName(name))));
  function show() {
    const wanted = search.value.trim().toLowerCase(), fits = [];
    all.title.forEach((title, d) => { if ((label.value === "" || all.label[d] === Number(label.value)) && title.toLowerCase().includes(wanted)) fits.push(d); });
    told.textContent = plural(fits.length, "document");
    result.replaceChildren(...growing(fits, 20, (d) => h("li", {}, h("a", { href: `#document=${d}` }, all.title[d] || "(empty)"), h("span", { class: "help" }, ` ${labelName(labels[all.label[d]])}`)), h("ul", { class: "plain" })));
  }
  show();
  return h("section", {}, h("h2", {}, "Find a document"), h("div", { class: "controls" }, h("label", {}, "Beginning ", search), h("label", {}, "Label ", label)), told, result);
}
