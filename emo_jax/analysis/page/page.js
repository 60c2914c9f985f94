"use strict";
/* What all views share: elements, unpacking, numbers, the hash that names a view, colours. Texts become text nodes, never
   markup. */

/** An element; children are elements, strings (as text), arrays of them, or nothing. */
function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, v] of Object.entries(value)) element.style.setProperty(key, v);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...listed(children));
  return element;
}

/** Nested lists with nothings in them, as one list. */
const listed = (children) => children.flat(Infinity).filter((child) => child != null && child !== false && child !== "");

const $ = (id) => document.getElementById(id);
const fill = (element, ...children) => element.replaceChildren(...listed(children));
const lead = (...children) => h("p", { class: "lead" }, children);
const help = (...children) => h("p", { class: "help" }, children);
const note = (...children) => h("span", { class: "help" }, children);
const controls = (...children) => h("div", { class: "controls" }, children);
const section = (title, ...children) => h("section", {}, h("h2", {}, title), children);
const link = (hash, ...children) => h("a", { href: `#${hash}` }, children);
/** What may be wider than the page; it moves by the arrow keys. */
const wide = (name, child) => h("div", { class: "wide", tabindex: 0, role: "group", "aria-label": name }, child);

// ---- what is packed in the page ---------------------------------------------------------------------------------------

const ARRAYS = { uint8: Uint8Array, uint16: Uint16Array, int16: Int16Array, int32: Int32Array, float32: Float32Array };
const unpacked = new Map();

function unpack(name, read) {
  if (!unpacked.has(name)) {
    const packed = Uint8Array.from(atob($(name).textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    unpacked.set(name, read(new Response(stream)));
  }
  return unpacked.get(name);
}

const text = (name) => unpack(name, (response) => response.text());
const json = (name) => unpack(name, (response) => response.json());
const array = (name) => unpack(`array-${name}`, async (response) =>
  new ARRAYS[$(`array-${name}`).dataset.type](await response.arrayBuffer()));

// ---- numbers ----------------------------------------------------------------------------------------------------------

/** Three digits, as in words.py. */
function number(value, signed = false) {
  if (value == null) return "–";
  const size = Math.abs(value), digits = size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3;
  const exactly = { minimumFractionDigits: digits, maximumFractionDigits: digits };
  const shown = Number(size.toFixed(digits)).toLocaleString("en", exactly);
  return (Number(shown) === 0 ? "" : value < 0 ? "−" : signed ? "+" : "") + shown;
}

const count = (value) => value.toLocaleString("en");
const percent = (share) => (share >= 0.1 || share === 0 ? (100 * share).toFixed(0) : (100 * share).toFixed(1)) + "\u00a0%";
const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;
const labelName = (label) => label || "(no label)";
const clusterName = (cluster) => `${cluster.id}: ${cluster.name}`;

// ---- the hash: #VIEW, #clusters=a, #cluster=a:3, #labels=NAME, #document=12 -----------------------------------------------

/** {view, value}. */
function place() {
  const [view, value = ""] = location.hash.slice(1).split(/=(.*)/s);
  let decoded = value;
  try { decoded = decodeURIComponent(value); } catch { /* as it is */ }
  return { view, value: decoded };
}

const go = (hash) => { location.hash = hash; };
const letter = (model) => "ab"[model];

/** Radio buttons that look like one switch. options: [[value, text]]. */
function choice(legend, name, options, chosen, change) {
  return h("fieldset", { class: "choice" }, h("legend", {}, legend), options.map(([value, shown]) => h("label", {},
    h("input", { type: "radio", name, value, checked: String(value) === String(chosen), onchange: () => change(value) }),
    h("span", {}, shown))));
}

/** For a choice of the model, where there are two. */
function modelChoice(name, models, chosen, change) {
  return models.length > 1 && choice("Model", name, models.map((one, i) => [i, one.name]), chosen, change);
}

/** A list that shows the first few, and more when asked. */
function growing(items, size, make, list) {
  const more = h("button", { type: "button", class: "more", onclick: () => grow(true) });
  let next = 0;
  function grow(focus) {
    const made = items.slice(next, next + size).map(make);
    list.append(...made);
    next += made.length;
    more.hidden = next >= items.length;
    more.textContent = `Show more (${count(items.length - next)} left)`;
    if (focus) made[0]?.querySelector("a, button")?.focus();
  }
  grow(false);
  return [list, more];
}

// ---- colours ----------------------------------------------------------------------------------------------------------

const GLYPHS = ["●", "▲", "■", "◆", "✚", "▼"];  // as SHAPES in figures.py
const LINES = ["solid", "dashed", "dotted", "double"];

/** How the n-th category is drawn: a colour, and beyond eight another shape or line too. */
function look(n, colors) {
  const round = Math.floor(n / colors.length);
  return { color: colors[n % colors.length], glyph: GLYPHS[round % GLYPHS.length], line: LINES[round % LINES.length] };
}

/** Buttons that name what colours mean, and filter by it. entries: [{key, text, color, glyph, line}]; change gets the Set of
    those chosen. */
function legend(title, entries, change) {
  const only = new Set();
  return h("div", { class: "legend", role: "group", "aria-label": title }, entries.map((entry) => {
    const button = h("button", { type: "button", "aria-pressed": "false", onclick: () => {
      if (!only.delete(entry.key)) only.add(entry.key);
      button.setAttribute("aria-pressed", only.has(entry.key));
      change(only);
    } }, h("span", { class: "swatch", "aria-hidden": "true", style: { "--c": entry.color, "--line": entry.line ?? "solid" } },
      entry.glyph), entry.text);
    return button;
  }));
}

/** Marked text, without the space before it. */
function marked(token) {
  const space = token.length - token.trimStart().length;
  return space < token.length ? [token.slice(0, space), h("mark", {}, token.slice(space))] : [h("mark", {}, token)];
}

/** Bars. rows: [[name, share of the longest bar, text, class]]; by default a share's text is itself. */
function bars(rows) {
  const row = ([name, share, amount = percent(share), kind = ""]) => h("div", {}, h("dt", {}, name), h("dd", {},
    h("span", { class: `bar ${kind}`, style: { "--share": share } }), h("span", { class: "amount" }, amount)));
  return h("dl", { class: "bars" }, rows.map(row));
}
