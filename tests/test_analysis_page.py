"""report.html in a real browser: looked at, clicked, and read with the keyboard, on a phone and in the dark."""

import json
import shutil
import time
from itertools import pairwise
from pathlib import Path

import pytest
from analysis_example import LABELS, write_example

from emo_jax.analysis.page import write_page
from emo_jax.analysis.page.figures import charts

VIEWS = ("overview", "clusters", "labels", "layers", "map", "documents")
HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
CONTRAST = """
const parts = c => (c.match(/[\\d.]+/g) || []).map(Number);
const linear = v => v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
const ground = e => { for (; e; e = e.parentElement) { const c = parts(getComputedStyle(e).backgroundColor);
  if (c.length === 3 || c[3] > 0.5) return c; } return [255, 255, 255]; };
return [...document.querySelectorAll("h1, h2, h3, p, small, th, td, a, button, summary, b, li")]
  .filter(e => e.offsetParent && e.textContent.trim())
  .map(e => { const [x, y] = [light(parts(getComputedStyle(e).color)), light(ground(e))].sort((p, q) => q - p);
    return [(x + 0.05) / (y + 0.05), e.tagName + " " + e.className + " " + e.textContent.slice(0, 30)]; })
  .filter(([ratio]) => ratio < 4.5)
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_page(write_example(tmp_path_factory.mktemp("page"), text=HOSTILE))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium without a head; its own packages must be installed (Debian: chromium, chromium-driver)."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs Chromium and ChromeDriver: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "disable-background-networking",
                 "disable-component-update", "disable-sync", "no-first-run", "window-size=1280,1000",
                 f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


class Visitor:
    def __init__(self, browser, page: Path):
        self.browser, self.page = browser, page

    def open(self, address: str = "") -> None:
        self.browser.get("about:blank")
        self.browser.get(f"file://{self.page}{address}")
        self.wait("document.documentElement.dataset.ready")

    def do(self, script: str, *arguments):
        return self.browser.execute_script(script, *arguments)

    def wait(self, condition: str):
        for _ in range(600):
            if found := self.do(f"return {condition}"):
                return found
            time.sleep(0.05)
        raise AssertionError(f"never came: {condition}")

    def keys(self, *names: str) -> None:
        from selenium.webdriver import ActionChains, Keys

        for name in names:
            ActionChains(self.browser).send_keys(getattr(Keys, name)).perform()

    def width(self, pixels: int) -> None:
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                                     {"width": pixels, "height": 800, "deviceScaleFactor": 1, "mobile": pixels < 600})

    def text(self, selector: str) -> str:
        return self.do("return document.querySelector(arguments[0])?.innerText", selector)

    def click(self, selector: str) -> None:
        self.wait(f"document.querySelector({json.dumps(selector)})")
        self.do("document.querySelector(arguments[0]).click()", selector)


@pytest.fixture
def visitor(browser, page):
    visitor = Visitor(browser, page)
    visitor.width(1280)
    browser.get_log("browser")
    yield visitor
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not severe, severe
    assert visitor.do("return performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:') "
                      "&& !e.name.startsWith('blob:')).map(e => e.name)") == []  # it asks for nothing
    assert visitor.do("return window.hacked") is None  # text of a document is text


def test_a_page_is_one_file(page):
    text = page.read_text()
    assert "@@" not in text.split("<body>")[0] and text.count("<script") == text.count("</script>") == 4
    assert not any(f'{kind}="http' in text for kind in ("src", "href"))
    assert HOSTILE not in text


def test_every_figure_is_there_for_papers(page):
    names = {path.stem for path in (page.parent / "figures").glob("*.svg")}
    assert names == {path.stem for path in (page.parent / "figures").glob("*.png")}
    assert {"keep-curve", "map-1", "use-0", "cosine-1", "layers-label_information", "effective-0"} <= names
    svg = (page.parent / "figures" / "cosine-0.svg").read_text()
    assert svg.startswith("<svg") and all(label in svg for label in LABELS)


def test_a_model_alone_has_a_page(tmp_path):
    folder = write_example(tmp_path, models=1)
    found = json.loads((folder / "analysis.json").read_text())
    found["models"][0]["keep_curve"] = None
    found["models"][0]["by_layer"]["label_information"]["low"] = None
    import numpy as np

    assert "keep-curve" not in charts(found, dict(np.load(folder / "documents.npz")))


def test_clusters_documents_and_models_by_clicking(visitor):
    visitor.open()
    assert visitor.text("h1") == "model_a beside model_b"
    assert "more than those of model_b" in visitor.text(".lead")
    rows = visitor.text("#measures")
    assert "Selective gap at 25 %" in rows and "0.200 to 0.600" in rows
    visitor.click("[data-view=clusters]")
    assert visitor.do("return document.querySelectorAll('.cluster').length") == 5
    visitor.click(".cluster:nth-child(3)")
    visitor.wait("document.querySelector('#cluster-title')?.innerText.includes('judge')")
    assert "code" in visitor.text("main") and "+0.0400" in visitor.text("main")
    visitor.click(".contexts button")
    visitor.wait("document.querySelector('dialog').open")
    assert visitor.do("return document.querySelectorAll('dialog .text').length") == 2  # both models side by side
    marked = "dialog section:first-child .text span:not(.off)"
    assert visitor.do(f"return [...document.querySelectorAll('{marked}')].every(s => s.title.startsWith('cluster 2:'))")
    assert visitor.do("return document.querySelectorAll('dialog section:last-child .text span.off').length") == 0
    visitor.click("dialog .legend button")
    visitor.do("const by = document.getElementById('by'); by.value = 'expert'; by.dispatchEvent(new Event('change'))")
    visitor.wait("document.querySelector('dialog .text span').title.startsWith('expert')")
    visitor.keys("ESCAPE")
    visitor.wait("!document.querySelector('dialog').open")
    visitor.do("const m = document.getElementById('model'); m.value = 1; m.dispatchEvent(new Event('change'))")
    visitor.wait("location.hash.includes('model=1')")
    visitor.click("[data-view=labels]")
    visitor.wait("document.querySelector('#chart-use-1')?.dataset.drawn")


def test_questions_are_answered_where_they_say(visitor):
    visitor.open()
    links = visitor.do("return [...document.querySelectorAll('.questions a')].map(a => a.getAttribute('href'))")
    answers = visitor.do("return [...document.querySelectorAll('.questions p')].map(p => p.innerText)")
    assert len(links) >= 10
    assert all(len(answer) > 20 and "undefined" not in answer and "NaN" not in answer for answer in answers)
    for link in set(links):
        visitor.open(link)
        assert visitor.text("h1")


def test_every_view_with_its_charts_on_a_phone(visitor):
    visitor.width(390)
    for view in VIEWS:
        visitor.open(f"#view={view}")
        visitor.do("window.scrollTo(0, 1e6)")
        for chart in visitor.do("return [...document.querySelectorAll('.chart')].map(c => c.id)"):
            visitor.do("document.getElementById(arguments[0]).scrollIntoView()", chart)
            visitor.wait(f"document.getElementById('{chart}').dataset.drawn")
        wide = visitor.do("return document.documentElement.scrollWidth")
        assert wide <= 390, (view, wide)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_everything_can_be_read(visitor, theme):
    visitor.open()
    visitor.do("setTheme(arguments[0])", theme)
    for view in (*VIEWS, "clusters&cluster=1"):
        visitor.do("location.hash = 'view=' + arguments[0]", view)
        visitor.wait("document.querySelector('h1')")
        time.sleep(0.3)
        assert visitor.do(CONTRAST) == []


def test_all_of_it_with_the_keyboard(visitor):
    visitor.open()
    visitor.do("document.querySelector('.skip').focus()")
    visitor.keys("TAB")  # the model
    visitor.keys("TAB")  # light or dark
    visitor.keys("TAB")
    assert visitor.do("return document.activeElement.dataset.view") == "overview"
    visitor.keys("ARROW_RIGHT")
    assert visitor.do("return document.activeElement.dataset.view") == "clusters"
    visitor.wait("document.querySelector('#tab-clusters').getAttribute('aria-selected') === 'true'")
    visitor.keys("TAB")
    for _ in range(3):
        if visitor.do("return document.activeElement.classList.contains('cluster')"):
            break
        visitor.keys("TAB")
    visitor.keys("ENTER")
    visitor.wait("document.querySelector('#cluster-title')")
    visitor.do("document.querySelector('.contexts button').focus()")
    visitor.keys("ENTER")
    visitor.wait("document.querySelector('dialog').open && document.querySelector('dialog').contains(document.activeElement)")
    visitor.keys("ESCAPE")
    visitor.wait("!location.hash.includes('document')")
    nameless = visitor.do("return [...document.querySelectorAll('button, a, input, select, [role=img], [role=region]')]"
                          ".filter(e => !(e.ariaLabel || e.innerText || e.closest('label')?.innerText || '').trim())"
                          ".map(e => e.outerHTML.slice(0, 90))")
    assert nameless == []
    levels = visitor.do("return [...document.querySelectorAll('main h1, main h2, main h3')].map(e => +e.tagName[1])")
    assert levels[0] == 1 and all(b - a <= 1 for a, b in pairwise(levels))


def test_twelve_thousand_documents_fit(browser, tmp_path):
    page = write_page(write_example(tmp_path, documents=12_000, layers=2, experts=127, length=100), figures=False)
    assert page.stat().st_size < 15e6
    visitor, began = Visitor(browser, page), time.monotonic()
    visitor.open()
    print(f"{page.stat().st_size / 1e6:.1f} MB, shown after {time.monotonic() - began:.2f} s")
    visitor.open("#view=documents&document=11999")
    visitor.wait("document.querySelectorAll('dialog .text span').length === 200")
    visitor.open("#view=map")
    visitor.wait("document.querySelector('#chart-map-0').dataset.drawn")
