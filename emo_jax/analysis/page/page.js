"use strict";
// The page of an analysis. State is in the address: #view=clusters&model=0&cluster=3, #document=12.

const main = document.getElementById("main"), reader = document.getElementById("reader");
let A, charts, titles, vocabulary, X, found; // analysis, chart specifications, titles, token texts, arrays, {document: place among the shown}
const VIEWS = { overview: "Overview", clusters: "Clusters", labels: "Labels", layers: "Layers", map: "Map", documents: "Documents" };
const OKABE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8a6d00", "#666666"];

// ---- small things ----

function h(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) made.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(2)) if (child != null && child !== false) made.append(child);
  return made;
}
const percent = (x, digits = 0) => `${(100 * x).toFixed(digits)} %`;
const number = x => x == null ? "" : Math.abs(x) >= 100 ? Math.round(x).toLocaleString("en") : Math.abs(x) >= 10 ? x.toFixed(1) : x.toFixed(Math.abs(x) < 0.0995 && x ? 4 : 3);
const whole = x => x.toLocaleString("en");
const label = g => A.data.labels[g] || "(no label)";
const named = name => name || "(no label)";
const interval = m => m && m.low != null ? `${number(m.low)} to ${number(m.high)}` : "";
const tint = i => `hsl(${(i * 137.508) % 360} 75% ${72 + 8 * (i % 3)}%)`;
const address = parts => "#" + new URLSearchParams(parts).toString();
const state = () => Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
const model = () => A.models[chosen()];
const chosen = () => Math.min(Number(state().model || 0), A.models.length - 1);
const go = parts => { location.hash = address({ ...(chosen() ? { model: chosen() } : {}), ...parts }); };
const table = (head, rows, attributes) => h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": head.filter(x => typeof x === "string").join(", ") || "table" },
  h("table", attributes, h("thead", {}, h("tr", {}, head.map(x => h("th", { scope: "col" }, x)))),
    h("tbody", {}, rows.map(row => h("tr", {}, row.map((x, i) => h(i ? "td" : "th", i ? {} : { scope: "row" }, x)))))));
const bars = (head, rows, most, text) => {
  const made = table(head, rows.map(([name, value]) => [name, h("div", { class: "bar", style: `--part: ${100 * Math.max(0, value) / most}%` }, text(value))]));
  made.firstChild.classList.add("bars");
  return made;
};

// ---- charts ----

let libraryLoaded = false;
function loadLibrary() {
  if (libraryLoaded) return;
  const script = document.createElement("script");
  script.type = "module";
  script.textContent = document.getElementById("library").textContent + ";window.dispatchEvent(new Event('library'))";
  libraryLoaded = new Promise(done => addEventListener("library", done, { once: true }));
  document.head.append(script);
}
const dark = () => document.documentElement.dataset.theme === "dark";
function theme() {
  const ink = dark() ? "#c9ced6" : "#444b55", line = dark() ? "#30363e" : "#e6e6e2";
  return { background: "transparent", font: "system-ui, sans-serif", view: { stroke: null }, title: { color: dark() ? "#e8eaed" : "#1d2127", fontSize: 14, fontWeight: 600, offset: 10 },
    axis: { gridColor: line, domainColor: line, tickColor: line, labelColor: ink, titleColor: ink, labelFontSize: 11, titleFontSize: 11, titleFontWeight: 400, labelLimit: 130 },
    legend: { labelColor: ink, titleColor: ink, labelFontSize: 11 } };
}
const waiting = new IntersectionObserver(entries => entries.forEach(entry => {
  if (entry.isIntersecting) { waiting.unobserve(entry.target); entry.target.draw(); }
}), { rootMargin: "300px" });
function chart(name, onclick) {
  const spec = charts[name], place = h("div", { class: "chart", role: "img", "aria-label": spec.description, id: `chart-${name}` });
  place.draw = async () => {
    loadLibrary();
    await libraryLoaded;
    if (!place.isConnected) return;
    const many = spec.data.values.length > 1500;
    const made = await vegaEmbed(place, { ...spec, config: theme() }, { actions: false, renderer: many ? "canvas" : "svg" });
    place.dataset.drawn = "yes";
    place.querySelectorAll("input").forEach(input => input.setAttribute("aria-label", `${spec.description}: layer`));
    if (onclick) made.view.addEventListener("click", (event, item) => item && item.datum && onclick(item.datum));
  };
  waiting.observe(place);
  const rows = h("details", { ontoggle: event => {
    if (!event.target.open || event.target.childElementCount > 1) return;
    const names = Object.keys(spec.data.values[0]);
    event.target.append(table(names, spec.data.values.slice(0, 2000).map(v => names.map(n => String(v[n])))));
    if (spec.data.values.length > 2000) event.target.append(h("p", { class: "soft" }, "The first 2,000 rows; all are in the tables beside this page."));
  } }, h("summary", {}, "Data of this chart"));
  return h("figure", { class: "card", style: "margin: 0" }, place, rows);
}

// ---- the views ----

const view = {
  overview() {
    const [a, b] = A.models, m = a.measures;
    return [
      h("h1", {}, b ? `${a.name} beside ${b.name}` : a.name),
      h("p", { class: "lead" }, summary()),
      h("p", {}, `A mixture-of-experts model sends every token to a few of its experts. In an EMO model the tokens of one document share a small pool of experts, so that experts group into modules by themselves: sets of experts that serve a topic. `
        + `This page shows what became of them in ${whole(A.data.tokens)} tokens of ${whole(A.data.documents)} documents${A.data.labels.length > 1 ? ` with ${A.data.labels.length} labels` : ""} that were read one by one.`),
      h("div", { class: "figures" }, [
        ["label_information", "nats that a token's expert tells of the label of its document"],
        ["effective_experts", `of ${a.experts} experts in a layer serve a document, on average`],
        ["top_quarter", "of the routing of a document goes to its favourite quarter of the experts"],
        ["gap_quarter", "nats/token lost if each document may use only a quarter of the experts"],
      ].filter(([key]) => m[key]).map(([key, text]) => h("div", { class: "card" }, h("b", {}, key === "top_quarter" ? percent(m[key].value) : number(m[key].value)),
        h("p", {}, text), b && b.measures[key] && h("p", { class: "soft" }, `${b.name}: ${key === "top_quarter" ? percent(b.measures[key].value) : number(b.measures[key].value)}`)))),
      h("h2", {}, "Every measure"),
      h("p", { class: "soft" }, "Below each value its 95 % interval, from resampling whole documents. “Random routers” is the same network with routers as they are before training: what a figure is when nothing was learned about routing."),
      measureTable(),
      charts["keep-curve"] && [h("h2", {}, "With few experts"), chart("keep-curve")],
      h("h2", {}, "Questions, and where they are answered"),
      h("ul", { class: "questions" }, questions().map(q => h("li", { class: "card" }, h("h3", {}, q.question), h("p", {}, q.answer), h("a", { href: q.link }, q.where)))),
    ];
  },

  clusters() {
    const one = model(), wanted = state().cluster;
    if (wanted != null && one.clusters[wanted]) return cluster(one, one.clusters[wanted]);
    const total = one.clusters.reduce((sum, c) => sum + c.tokens, 0);
    return [
      h("h1", {}, `${one.clusters.length} clusters of tokens`),
      h("p", {}, `Tokens that the routers of ${one.name} treat alike, in all layers together. The name of a cluster is made of the words that it has more often than other text; the bar shows the labels of its documents.`),
      h("div", { class: "grid", id: "cluster-cards" }, one.clusters.map(c => h("button", { class: "card cluster", type: "button", onclick: () => go({ view: "clusters", cluster: c.id }) },
        h("b", {}, h("span", { class: "dot", style: `background: ${tint(c.id)}` }), `${c.id}  ${c.name}`),
        h("small", {}, `${whole(c.tokens)} tokens (${percent(c.tokens / total, 1)}) in ${whole(c.documents)} documents`),
        stack(c.labels),
        h("small", {}, Object.entries(c.labels).slice(0, 2).map(([l, share]) => `${named(l)} ${percent(share)}`).join(", "))))),
      one.subsets.length ? [h("h2", {}, "Subsets"), one.subsets.map(s => h("div", { class: "card" }, h("h3", {}, s.name), moduleParts(one, s)))] : null,
      A.alignment && [h("h2", {}, "The same clusters in both models"), h("p", { class: "soft" }, "One-to-one pairs with the largest share of tokens in common (Jaccard)."),
        table([A.models[0].name, A.models[1].name, "tokens in common"], A.alignment.map(p => [
          h("a", { href: address({ view: "clusters", model: 0, cluster: p.a }) }, `${p.a}  ${A.models[0].clusters[p.a].name}`),
          h("a", { href: address({ view: "clusters", model: 1, cluster: p.b }) }, `${p.b}  ${A.models[1].clusters[p.b].name}`), percent(p.tokens)]))],
    ];
  },

  labels() {
    const i = chosen(), one = model();
    return [
      h("h1", {}, "Which experts serve which label"),
      h("p", {}, "Bright squares on the diagonal of the first chart are modules: experts that one label uses and others do not. The slider chooses the layer."),
      h("div", { class: "grid wide" }, chart(`use-${i}`), chart(`effective-${i}`), chart(`cosine-${i}`), chart(`pool_overlap-${i}`)),
      h("h2", {}, "The strongest experts of each label"),
      h("div", { class: "tools" }, h("label", {}, "Layer ", h("select", { id: "layer", onchange: event => go({ view: "labels", layer: event.target.value }) },
        Array.from({ length: one.layers }, (_, l) => h("option", { value: l, selected: l === layer(one) }, l))))),
      table(["label", "experts (share of its choices)", "effective", "most alike"], A.data.labels.map((name, g) => {
        const use = one.coverage.use[g][layer(one)], top = use.map((x, e) => [x, e]).sort((p, q) => q[0] - p[0]).slice(0, 6);
        return [named(name), top.map(([x, e]) => `${e} (${percent(x)})`).join(", "), number(one.coverage.effective[g][layer(one)]), alike(one, g)];
      })),
    ];
  },

  layers() {
    return [
      h("h1", {}, "Layer by layer"),
      h("p", {}, "Where in the network experts follow topics, and where they follow words. Bands are 95 % intervals over documents."),
      h("div", { class: "grid wide" }, A.measures.filter(row => charts[`layers-${row.key}`]).map(row => h("section", {}, chart(`layers-${row.key}`), h("p", { class: "soft" }, row.help)))),
    ];
  },

  map() {
    return [
      h("h1", {}, "A map of the documents"),
      h("p", {}, `Each mark is a document; documents whose tokens ${model().name} sends to the same experts lie together (t-SNE of the mean router probabilities). Click a label in the legend to see it alone, and a document to read it. Everything here is also in the list of documents.`),
      chart(`map-${chosen()}`, datum => datum.document != null && open(datum.document)),
    ];
  },

  documents() {
    const wanted = state().label ?? "", words = (state().search || "").toLowerCase(), cards = [];
    for (let d = 0; d < titles.length && cards.length < 200; d++) {
      if (!found.has(d) || wanted !== "" && X.label[d] !== Number(wanted) || words && !titles[d].toLowerCase().includes(words)) continue;
      cards.push(documentLine(d));
    }
    return [
      h("h1", {}, "Documents"),
      h("p", {}, `${whole(X.shown.length)} of ${whole(A.data.documents)} documents can be read here, every token coloured by what the routers did with it.`),
      h("div", { class: "tools" },
        h("label", {}, "Label ", h("select", { onchange: event => go({ view: "documents", label: event.target.value }) }, h("option", { value: "" }, "all"),
          A.data.labels.map((name, g) => h("option", { value: g, selected: wanted !== "" && g === Number(wanted) }, named(name))))),
        h("label", {}, "Beginning with ", h("input", { type: "search", value: state().search || "", onchange: event => go({ view: "documents", label: wanted, search: event.target.value }) }))),
      h("ul", { class: "documents" }, cards.map(c => h("li", {}, c))),
      cards.length === 200 && h("p", { class: "soft" }, "The first 200; choose a label or words to see others."),
      !cards.length && h("p", {}, "No document begins like that."),
    ];
  },
};

function measureTable() {
  const columns = [...A.models, ...(A.random_router ? [{ name: "Random routers", measures: A.random_router.measures }] : [])];
  const cell = m => m ? [number(m.value), h("small", { class: "soft" }, interval(m))] : "";
  return table(["", ...A.models.map(m => m.name), ...(A.difference ? ["difference"] : []), ...(A.random_router ? ["random routers"] : [])],
    A.measures.filter(row => columns.some(m => m.measures[row.key])).map(row => {
      const d = A.difference && A.difference[row.key], sure = d && d.low != null && d.low * d.high > 0;
      const cells = columns.map(m => cell(m.measures[row.key]));
      if (A.difference) cells.splice(2, 0, d ? h("span", { class: sure && row.better && (d.value > 0) === (row.better === "higher") ? "better" : "" }, cell(d)) : "");
      return [[`${row.title}${row.unit ? `, ${row.unit}` : ""}`, h("small", { class: "soft" }, row.help)], ...cells];
    }), { id: "measures" });
}

function stack(labels) {
  return h("span", { class: "stack", "aria-hidden": "true" }, Object.entries(labels).slice(0, 8).map(([name, share]) =>
    h("span", { style: `width: ${100 * share}%; background: ${OKABE[A.data.labels.indexOf(name) % OKABE.length]}`, title: `${named(name)} ${percent(share)}` })));
}

function cluster(one, c) {
  const i = chosen(), size = {};
  X.shown.forEach((d, s) => {
    let count = 0;
    for (let t = X.starts[s]; t < X.starts[s + 1]; t++) count += X[`clusters_${i}`][t] === c.id;
    if (count) size[d] = count;
  });
  const best = Object.entries(size).sort((p, q) => q[1] - p[1]).slice(0, 12);
  return [
    h("p", {}, h("a", { href: address({ view: "clusters", model: i }) }, "← All clusters")),
    h("h1", { id: "cluster-title" }, h("span", { class: "dot", style: `background: ${tint(c.id)}` }), `${c.id}  ${c.name}`),
    h("p", { class: "lead" }, `${whole(c.tokens)} tokens in ${whole(c.documents)} documents; ${percent(Object.values(c.labels)[0])} of them ${named(Object.keys(c.labels)[0])}.`),
    moduleParts(one, c),
    h("h2", {}, "Documents with most of its tokens"),
    h("ul", { class: "documents" }, best.map(([d, count]) => h("li", {}, documentLine(Number(d), `${count} tokens`, { cluster: c.id })))),
    c.overlap && [h("h2", {}, "Modules that use the same experts"), table(["module", "experts in common"], c.overlap.map((x, o) => [x, o]).filter(([, o]) => o !== c.id)
      .sort((p, q) => q[0] - p[0]).slice(0, 8).map(([x, o]) => [h("a", { href: address({ view: "clusters", model: i, cluster: o }) }, `${o}  ${one.clusters[o].name}`), percent(x)]))],
  ];
}

function moduleParts(one, c) {
  const loss = c.removal && Object.entries(c.removal.loss).sort((p, q) => q[1] - p[1]), most = loss && Math.max(...loss.map(p => p[1]), 1e-6);
  return [
    h("div", { class: "grid wide" },
      h("section", {}, h("h2", {}, "Labels of its tokens"), bars(["label", "share"], Object.entries(c.labels).slice(0, 10).map(([l, x]) => [named(l), x]), 1, x => percent(x, 1))),
      h("section", {}, h("h2", {}, "What removing its experts costs"), loss ? [h("p", { class: "soft" }, `Rise of the loss, nats/token, without the ${c.removal.experts[0].length} experts a layer that it prefers.`),
        bars(["label", "rise"], loss.map(([l, x]) => [l === "all" ? "all text" : named(l), x]), most, x => (x >= 0 ? "+" : "−") + number(Math.abs(x)))] : h("p", {}, "Not measured."))),
    h("h2", {}, "Words that it has more often than other text"),
    c.words.length ? h("ul", { class: "words" }, c.words.map(w => h("li", { title: `${w.count} tokens, ${w.lift.toFixed(1)} times as often` }, w.text, " ", h("small", {}, `×${w.lift.toFixed(1)}`)))) : h("p", {}, "None stands out."),
    h("h2", {}, "Where its tokens are"),
    h("ul", { class: "contexts" }, c.contexts.map(x => h("li", {}, h("button", { type: "button", onclick: () => open(x.document, { cluster: c.id }) },
      h("span", { class: "tag" }, label(X.label[x.document])), x.before, h("mark", {}, x.token), x.after)))),
    h("h2", {}, "Its experts"),
    table(["layer", "strongest experts: share of its routing, and times that of all text"], c.experts.map((row, l) => [String(l), row.map(([e, share, lift]) => `${e} (${percent(share)}, ×${lift.toFixed(1)})`).join("   ")])),
  ];
}

function documentLine(d, more, parts) {
  return h("button", { type: "button", "data-document": d, onclick: () => open(d, parts) }, h("span", { class: "tag" }, label(X.label[d])), titles[d] || "(blank)", more && h("span", { class: "tag" }, `  ${more}`));
}

// ---- the reader ----

const open = (d, parts) => { location.hash = address({ ...state(), ...parts, document: d }); };
function showDocument(d) {
  const s = found.get(d), by = state().by || "cluster", at = layer(model()), only = state().only;
  const close = () => { const rest = state(); delete rest.document; delete rest.by; delete rest.only; location.hash = address(rest); };
  const change = parts => { const all = { ...state(), ...parts }; if (parts.only === null) delete all.only; location.hash = address(all); };
  reader.replaceChildren(h("div", {},
    h("div", { class: "head" }, h("h2", { id: "reader-title", style: "margin: 0" }, titles[d] || "(blank)"), h("button", { class: "plain", type: "button", onclick: close, autofocus: true }, "Close")),
    h("p", { class: "soft" }, `Document ${d}, ${label(X.label[d])}`),
    s == null ? h("p", {}, "The text of this document is not in this page: the page holds as many as fit.") : [
      h("div", { class: "tools" },
        h("label", {}, "Colour by ", h("select", { id: "by", onchange: e => change({ by: e.target.value, only: null }) }, h("option", { value: "cluster", selected: by === "cluster" }, "cluster"), h("option", { value: "expert", selected: by === "expert" }, "strongest expert"))),
        by === "expert" && h("label", {}, "of layer ", h("select", { onchange: e => change({ layer: e.target.value, only: null }) }, Array.from({ length: model().layers }, (_, l) => h("option", { value: l, selected: l === at }, l)))),
        h("button", { type: "button", onclick: () => go({ view: "documents" }) }, "Other documents")),
      h("div", { class: "columns" }, A.models.map((one, i) => readerColumn(one, i, s, by, at, only, change)))]));
  if (!reader.open) reader.showModal();
  reader.onclose = () => state().document != null && close();
}
function readerColumn(one, i, s, by, at, only, change) {
  const text = h("div", { class: "text" }), counts = new Map(), [from, to] = [X.starts[s], X.starts[s + 1]];
  const kind = t => by === "cluster" ? X[`clusters_${i}`][t] : X[`experts_${i}`][t * one.layers + Math.min(at, one.layers - 1)];
  const say = k => by === "cluster" ? `cluster ${k}: ${one.clusters[k].name}` : `expert ${k}`;
  const mark = state().cluster != null && i === chosen() && by === "cluster" ? `${i}:${state().cluster}` : null, shown = only ?? mark;
  for (let t = from, before = -1; t < to; t++) {
    const k = kind(t), off = shown != null && shown !== `${i}:${k}` && shown.startsWith(`${i}:`);
    counts.set(k, (counts.get(k) || 0) + 1);
    if (k !== before && !off) text.append(h("sup", { "aria-hidden": "true" }, k));
    text.append(h("span", { class: off ? "off" : "", style: `background: ${tint(k)}`, title: say(k) }, vocabulary[X.tokens[t]]));
    before = k;
  }
  const most = [...counts].sort((p, q) => q[1] - p[1]);
  return h("section", { "aria-label": one.name }, h("h3", {}, one.name),
    h("p", { class: "soft" }, `${most.length} ${by === "cluster" ? "clusters" : "strongest experts"} in ${to - from} tokens`),
    h("ul", { class: "legend" }, most.slice(0, 12).map(([k, n]) => h("li", {}, h("button", { type: "button", "aria-pressed": String(shown === `${i}:${k}`),
      onclick: () => change({ only: shown === `${i}:${k}` ? `${i}:` : `${i}:${k}` }) }, h("span", { class: "dot", style: `background: ${tint(k)}` }), `${k} ${by === "cluster" ? one.clusters[k].name : ""} (${n})`)))),
    text);
}

// ---- answers ----

const layer = one => Math.min(Number(state().layer ?? Math.floor(one.layers / 2)), one.layers - 1);
function alike(one, g) {
  const row = one.similarity.cosine[layer(one)][g], best = row.map((x, o) => [x, o]).filter(([, o]) => o !== g).sort((p, q) => q[0] - p[0])[0];
  return best ? `${label(best[1])} (${best[0].toFixed(2)})` : "";
}
function summary() {
  const [a, b] = A.models, d = A.difference && A.difference.label_information, m = a.measures.label_information;
  if (!m) return "";
  const random = A.random_router && A.random_router.measures.label_information;
  const alone = random ? `The experts of ${a.name} tell ${number(m.value)} nats of the label of a document; routers drawn at random tell ${number(random.value)}.` : `The experts of ${a.name} tell ${number(m.value)} nats of the label of a document.`;
  if (!b) return alone;
  const verdict = d.low > 0 ? `more than those of ${b.name}` : d.high < 0 ? `less than those of ${b.name}` : `neither clearly more nor clearly less than those of ${b.name}`;
  return `${alone} That is ${verdict} (${number(b.measures.label_information.value)}; difference ${number(d.value)}${d.low == null ? "" : `, with 95 % confidence ${interval(d)}`}).`;
}
function questions() {
  const one = A.models[0], [, b] = A.models, m = one.measures, l = Math.floor(one.layers / 2), G = A.data.labels.length, made = [];
  const ask = (question, answer, where, parts) => made.push({ question, answer, where, link: address(parts) });
  if (G > 1) {
    const use = one.coverage.use.map(rows => rows[l]), g = use.map((row, i) => [Math.max(...row), i]).sort((p, q) => q[0] - p[0])[0][1];
    const top = use[g].map((x, e) => [x, e]).sort((p, q) => q[0] - p[0]).slice(0, 3);
    ask("Which experts serve a label?", `For ${label(g)} in layer ${l}: ${top.map(([x, e]) => `expert ${e} (${percent(x)} of its choices)`).join(", ")}.`, "Labels: the strongest experts of each", { view: "labels" });
    const pairs = []; one.similarity.cosine[l].forEach((row, i) => row.forEach((x, j) => i < j && pairs.push([x, i, j])));
    pairs.sort((p, q) => q[0] - p[0]); const least = pairs[pairs.length - 1];
    ask("Are two labels served by the same experts?", `${label(pairs[0][1])} and ${label(pairs[0][2])} most (cosine ${pairs[0][0].toFixed(2)} in layer ${l}); ${label(least[1])} and ${label(least[2])} least (${least[0].toFixed(2)}).`, "Labels: cosine similarity", { view: "labels" });
  }
  const removals = one.clusters.filter(c => c.removal).map(c => { const [l, x] = Object.entries(c.removal.loss).filter(([l]) => l !== "all").sort((p, q) => q[1] - p[1])[0] || ["", 0]; return [x, l, c]; }).sort((p, q) => q[0] - p[0]);
  if (removals.length) ask("What breaks if I drop a cluster?", `Most costly: without the experts of “${removals[0][2].name}” the loss of ${named(removals[0][1])} rises by ${number(removals[0][0])} nats/token, that of all text by ${number(removals[0][2].removal.loss.all)}.`, "Clusters: this cluster", { view: "clusters", cluster: removals[0][2].id });
  if (b) ask(`Does ${one.name} beat ${b.name} here, and how sure is that?`, ["label_information", "gap_eighth", "effective_experts"].filter(k => A.difference[k]).map(k => { const row = A.measures.find(r => r.key === k), d = A.difference[k];
    return `${row.title}: ${d.low * d.high > 0 ? ((d.value > 0) === (row.better === "higher") ? "yes" : "no") : "not sure"} (${number(d.value)}; ${interval(d)})`; }).join(". ") + ".", "Overview: every measure", { view: "overview" });
  if (m.effective_experts) ask("How few experts does a document use?", `As many as ${number(m.effective_experts.value)} of ${one.experts} equally used ones; its favourite eighth takes ${percent(m.top_eighth.value)} of the routing.`, "Layers: effective experts", { view: "layers" });
  if (m.cluster_label) ask("Topics or words?", `A token's cluster tells ${number(m.cluster_label.value)} nats of the document's label and ${number(m.cluster_token.value)} nats of the token itself${b && b.measures.cluster_label ? `; in ${b.name} ${number(b.measures.cluster_label.value)} and ${number(b.measures.cluster_token.value)}` : ""}.`, "Clusters: their words", { view: "clusters" });
  if (one.by_layer.label_information) { const v = one.by_layer.label_information.value, best = v.indexOf(Math.max(...v)); ask("Which layers are modular?", `Layer ${best} most (${number(v[best])} nats of the label), layer ${v.indexOf(Math.min(...v))} least (${number(Math.min(...v))}).`, "Layers", { view: "layers" }); }
  if (m.segment_cache) ask("Would an expert cache work?", `A cache of twice the experts that a token uses answers ${percent(m.segment_cache.value)} of the choices in 16 tokens${b ? ` (${b.name}: ${percent(b.measures.segment_cache.value)})` : ""}.`, "Layers: segment cache", { view: "layers" });
  if (one.keep_curve) { const rows = [...one.keep_curve.subsets].sort((p, q) => p.share - q.share); ask("How much is lost with few experts?", `With ${percent(rows[0].share, 1)} of the experts the loss rises by ${number(rows[0].difference)} nats/token.`, "Overview: with few experts", { view: "overview" }); }
  else if (m.gap_eighth) ask("How much is lost with few experts?", `If each document uses only its own eighth of the experts, ${number(m.gap_eighth.value)} nats/token.`, "Overview: every measure", { view: "overview" });
  ask("What is a cluster?", `The largest is “${one.clusters[0].name}”: ${percent(Object.values(one.clusters[0].labels)[0])} ${named(Object.keys(one.clusters[0].labels)[0])}.`, "Clusters: the largest", { view: "clusters", cluster: 0 });
  ask("Which documents are treated like this one?", "Those that lie beside it on the map.", "Map", { view: "map" });
  return made;
}

// ---- moving about ----

let drawn = "";
function show() {
  const now = state(), name = VIEWS[now.view] ? now.view : "overview";
  const rest = { ...now }; delete rest.document; delete rest.by; delete rest.only; if (now.document != null) delete rest.layer;
  const key = JSON.stringify({ ...rest, view: name });
  document.querySelectorAll("#tabs button").forEach(tab => { const on = tab.dataset.view === name; tab.setAttribute("aria-selected", String(on)); tab.tabIndex = on ? 0 : -1; });
  document.getElementById("model").value = chosen();
  if (key !== drawn) {
    const first = !drawn;
    drawn = key;
    main.replaceChildren(...[view[name]()].flat(9).filter(Boolean));
    main.setAttribute("aria-labelledby", `tab-${name}`);
    if (!first) { scrollTo(0, 0); document.title = `${main.querySelector("h1").textContent} - What the experts became`; }
  }
  if (now.document != null && titles[now.document] != null) showDocument(Number(now.document));
  else if (reader.open) reader.close();
}
function setTheme(name) {
  document.documentElement.dataset.theme = name;
  document.getElementById("theme").textContent = name === "dark" ? "Light" : "Dark";
  if (A) { drawn = ""; show(); }
}
async function unpack(id) {
  const element = document.getElementById(id), raw = Uint8Array.from(atob(element.textContent), c => c.charCodeAt(0));
  element.remove();
  return new Response(new Blob([raw]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}
async function start() {
  setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  document.getElementById("theme").onclick = () => setTheme(dark() ? "light" : "dark");
  const [content, arrays] = await Promise.all([unpack("content"), unpack("arrays")]);
  ({ analysis: A, charts, titles, vocabulary } = JSON.parse(new TextDecoder().decode(content)));
  const length = new DataView(arrays).getUint32(0, true), head = JSON.parse(new TextDecoder().decode(new Uint8Array(arrays, 4, length)));
  const kinds = { uint8: Uint8Array, uint16: Uint16Array, int32: Int32Array };
  X = Object.fromEntries(Object.entries(head).map(([name, [kind, shape, at]]) => [name, new kinds[kind](arrays, 4 + length + at, shape.reduce((p, q) => p * q, 1))]));
  found = new Map(Array.from(X.shown, (d, s) => [d, s]));
  const tabs = document.getElementById("tabs"), names = Object.keys(VIEWS);
  tabs.append(...names.map(name => h("button", { type: "button", role: "tab", id: `tab-${name}`, "data-view": name, "aria-controls": "main", onclick: () => go({ view: name }) }, VIEWS[name])));
  tabs.addEventListener("keydown", event => {
    const at = names.indexOf(document.activeElement.dataset.view), to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: names.length - 1 }[event.key];
    if (to == null) return;
    event.preventDefault();
    const tab = tabs.children[(to + names.length) % names.length];
    tab.focus(); tab.click();
  });
  const choice = document.getElementById("model");
  choice.append(...A.models.map((one, i) => h("option", { value: i }, one.name)));
  choice.onchange = () => { const rest = state(); delete rest.cluster; location.hash = address({ ...rest, model: choice.value }); };
  document.getElementById("model-switch").hidden = A.models.length < 2;
  addEventListener("hashchange", show);
  show();
  document.documentElement.dataset.ready = "yes";
}
start().catch(error => { main.replaceChildren(h("p", { role: "alert" }, `This page cannot be shown: ${error.message}. It needs a browser of 2023 or later.`)); throw error; });
