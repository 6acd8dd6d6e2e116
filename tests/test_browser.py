"""The rendered book in a browser: every page on a screen and on a phone, light and dark, and the figures that live.

Chromium is the system's. A page is loaded once, and the tests of it follow each other.
"""

import http.server
import re
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import yaml
from chromium import CHROMIUM

from ntkbook.publish import runner

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright drives the browser: not installed")
axe_api = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="a browser shows the book: no Chromium installed")

TOC = yaml.safe_load((ROOT / "_toc.yml").read_text("utf8"))
FILES = [TOC["root"], *(entry["file"] for entry in TOC["chapters"])]
PAGES = [*(f"{Path(file).with_suffix('')}.html" for file in FILES), "search.html"]
EXPERIMENTS = runner.chapters(ROOT)[:-1]  # the last sums the others up
SCREEN, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}

RAW = """() => {
  const texts = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT), raw = [];
  for (let node; (node = texts.nextNode());) {
    if (node.parentElement.closest("code, pre, script, style, mjx-container")) continue;
    if (/\\$[^$]+\\$|\\\\[([]|\\\\begin\\{/.test(node.data)) raw.push(node.data.trim());
  }
  return raw;
}"""

# Contrast as WCAG has it, of the letters in figures, which axe leaves out.
PALE = """() => {
  const rgba = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (text) => {
    const [r, g, b] = rgba(text).map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const solid = (text) => /^rgb/.test(text) && (rgba(text)[3] ?? 1) > 0.5;
  const ground = (text) => {
    let node = text.closest("div");
    while (node && !solid(getComputedStyle(node).backgroundColor)) node = node.parentElement;
    return getComputedStyle(node || document.body).backgroundColor;
  };
  const pale = [];
  for (const text of document.querySelectorAll(".ntk-live svg text")) {
    const [a, b] = [light(getComputedStyle(text).fill), light(ground(text))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (text.textContent.trim() && contrast < 4.5) pale.push(`${text.textContent}: ${contrast.toFixed(1)}`);
  }
  return pale;
}"""


# The first of each kind of what is folded: the cells' code alone would take axe minutes.
OPEN = """() => {
  const kinds = new Map([...document.querySelectorAll("details")].reverse().map((one) => [one.className, one]));
  for (const one of kinds.values()) one.open = true;
}"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *arguments):
        pass


@pytest.fixture(scope="module")
def address(stored_site):
    """Where the book is served."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(stored_site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    """One for all tests here, to which every name of a host is unknown."""
    switches = ["--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=switches)
        yield browser
        browser.close()


@contextmanager
def visit(browser, url, home, **options):
    """A page with all its figures drawn, and the list of what went wrong on it until now.

    That is errors, and requests for what is not below ``home``.
    """
    context = browser.new_context(**{"viewport": SCREEN, "reduced_motion": "reduce", **options})
    context.set_default_timeout(120_000)
    page, problems = context.new_page(), []
    page.on("console", lambda told: told.type == "error" and problems.append(f"{told.text} {told.location}"))
    page.on("pageerror", lambda error: problems.append(str(error)))
    own = (home, "data:", "blob:")
    page.on("request", lambda asked: asked.url.startswith(own) or problems.append(f"asked {asked.url}"))
    page.goto(url)
    settle(page)
    yield page, problems
    context.close()


def settle(page):
    """Wait for the mathematics and the figures."""
    page.evaluate("() => window.MathJax?.startup?.promise.then(() => null)")
    page.wait_for_function(
        "() => [...document.querySelectorAll('.ntk-interactive')].every((box) => box.querySelector('.main-svg'))"
    )


def in_mode(page, mode):
    """As the reader's system asks for it."""
    page.emulate_media(color_scheme=mode)
    page.wait_for_function("(mode) => document.documentElement.dataset.theme === mode", arg=mode)
    page.wait_for_function("() => document.getAnimations().every((one) => one.playState !== 'running')")


@pytest.fixture(scope="module", params=PAGES)
def visited(request, browser, address):
    """A page of the book on a screen, loaded once for all tests of it, and the list of what went wrong there."""
    with visit(browser, f"{address}/{request.param}", address) as (page, problems):
        yield page, problems


@pytest.fixture
def page(visited):
    page, _ = visited
    in_mode(page, "light")
    return page


def test_mathematics_is_typeset(page):
    assert page.locator(".math").count() > 0 or Path(page.url).stem not in EXPERIMENTS
    assert page.locator(".math:not(:has(mjx-container))").count() == 0
    assert page.locator("mjx-merror, [data-mjx-error]").count() == 0
    assert page.evaluate(RAW) == []


def test_every_image_says_what_it_shows(page):
    words = page.locator("main img").evaluate_all("(all) => all.map((image) => image.alt)")
    named = "(all) => all.map((svg) => svg.closest('[aria-label]')?.ariaLabel ?? '')"
    words += page.locator(".ntk-live .main-svg, .ntk-play svg").evaluate_all(named)
    assert [text for text in words if len(text) <= 5 or "_images/" in text] == []


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_axe_finds_nothing_serious(page, mode):
    """Formulas are left out: their markup is MathJax's, their colour that of the text around."""
    page.evaluate(OPEN)
    in_mode(page, mode)
    options = {"resultTypes": ["violations"], "preload": False}  # it would ask for style sheets at wrong addresses
    if mode == "dark":  # only colours differ
        options["runOnly"] = ["color-contrast"]
    found = axe_api.Axe().run(page, {"exclude": [["mjx-container"]]}, options).response["violations"]
    told = [
        f"{rule['id']}: {', '.join(' '.join(node['target']) for node in rule['nodes'][:5])}"
        for rule in found
        if rule["impact"] in ("serious", "critical")
    ]
    assert told == []
    assert page.evaluate(PALE) == []


def test_interactive_figures_live(page):
    boxes = page.locator(".ntk-interactive")
    assert boxes.count() > 0 or Path(page.url).stem not in EXPERIMENTS
    for box in boxes.all():
        box.scroll_into_view_if_needed()
        assert box.locator(".ntk-live .main-svg").first.is_visible()
        assert not box.locator(".ntk-static").is_visible()
        assert hovered(page, box), "no value is shown where the pointer is"
        before = picture(box)
        steer(page, box)
        handle = box.element_handle()
        page.wait_for_function(f"([box, before]) => ({PICTURE})(box) !== before", arg=[handle, before])


def hovered(page, box):
    """What Plotly shows beside the pointer, somewhere on two lines across the plot."""
    plot = box.locator(".nsewdrag").first
    parts = [(0.5, i / 20) for i in range(1, 20)] + [(i / 20, i / 20) for i in range(1, 20)]
    # Plotly looks at most every 50 ms; a busy machine takes its time
    for part, pause in [(part, pause) for pause in (70, 500) for part in parts]:
        plot.scroll_into_view_if_needed()  # what is drawn above may have moved it
        area = plot.bounding_box()
        page.mouse.move(area["x"] + part[0] * area["width"], area["y"] + part[1] * area["height"])
        page.wait_for_timeout(pause)
        shown = box.locator(".hovertext").all_text_contents()
        if shown:
            page.mouse.move(0, 0)
            return any(re.search(r"\d", text) for text in shown)
    return False


PICTURE = "(box) => [...box.querySelectorAll('.cartesianlayer')].map((layer) => layer.innerHTML).join()"


def picture(box):
    return box.evaluate(PICTURE)


def steer(page, box):
    """By keys alone: move the slider, or choose another item of the menu, or hide a name of the legend."""
    first = box.locator(".ntk-controls :is(input, select), .legendtoggle").first
    assert first.get_attribute("role") == "button" or first.locator("xpath=ancestor::label").inner_text().strip()
    first.focus()
    if first.get_attribute("role") == "button":
        page.keyboard.press("Enter")
        page.wait_for_timeout(400)  # what follows within 300 ms would be a double click
    else:
        last = first.evaluate("(one) => one.tagName === 'SELECT' || one.value === one.max")
        page.keyboard.press("ArrowDown" if last else "ArrowUp")


def test_a_readers_choice_in_a_figure_outlives_a_change_of_mode(page):
    """The slider's, and what is hidden in the legend; and the legend keeps the focus."""
    if not page.locator(".ntk-interactive").count():
        pytest.skip("no interactive figure on this page")
    box = page.locator(".ntk-interactive").first
    shown = "(plot) => plot._fullData.map((trace) => trace.visible)"
    plot = box.locator(".ntk-live").element_handle()
    steer(page, box)
    if toggles := box.locator(".legendtoggle").count():
        toggle = box.locator(".legendtoggle").nth(toggles - 1)
        toggle.focus()
        page.keyboard.press(" ")
        page.wait_for_function("(plot) => plot._fullData.some((trace) => trace.visible === 'legendonly')", arg=plot)
        page.wait_for_function("() => document.activeElement.matches('.legendtoggle[aria-pressed=false]')")
    before = plot.evaluate(shown)
    in_mode(page, "dark")
    page.wait_for_function("(plot) => plot._fullLayout.font.color === '#e6e6e6'", arg=plot)
    assert plot.evaluate(shown) == before
    if toggles:
        page.keyboard.press("Enter")
        page.wait_for_function(
            "([plot, n]) => plot._fullData.filter((trace) => trace.visible === 'legendonly').length < n",
            arg=[plot, before.count("legendonly")],
        )
        page.wait_for_function("() => document.activeElement.matches('.legendtoggle[aria-pressed=true]')")


def test_a_figure_is_printed_as_its_static_twin(page):
    page.emulate_media(media="print")
    for box in page.locator(".ntk-interactive, .ntk-posterior").all():
        assert box.locator(".ntk-static").is_visible()
        assert not box.locator(".ntk-live").is_visible()
    page.emulate_media(media="screen")


def test_nothing_scrolls_sideways_on_a_phone(page):
    page.set_viewport_size(PHONE)
    if page.locator(".ntk-interactive").count():
        page.reload()
        settle(page)
    try:
        assert page.evaluate("() => document.documentElement.scrollWidth") <= PHONE["width"]
        for box in page.locator(".ntk-live").all():
            assert box.bounding_box()["width"] <= PHONE["width"]
    finally:
        page.set_viewport_size(SCREEN)


def test_no_error_and_no_request_leaves_the_machine(visited):
    """After all that the tests above did on the page."""
    _, problems = visited
    assert problems == []


def test_search_finds_a_word_and_its_page_opens(browser, address):
    with visit(browser, f"{address}/search.html", address) as (page, problems):
        page.goto(f"{address}/")  # the front door
        page.wait_for_url("**/book/index.html")
        page.keyboard.press("Control+k")
        page.keyboard.type("pivoted Cholesky")
        page.keyboard.press("Enter")
        page.wait_for_url("**/search.html?q=*")
        page.locator("ul.search li a").first.click()
        page.wait_for_url("**/book/*.html*")
        assert "pivoted" in page.locator("article").inner_text().lower()
        assert problems == []


def test_without_scripts_the_static_figures_stand_in_the_pages(browser, address):
    with browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        for name in EXPERIMENTS:
            page.goto(f"{address}/book/{name}.html")
            figures = page.locator(".ntk-interactive, .ntk-posterior").all()
            assert figures
            assert all(figure.locator(".ntk-static").is_visible() for figure in figures)


def test_the_figure_to_play_with_works_from_a_file_and_by_keys_alone(browser, stored_site):
    url = (stored_site / "book" / "02_sinusoids.html").as_uri()
    with visit(browser, url, "file:") as (page, problems):
        play = page.locator(".ntk-play")
        status, focused = play.locator(".ntk-play-status"), page.locator(":focus")

        def tab_to(what):
            for _ in range(30):
                if focused.and_(what).count():
                    return
                page.keyboard.press("Tab")
            raise AssertionError(f"no Tab leads to {what}")

        def observations():
            return int(status.inner_text().split()[0])

        start, curve = observations(), play.locator(".mean.ntk")
        play.get_by_role("button").first.focus()
        for button in play.locator("[data-network]").all()[1:]:
            before = curve.get_attribute("d")
            tab_to(button)
            page.keyboard.press("Enter")
            assert button.get_attribute("aria-pressed") == "true"
            assert curve.get_attribute("d") != before
        tab_to(play.locator(".ground"))
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        assert observations() == start + 1
        before = curve.get_attribute("d")
        page.keyboard.press("Shift+ArrowUp")
        assert curve.get_attribute("d") != before
        page.keyboard.press("Delete")
        assert observations() == start
        assert focused.and_(play.locator(".ground")).count()
        for name in ("noise", "outputscale"):
            slider, band = play.locator(f"[data-slider={name}]"), play.locator(".band.ntk")
            tab_to(slider)
            before = band.get_attribute("d")
            page.keyboard.press("ArrowRight")
            assert band.get_attribute("d") != before
        # A browser refuses the theme's fonts of icons on file://; their pictures come from a script beside them.
        assert [problem for problem in problems if "/webfonts/" not in problem] == []
