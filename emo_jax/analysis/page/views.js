"use strict";
/* Labels, layers, the loss with few experts, the map of documents. */

const chosen = { labels: 0, documents: 0, similarity: "cosine", by: "label" };  // kept from one visit of a view to the next

function labelsView(found, value) {
  const { labels } = found.data, heatmaps = h("div"), similar = h("div"), experts = h("div", { class: "pair" });
  const kinds = [["cosine", "cosine similarity"], ["distance", "distance"], ["pool_overlap", "pools in common"]];
  const have = (name) => found.charts.includes(name) && chart(name, { scrolls: true });
  function show(change) {
    Object.assign(chosen, change);
    fill(similar, have(`${chosen.similarity}-${chosen.labels}`));
    if (!change.similarity) {
      fill(heatmaps, have(`use-${chosen.labels}`),
        h("div", { class: "pair" }, have(`effective-${chosen.labels}`), have(`covered-${chosen.labels}`)));
    }
  }
  const showExperts = () => fill(experts, found.models.map((one) =>
    h("section", {}, h("h3", {}, one.name), expertsTable(one.experts_of_label[select.value]))));
  const select = h("select", { id: "label-experts", onchange: () => {
    showExperts();
    history.replaceState(null, "", `#labels=${encodeURIComponent(labels[select.value])}`);
  } }, labels.map((label, g) => h("option", { value: g, selected: label === value }, labelName(label))));
  show({});
  showExperts();
  return [
    h("h1", {}, "Labels"), lead("Which experts serve which kind of text, and which kinds share them."),
    section("Experts of a label", controls(h("label", {}, "Label ", select)),
      help(`The most used of each layer: their share of the label's choices, and how many times that is their mean share over
        labels.`),
      experts),
    section("Coverage",
      controls(modelChoice("labels-model", found.models, chosen.labels, (labels) => show({ labels }))), heatmaps),
    section("Similarity",
      controls(choice("Show", "labels-kind", kinds, chosen.similarity, (similarity) => show({ similarity }))), similar),
  ];
}

function layersView(found) {
  const names = found.charts.filter((name) => name.startsWith("layers-"));
  return [h("h1", {}, "Layers"),
    lead("Where in the network modules are. Bands are 95\u00a0% intervals by bootstrap over documents."),
    h("div", { class: "pair" }, names.map((name) => chart(name, { level: "h2" })))];
}

function keepView() {
  return [h("h1", {}, "Few experts"),
    lead("What is lost when only the experts that a label needs are kept, as measured by emo-jax eval --keep."),
    chart("keep-curves", { level: "h2" })];
}

async function documentsView(found) {
  const all = await documents(), map = h("div"), part = all.shown.length < found.data.documents;
  function draw(change) {
    Object.assign(chosen, change);
    fill(map, documentMap(found, all, map));
  }
  draw({});
  return [
    h("h1", {}, "Documents"),
    lead(`${count(found.data.documents)} documents by the experts that they use`,
      part && `; the text of ${count(all.shown.length)} is in this page`, ". Click one to read it."),
    controls(modelChoice("map-model", found.models, chosen.documents, (documents) => draw({ documents })),
      choice("Colour by", "map-by", [["label", "label"], ["cluster", "strongest cluster"]], chosen.by, (by) => draw({ by }))),
    map,
    documentList(found, all),
  ];
}

/** The map of the chosen model, and its legend. */
function documentMap(found, all, room) {
  const model = chosen.documents, byLabel = chosen.by === "label";
  const names = byLabel ? found.data.labels.map(labelName) : found.models[model].clusters.map(clusterName);
  const entries = names.map((category, n) => ({ key: category, text: category, ...look(n, found.colors), line: "none" }));
  let view = null, only = [];
  const filter = (wanted) => {
    only = [...wanted];
    view?.signal("only", only).runAsync();
  };
  const change = async (spec) => {
    spec.data = { values: await mapRows(all, model, byLabel, names) };
    spec.encoding.color.legend = spec.encoding.shape.legend = null;
    spec.height = Math.min(520, Math.max(320, room.clientWidth * 0.7));
  };
  const after = (made) => {
    view = made;
    filter(only);
    view.addEventListener("click", (event, item) => {
      if (item?.datum?.document !== undefined) go(`document=${item.datum.document}`);
    });
  };
  const name = `map_${byLabel ? "labels" : "clusters"}-${model}`;
  return [legend("Show only", entries, filter), chart(name, { level: "h2", change, after })];
}

/** As document_rows in figures.py. */
async function mapRows(all, model, byLabel, names) {
  const at = await array(`map_${model}`), of = byLabel ? all.label : await array(`strongest_${model}`), rows = [];
  of.forEach((category, d) => {
    if (category < 0) return;
    rows.push({ document: d, x: at[2 * d], y: at[2 * d + 1], category: names[category], title: all.title[d] });
  });
  return rows;
}

function documentList(found, all) {
  const names = found.data.labels.map(labelName), result = h("div"), told = h("p", { class: "help", role: "status" });
  const search = h("input", { type: "search", id: "find-document", autocomplete: "off", oninput: show });
  const select = h("select", { id: "find-label", onchange: show }, h("option", { value: "" }, "all"),
    names.map((name, g) => h("option", { value: g }, name)));
  const item = (d) => h("li", {}, link(`document=${d}`, all.title[d] || "(empty)"), note(` ${names[all.label[d]]}`));
  function show() {
    const wanted = search.value.trim().toLowerCase(), fits = [];
    all.title.forEach((title, d) => {
      if ((select.value === "" || all.label[d] === Number(select.value)) && title.toLowerCase().includes(wanted)) fits.push(d);
    });
    told.textContent = plural(fits.length, "document");
    fill(result, growing(fits, 20, item, h("ul", { class: "plain" })));
  }
  show();
  const asked = controls(h("label", {}, "Title has ", search), h("label", {}, "Label ", select));
  return section("Find a document", asked, told, result);
}
