"""The page of an analysis in a real browser: by mouse, by keyboard, on a phone, in the dark, and of text like markup."""

import json
import re
import shutil
import time

import pytest
from analysis_example import STRANGE, STRANGE_LABEL, write_example

pytest.importorskip("vl_convert", reason="the page needs vl-convert-python, in the extra `report`")
webdriver = pytest.importorskip("selenium.webdriver", reason="the browser is driven by selenium, in the extra `test`")
from emo_jax.analysis.page import contents, words, write_page  # noqa: E402
from emo_jax.analysis.page.questions import questions  # noqa: E402

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")]
VIEWS = ("overview", "measures", "clusters", "clusters=b", "cluster=a:1", "cluster=b:0", "labels", "layers", "documents",
         "keep", "document=3")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Two models; the text and the label of a document look like markup."""
    return write_page(write_example(tmp_path_factory.mktemp("page"), strange=(STRANGE,), strange_label=STRANGE_LABEL))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update",
                     "disable-sync", "no-first-run", "window-size=1280,900",
                     f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Reader:
    """What a person does with the page."""

    def __init__(self, driver, page):
        self.driver, self.page = driver, page

    def open(self, view="overview", width=1280, dark=False, page=None):
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", dict(
            width=width, height=900, deviceScaleFactor=1, mobile=width < 500))
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(
            features=[dict(name="prefers-color-scheme", value="dark" if dark else "light")]))
        self.driver.get("about:blank")
        self.driver.get(f"{(page or self.page).as_uri()}#{view}")
        self.wait("return 'ready' in document.documentElement.dataset")
        return self

    def wait(self, script, *arguments):
        """Until it is true; what it is then."""
        for _ in range(400):
            if value := self.driver.execute_script(script, *arguments):
                return value
            time.sleep(0.05)
        raise AssertionError(f"never true: {script}")

    def js(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def all(self, css):
        return self.driver.find_elements("css selector", css)

    def click(self, css, having=""):
        element = self.wait("return [...document.querySelectorAll(arguments[0])].find("
                            "(e) => e.textContent.includes(arguments[1]))", css, having)
        self.js("arguments[0].scrollIntoView({block: 'center'})", element)  # not below the header
        element.click()
        return element

    def shown(self, view):
        self.wait("return document.querySelector('[role=tabpanel]:not([hidden])').dataset.view === arguments[0]", f"#{view}")

    def keys(self, *names):
        for name in names:
            webdriver.ActionChains(self.driver).send_keys(getattr(webdriver.Keys, name)).perform()

    def tab_to(self, css, limit=60):
        """By the Tab key alone; the focus is then seen."""
        for _ in range(limit):
            self.keys("TAB")
            if self.js("return document.activeElement.matches(arguments[0])", css):
                style = self.js("const e = document.activeElement, on = e.type === 'radio' ? e.nextElementSibling : e;"
                                "return getComputedStyle(on).outlineStyle")
                assert style != "none", f"the focus on {css} is not seen"
                return
        raise AssertionError(f"Tab does not lead to {css}")

    def draw_all(self):
        """All charts, as if scrolled to."""
        self.js("document.querySelectorAll('figure.chart:not([data-drawn])').forEach((figure) => figure.draw())")
        self.wait("return !document.querySelector('figure.chart:not([data-drawn])')")


@pytest.fixture
def reader(chromium, page):
    chromium.get_log("browser"), chromium.get_log("performance")
    return Reader(chromium, page)


def test_a_cluster_its_document_and_the_other_model_are_some_clicks_away(reader):
    reader.open().click("[role=tab]", "Clusters")
    reader.shown("clusters")
    reader.click(".card", "Cluster 1")
    reader.shown("cluster=a:1")
    assert "Cluster 1 of emo_tiny" in reader.js("return document.querySelector('main').textContent")
    assert reader.all(".documents mark"), "no token is marked"
    reader.click(".documents a")
    reader.wait("return document.querySelector('dialog').open && document.querySelectorAll('.pane').length === 2")
    assert reader.js("return location.hash").startswith("#document=")
    colours = "return new Set([...document.querySelectorAll('.pane .t')].map((e) => getComputedStyle(e).backgroundColor)).size"
    assert reader.js(colours) > 2
    for model in ("std_tiny", "emo_tiny"):
        reader.click("dialog label", model)
        reader.wait("const titles = [...document.querySelectorAll('.pane h3')].map((e) => e.textContent);"
                    "return titles.length === 1 && titles[0] === arguments[0]", model)
    reader.click("dialog label", "expert")
    assert "expert" in reader.wait("return document.querySelector('.pane .legend')?.textContent.startsWith('expert') "
                                   "&& document.querySelector('.pane .legend').textContent")
    reader.click("#close-reader")
    reader.wait("return !document.querySelector('dialog').open && location.hash === '#cluster=a:1'")
    reader.click(".crumbs a")
    reader.shown("clusters=a")
    reader.click("label", "std_tiny")
    reader.shown("clusters=b")
    assert reader.js("return document.querySelector('.card').getAttribute('href')").startswith("#cluster=b:")


def test_a_subset_is_shown_as_a_module(reader):
    reader.open("clusters")
    text = reader.wait("return document.querySelector('.subset')?.innerText")
    for part in ("Subset law", "25\u00a0% of the experts", "Contexts", "What removing it costs"):
        assert part in text


def test_a_token_says_its_cluster_and_expert_and_the_legend_filters(reader):
    reader.open("document=3")
    token = reader.all(".pane .t")[5]
    webdriver.ActionChains(reader.driver).move_to_element(token).perform()
    said = reader.wait("return !document.querySelector('#tip').hidden && document.querySelector('#tip').textContent")
    assert re.search(r"emo_tiny .*cluster \d+: .* · expert \d+ of layer 0", said)
    assert len(reader.all(".pane .t.same")) == 2, "the same token of the other model"
    reader.click(".pane .legend button")
    key = reader.js("return document.querySelector('.pane .t:not(.faded)').dataset.key")
    faded = reader.js("return [...document.querySelectorAll('.pane')].map((pane) => pane.querySelectorAll('.faded').length)")
    assert faded[0] > 0 and faded[1] == 0
    assert all(t.get_attribute("data-key") == key for t in reader.all(".pane:first-child .t:not(.faded)"))


def test_everything_is_done_with_the_keyboard(reader):
    reader.open().tab_to(".skip")
    reader.keys("ENTER")
    assert reader.js("return document.activeElement.id") == "main"
    reader.open().tab_to("#tab-overview")
    reader.keys("ARROW_RIGHT", "ARROW_RIGHT")
    reader.shown("clusters")
    assert reader.js("return document.activeElement.id") == "tab-clusters"
    assert len(reader.all("[role=tab][tabindex='0']")) == 1, "one stop for all tabs"
    reader.tab_to("input[name=clusters-model]")
    reader.keys("ARROW_RIGHT")
    reader.shown("clusters=b")
    assert reader.js("return document.activeElement.name") == "clusters-model", "the focus stays where it was"
    reader.tab_to(".card")
    reader.keys("ENTER")
    reader.wait("return document.querySelector('.crumbs')")
    reader.tab_to(".documents a")
    reader.keys("ENTER")
    reader.wait("return document.querySelector('dialog').open")
    reader.tab_to(".pane .t")
    reader.keys("ARROW_RIGHT", "ARROW_RIGHT")
    assert reader.js("return document.activeElement.dataset.t") == "2"
    assert "cluster" in reader.js("return document.querySelector('#tip').textContent")
    reader.keys("ESCAPE")
    reader.wait("return !document.querySelector('dialog').open && location.hash.startsWith('#cluster=b')")
    assert reader.js("return document.activeElement.matches('.documents a')"), "the focus is back where the reader was opened"
    reader.open("labels").tab_to("input[type=range]")
    layer = int(reader.js("return document.activeElement.value"))
    reader.keys("ARROW_LEFT")
    assert reader.js("return document.activeElement.nextElementSibling.value") == str(layer - 1)


def test_a_screen_reader_finds_landmarks_names_and_a_table_behind_every_chart(reader):
    for view in VIEWS:
        reader.open(view)
        assert reader.js("return [...document.querySelectorAll('button, a, input, select, dialog[open]')].filter((e) => "
                         "!(e.textContent.trim() || e.ariaLabel || e.labels?.length)).length") == 0, "a control without a name"
        for landmark in ("header", "nav", "main", "footer"):
            assert len(reader.all(landmark)) == 1
        assert len(reader.all("[role=tabpanel]:not([hidden]) h1")) == 1
        reader.draw_all()
        reader.js("document.querySelectorAll('details.data').forEach((details) => { details.open = true; })")
        reader.wait("return [...document.querySelectorAll('figure.chart')].every((figure) => figure.querySelector('tbody tr'))")
        assert reader.js("return [...document.querySelectorAll('.plot')].every((plot) => "
                         "plot.querySelector('[role=img]').ariaLabel.length > 20)")


def test_nothing_is_loaded_and_nothing_is_complained_of(reader):
    for view in VIEWS:
        reader.open(view).draw_all()
    complaints = [entry["message"] for entry in reader.driver.get_log("browser")]
    assert complaints == []
    events = [json.loads(entry["message"])["message"] for entry in reader.driver.get_log("performance")]
    urls = {e["params"]["request"]["url"].partition("#")[0] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert {url for url in urls if not url.startswith(("data:", "blob:"))} == {reader.page.as_uri()}


def test_a_phone_shows_every_view_without_moving_sideways(reader):
    for view in VIEWS:
        reader.open(view, width=360).draw_all()
        assert reader.js("return [document.documentElement.scrollWidth, innerWidth]") == [360, 360], view
        if view.startswith("document="):
            assert reader.js("const d = document.querySelector('dialog'); return d.scrollWidth <= d.clientWidth")


CONTRAST = """
const context = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
const rgba = (color) => { context.clearRect(0, 0, 1, 1); context.fillStyle = color; context.fillRect(0, 0, 1, 1);
  return [...context.getImageData(0, 0, 1, 1).data]; };
const light = (c) => c.slice(0, 3).map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
function behind(element) {
  for (let e = element; e; e = e.parentElement) {
    const color = rgba(getComputedStyle(e).backgroundColor);
    if (color[3] === 255) return color;
  }
  return [255, 255, 255, 255];
}
const poor = [];
const root = document.querySelector("dialog[open]") ?? document.body;
for (const element of root.querySelectorAll("*")) {
  const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  if (!own || !element.checkVisibility() || element.closest("svg, script, style, option, .vega-embed, [aria-hidden]")) continue;
  const style = getComputedStyle(element), [a, b] = [light(rgba(style.color)), light(behind(element))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), big = parseFloat(style.fontSize) >= 24;
  if (ratio < (big ? 3 : 4.5)) poor.push([element.tagName, element.className, ratio, element.textContent.slice(0, 30)]);
}
return poor;
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_has_enough_contrast(reader, dark):
    for view in VIEWS:
        reader.open(view, dark=dark)
        assert reader.js(CONTRAST) == [], view
    assert (reader.js("return getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)") == dark


def test_the_switch_changes_the_colours_of_page_and_charts(reader):
    reader.open("layers").draw_all()
    colour = ("return [getComputedStyle(document.body).backgroundColor, "
              "document.querySelector('.plot svg text').getAttribute('fill')]")
    before = reader.js(colour)
    reader.click("#theme", "Dark")
    reader.wait(f"const now = (() => {{ {colour} }})(); return now.every((c, i) => c !== arguments[0][i])", before)
    reader.click("#theme", "Light")
    reader.wait(f"const now = (() => {{ {colour} }})(); return now.every((c, i) => c === arguments[0][i])", before)


def test_text_and_labels_of_documents_are_never_markup(reader):
    for view in (*VIEWS, "document=0", "document=59"):
        reader.open(view).draw_all()
        reader.js("document.querySelectorAll('details.data').forEach((details) => { details.open = true; })")
        assert reader.js("return window.ran ?? null") is None, view
        assert not reader.all("main img, dialog img, main script, dialog script")
    assert STRANGE_LABEL.lower() in reader.js("return document.querySelector('dialog .eyebrow').textContent").lower()
    assert STRANGE in reader.open("document=0").js("return document.querySelector('.pane .text').textContent")


def test_a_point_of_the_map_opens_its_document(reader):
    reader.open("documents").draw_all()
    reader.click(".legend button", "law")
    reader.click("label", "strongest cluster")
    reader.wait("return document.querySelector('.legend').textContent.includes('0: ')")
    reader.draw_all()
    x, y = reader.js("""const canvas = document.querySelector('.plot canvas'), box = canvas.getBoundingClientRect();
        canvas.scrollIntoView({block: 'center'});
        const context = canvas.getContext('2d'), image = context.getImageData(0, 0, canvas.width, canvas.height).data;
        for (let y = 10; y < canvas.height; y++) for (let x = 10; x < canvas.width; x++)
          if (image[4 * (y * canvas.width + x) + 3] > 150) { const now = canvas.getBoundingClientRect();
            return [now.left + (x + 1) * box.width / canvas.width, now.top + (y + 2) * box.height / canvas.height]; }""")
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        reader.driver.execute_cdp_cmd("Input.dispatchMouseEvent", dict(type=kind, x=x, y=y, button="left", clickCount=1))
    reader.wait("return document.querySelector('dialog').open && location.hash.startsWith('#document=')")


def test_every_question_leads_to_a_view_that_is_there(reader):
    found = contents.read(reader.page.parent)
    for q in questions(found):
        reader.open(q.link)
        reader.shown(q.link)
        assert reader.js("return document.querySelector('[role=tab][aria-selected=true]').textContent") == q.view
        if q.link.startswith("labels="):
            assert reader.js("return document.querySelector('#label-experts').selectedOptions[0].text") in q.question


def test_numbers_are_written_alike_in_sentences_and_tables(reader):
    reader.open()
    for value in (0.0, 0.00001, -0.0001, 0.0123, 0.996, 1.005, -3.25, 12.34, 999.7, 1234567.8):
        for signed in (False, True):
            assert reader.js("return number(arguments[0], arguments[1])", value, signed) == words.number(value, signed)


def test_twelve_thousand_documents_fit_and_open(reader, tmp_path):
    large = write_page(write_example(tmp_path, documents=12_000, tokens=100, layers=4, experts=31, labels=20, clusters=32))
    size = large.stat().st_size
    assert size < 15e6
    reader.open(page=large)
    timing = reader.js("const t = performance.getEntriesByType('navigation')[0]; return [t.loadEventEnd, performance.now()]")
    assert len(reader.all(".questions dt")) >= 10
    began = time.monotonic()
    reader.open("document=11999", page=large)
    print(f"\n12,000 documents, 1.2 M tokens, 2 models: {size / 1e6:.1f} MB, loaded after {timing[0]:.0f} ms, shown before "
          f"{timing[1]:.0f} ms; a link to a document opens in {time.monotonic() - began:.1f} s")


