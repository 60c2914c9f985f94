"use strict";
/* Tabs, the view that the hash names, the theme. */

const VIEWS = [
  ["overview", "Overview", overviewView], ["measures", "Measures", measuresView], ["clusters", "Clusters", clustersView],
  ["labels", "Labels", labelsView], ["layers", "Layers", layersView], ["documents", "Documents", documentsView],
  ["keep", "Few experts", keepView],
];

async function start() {
  const found = await json("contents"), main = $("main"), dialog = $("reader");
  const views = VIEWS.filter(([name]) => name !== "keep" || found.charts.includes("keep-curves"));
  const tabs = views.map(([name, title]) => h("button", { type: "button", role: "tab", id: `tab-${name}`,
    "aria-controls": `panel-${name}`, onclick: () => go(name) }, title));
  const panels = views.map(([name]) => h("section", { role: "tabpanel", id: `panel-${name}`, "aria-labelledby": `tab-${name}`,
    hidden: true }));
  let under = null;  // the hash of the view that is shown; a document is read on top of it
  fill($("tabs"), tabs);
  fill(main, panels);
  $("tabs").addEventListener("keydown", (event) => {
    const at = tabs.indexOf(document.activeElement);
    const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tabs.length - 1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    const tab = tabs[(next + tabs.length) % tabs.length];
    tab.focus();
    tab.click();
  });

  async function show(hash, { view, value }) {
    const n = Math.max(0, views.findIndex(([name]) => name === (view === "cluster" ? "clusters" : view))), panel = panels[n];
    const focus = document.activeElement, first = under === null;
    under = hash;
    const made = await (view === "cluster" ? clusterView : views[n][2])(found, value);
    if (under !== hash) return;  // another one has been chosen meanwhile
    tabs.forEach((tab, i) => {
      tab.setAttribute("aria-selected", i === n);
      tab.tabIndex = i === n ? 0 : -1;
    });
    panels.forEach((other, i) => {
      other.hidden = i !== n;
      if (i !== n) fill(other);
    });
    fill(panel, ...[made].flat());
    panel.dataset.view = hash;
    tabs[n].scrollIntoView({ block: "nearest", inline: "nearest" });
    const again = focus?.type === "radio" && panel.querySelector(`input[name="${focus.name}"]:checked`);
    if (again) again.focus();
    else if (!first) {
      scrollTo(0, 0);
      if (!tabs.includes(focus)) main.focus({ preventScroll: true });
    }
  }

  async function route() {
    const { view, value } = place();
    if (view === "document") {
      if (under === null) show("#documents", { view: "documents", value: "" });  // behind it
      await readDocument(found, Number(value));
    } else {
      if (dialog.open) dialog.close();
      if (location.hash !== under) await show(location.hash, { view, value });
    }
  }

  dialog.addEventListener("close", () => { if (place().view === "document") go(under.slice(1) || "overview"); });
  addEventListener("hashchange", route);
  $("skip").addEventListener("click", (event) => {
    event.preventDefault();
    main.focus();
  });
  await route();
  document.documentElement.dataset.ready = "";
}

function themes() {
  const root = document.documentElement, button = $("theme"), dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  function changed() {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Change to ${isDark() ? "light" : "dark"} colours`);
    drawn.forEach((draw) => draw());
  }
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    changed();
  });
  dark.addEventListener("change", changed);
  changed();
}

themes();
start().catch((error) => {
  fill($("main"), h("p", { role: "alert" }, `This page cannot be shown (${error.message}). It needs a browser of 2024 or later.`));
  throw error;
});
