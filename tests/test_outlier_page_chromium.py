"""The outlier page in headless Chromium without a network: it reads well, sorts, copies, and answers mouse and keys.

`make test-page` installs what this needs and runs it. Screenshots stay in $OUTLIERQ_SCREENSHOTS, where CI keeps them.
"""

import os
import shutil
from pathlib import Path

import pytest
from outlier_reports import outlier_report
from test_outlier_page import SCRIPT, hostile
from test_run_page import made_run

from outlierq.report.pages import outlier_page, run_page

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; run `make test-page`")
pytestmark = pytest.mark.slow

CONTRAST = 4.5  # WCAG 2.2, criterion 1.4.3, for text of normal size
SCHEMES = ("light", "dark")

# Colour and background of every piece of visible text, of the page and of its SVG pictures.
TEXT_COLOURS = """() => {
  const numbers = (colour) => (colour.match(/[\\d.]+/g) ?? []).map(Number);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const [r, g, b, alpha = 1] = numbers(getComputedStyle(at).backgroundColor);
      if (alpha > 0) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim();
    const element = walker.currentNode.parentElement;
    if (!text || !element.checkVisibility() || element.closest("script, noscript")) continue;
    const style = getComputedStyle(element);
    const colour = element.closest("svg") ? style.fill : style.color;
    found.push([text.slice(0, 40), numbers(colour).slice(0, 3), behind(element)]);
  }
  return found;
}"""


def chromium_path():
    """The system's Chromium, or None to take the one that playwright has fetched."""
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    return next((path for path in found if path), None)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        path = chromium_path() or driver.chromium.executable_path
        if not os.path.exists(path):
            pytest.skip("no Chromium found; run `make test-page`")
        # Chromium's sandbox does not start for root, which is who runs tests in a container.
        root = hasattr(os, "geteuid") and os.geteuid() == 0
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"] if root else [])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report():
    return outlier_report()


@pytest.fixture(scope="module")
def written(report, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "outliers.html"
    outlier_page.write_page(report, path)
    return path


@pytest.fixture(scope="module", params=SCHEMES)
def page(request, browser, written):
    """The drawn page in light and in dark, and all that the browser complained about or asked for."""
    page = opened(browser, written, request.param)
    yield page
    page.context.close()


def opened(browser, path, scheme="light", width=1280, **options):
    context = browser.new_context(
        color_scheme=scheme, offline=True, viewport={"width": width, "height": 900}, **options
    )
    page = context.new_page()
    page.complaints, page.requested = [], []
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("request", lambda request: page.requested.append(request.url))
    page.goto(path.as_uri())
    return page


def luminance(colour):
    """Relative luminance of an sRGB colour, WCAG 2.2."""
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_the_page_loads_without_complaints_and_asks_for_nothing(page):
    assert page.complaints == []
    assert [url for url in page.requested if not url.startswith(("file:", "data:"))] == []


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(browser, written, width, scheme, tmp_path):
    run_page.write_run_page(made_run(), tmp_path / "run.html")
    kept = Path(os.environ.get("OUTLIERQ_SCREENSHOTS", tmp_path))
    kept.mkdir(parents=True, exist_ok=True)
    for path in (written, tmp_path / "run.html"):
        page = opened(browser, path, scheme, width)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.screenshot(path=kept / f"{path.stem}-{width}-{scheme}.png", full_page=True)
        assert page.complaints == []
        page.context.close()


def test_text_and_pictures_are_there_without_scripts(browser, written):
    page = opened(browser, written, java_script_enabled=False)
    boxes = [drawing.bounding_box() for drawing in page.locator(".drawing svg").all()]
    assert len(boxes) == 9 and all(box["width"] > 400 and box["height"] > 40 for box in boxes)
    assert page.locator(".on-light").first.is_visible() and not page.locator(".on-dark").first.is_visible()
    assert page.locator(".command").first.is_visible() and page.locator("button").count() == 0
    page.context.close()


def test_a_map_reads_out_a_planted_channel_under_the_mouse_and_by_keys(page, report):
    group = next(g for g in report.groups if g.group == "model.layers.7.self_attn.q_proj")
    drawing = page.locator("[data-levels]").first
    drawing.scroll_into_view_if_needed()
    image = next(each for each in drawing.locator("image").all() if each.is_visible()).bounding_box()
    page.mouse.move(image["x"] + image["width"] * 423.2 / 576, image["y"] + image["height"] * 7.5 / 30)
    said = page.locator("output.reading").first.text_content()
    assert said.startswith("block 7, channels 422 to 423: ") and said.endswith("× the median")
    ratio = float(said.split(": ")[1].partition("×")[0])
    values = sorted(v for g in report.groups if g.role == group.role for v in g.abs_max)
    assert ratio == pytest.approx(group.abs_max[423] / values[len(values) // 2], rel=0.06)
    drawing.focus()
    page.keyboard.press("ArrowDown")
    assert page.locator("output.reading").first.text_content().startswith("block 8, channels 422 to 423: ")


def test_a_click_on_a_heading_sorts_and_the_next_one_turns_round(page):
    role = page.locator("details.role").nth(1)
    role.evaluate("each => (each.open = true)")
    head = role.locator("thead button").first
    blocks = "rows => rows.map(row => Number(row.cells[0].textContent))"
    for order in (True, False):
        head.click()
        shown = role.locator("tbody tr").evaluate_all(blocks)
        assert shown == sorted(shown, reverse=order)
        assert role.locator("[aria-sort]").get_attribute("aria-sort") == ("descending" if order else "ascending")


def test_a_command_is_copied_whole(page):
    page.locator(".run .command button").click()
    page.wait_for_function("document.querySelector('.run .command button').textContent === 'Copied'")
    command = page.locator(".run .command code").text_content()
    assert command.startswith("outlierq quantize ") and page.complaints == []


def test_all_text_has_enough_contrast(page):
    found = page.evaluate(TEXT_COLOURS)
    assert len(found) > 100 and any(text == "channel" for text, *_ in found), "text of the pictures is among them"
    assert [(text, one, other) for text, one, other in found if contrast(one, other) < CONTRAST] == []


def test_a_dark_page_prints_dark_on_white_with_every_input(browser, written):
    page = opened(browser, written, "dark")
    page.emulate_media(media="print")
    colours = page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    background, ink = ([int(c) for c in text[4:-1].split(",")] for text in colours)
    assert background == [255, 255, 255] and contrast(background, ink) > 10
    assert page.locator(".on-light").first.is_visible() and not page.locator(".on-dark").first.is_visible()
    page.evaluate(
        "addEventListener('beforeprint', () => (window.open_ = document.querySelectorAll('details[open]').length))"
    )
    assert page.pdf(format="A4")[:5] == b"%PDF-"
    assert page.evaluate("[window.open_, document.querySelectorAll('details[open]').length]") == [4, 0]
    page.context.close()


def test_texts_with_scripts_in_them_do_not_run(browser, report, tmp_path):
    outlier_page.write_page(hostile(report), tmp_path / "page.html")
    page = opened(browser, tmp_path / "page.html")
    page.locator("[data-levels]").first.hover()
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0 and page.locator("script").count() == 1
    assert SCRIPT in page.locator("body").text_content()
    assert page.complaints == []
    page.context.close()


def test_a_large_model_opens_in_reasonable_time(browser, tmp_path):
    path = tmp_path / "page.html"
    outlier_page.write_page(outlier_report(blocks=80, hidden=8192, intermediate=28672), path)
    page = opened(browser, path)
    assert page.evaluate("performance.getEntriesByType('navigation')[0].domInteractive") < 10_000
    assert page.complaints == []
    page.context.close()
