"""The outlier page in headless Chromium without a network: it draws, answers to the mouse, and can be read.

`make test-page` installs what this needs and runs it.
"""

import os
import shutil

import pytest
from outlier_reports import PLANTED, SPIKE, SPIKE_BLOCK, SPIKE_CHANNEL, outlier_report
from test_outlier_page import NAMES, SCRIPT, hostile

from outlierq.report.pages import outlier_page

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; run `make test-page`")
pytestmark = pytest.mark.slow

CONTRAST = 4.5  # WCAG 2.2, criterion 1.4.3, for text of normal size
SCHEMES = ("light", "dark")

# The first item of a picture whose datum has all the wanted values, in page coordinates of its middle.
FIND_ITEM = """([name, wanted]) => {
  const view = window.pictures[name];
  const matches = (datum) => datum && Object.entries(wanted).every(([key, value]) => datum[key] === value);
  const search = (item, x, y) => {
    for (const mark of item.items ?? []) {
      for (const child of mark.items ?? []) {
        if (mark.marktype === "group") {
          const found = search(child, x + (child.x ?? 0), y + (child.y ?? 0));
          if (found) return found;
        } else if (mark.role === "mark" && ["symbol", "rect"].includes(mark.marktype) && matches(child.datum)) {
          return [x + (child.bounds.x1 + child.bounds.x2) / 2, y + (child.bounds.y1 + child.bounds.y2) / 2];
        }
      }
    }
    return null;
  };
  const drawing = document.querySelector(`#${name}-drawing`);
  const box = drawing.querySelector("canvas, svg").getBoundingClientRect();
  const found = search({ items: [view.scenegraph().root] }, 0, 0);
  const left = box.x + window.scrollX + view.padding().left + view.origin()[0];
  const top = box.y + window.scrollY + view.padding().top + view.origin()[1];
  return found && [left + found[0], top + found[1]];
}"""

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


def opened(browser, path, scheme="light"):
    context = browser.new_context(color_scheme=scheme, offline=True, viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.complaints, page.requested = [], []
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("request", lambda request: page.requested.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-drawn]", timeout=60_000)
    return page


def hovered(page, name, **wanted):
    """The rows of the tooltip over the item of a picture that has the wanted values."""
    place = page.evaluate(FIND_ITEM, [name, wanted])
    assert place, f"no item with {wanted} in {name}"
    page.mouse.move(0, 0)
    page.evaluate("([x, y]) => window.scrollTo(0, y - 400)", place)
    x, y = place[0] - page.evaluate("window.scrollX"), place[1] - page.evaluate("window.scrollY")
    page.mouse.move(x - 1, y)
    page.mouse.move(x, y)
    page.wait_for_selector("#vg-tooltip-element.visible", timeout=5000)
    cells = page.eval_on_selector_all("#vg-tooltip-element td", "cells => cells.map(cell => cell.textContent)")
    return dict(zip((key.rstrip(":") for key in cells[::2]), cells[1::2], strict=True))


def overflowing(page):
    """The pictures that are wider than their place."""
    wide = "boxes => boxes.filter(box => box.scrollWidth > box.clientWidth).map(box => box.ariaLabel)"
    return page.eval_on_selector_all(".picture", wide)


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
    assert page.get_attribute("html", "data-drawn").split() == list(NAMES)


def test_every_picture_is_there_and_has_something_in_it(page):
    for name in NAMES:
        box = page.locator(f"#{name}-drawing").locator("canvas, svg").bounding_box()
        assert box["width"] > 900
        assert box["height"] > 250
    for name in NAMES[1:]:
        assert page.locator(f"#{name}-drawing svg .mark-symbol path").count() > 100
    colours = page.evaluate("""() => {
      const canvas = document.querySelector("#channels-drawing canvas");
      const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
      return new Set(new Uint32Array(data.buffer)).size;
    }""")
    assert colours > 200
    assert overflowing(page) == []


def test_hovering_over_a_planted_channel_names_it_with_its_figure_and_its_input(page, report):
    for channel in PLANTED:
        group = next(g for g in report.groups if g.group == "model.layers.7.self_attn.q_proj")
        shown = hovered(page, "channels", group=group.group, channel=channel)
        assert shown["channel"].split()[0] == str(channel)
        assert float(shown["largest |x|"]) == pytest.approx(group.abs_max[channel], rel=1e-3)
        assert (shown["block"], shown["input"]) == ("7", group.group)
    shown = hovered(page, "channels", b=SPIKE_BLOCK, channel=SPIKE_CHANNEL)
    assert float(shown["largest |x|"]) == SPIKE
    assert shown["channel"] == "1101 (largest of 1100–1103)"


def test_the_cell_of_a_planted_channel_is_brighter_than_its_surroundings(page):
    def colour(channel):
        group = "model.layers.7.self_attn.q_proj"
        x, y = page.evaluate(FIND_ITEM, ["channels", {"group": group, "from": channel - channel % 2}])
        return page.evaluate(
            """([x, y]) => {
              const canvas = document.querySelector("#channels-drawing canvas");
              const box = canvas.getBoundingClientRect();
              const [left, top] = [x - window.scrollX - box.x, y - window.scrollY - box.y];
              const [r, g, b] = canvas.getContext("2d").getImageData(Math.floor(left), Math.floor(top), 1, 1).data;
              return [r, g, b];
            }""",
            [x, y],
        )

    for channel in PLANTED:
        assert luminance(colour(channel)) > 3 * max(luminance(colour(channel + away)) for away in (-20, 20))


def test_hovering_works_in_the_other_pictures(page, report):
    group = next(g for g in report.groups if g.group == f"model.layers.{SPIKE_BLOCK}.mlp.down_proj")
    shown = hovered(page, "sorted", group=group.group, rank=1)
    assert (shown["channel"], float(shown["largest |x|"]), shown["input"]) == (str(SPIKE_CHANNEL), SPIKE, group.group)

    entry = next(e for e in report.blocks[12].massive if e.position == 41)
    shown = hovered(page, "massive", b=12, position=41, channel=entry.channel)
    assert (shown["token"], shown["position"], shown["channel"]) == (repr(entry.text), "41", str(entry.channel))
    assert float(shown["value"]) == pytest.approx(entry.value, rel=1e-3)

    shown = hovered(page, "errors", group=group.group)
    percent = float(shown["error"].rstrip("%"))
    assert percent == pytest.approx(100 * group.errors["w8a8"], rel=0.05)
    assert (shown["remedy"], shown["danger"]) == (group.remedy, "dangerous")


def test_all_text_has_enough_contrast(page):
    found = page.evaluate(TEXT_COLOURS)
    assert len(found) > 300
    assert sum(text.startswith("input of") for text, *_ in found) == 8  # SVG text is among them
    assert [(text, one, other) for text, one, other in found if contrast(one, other) < CONTRAST] == []
    # Labels on the canvas take the page's own colours.
    for name, variable in (("ink", "--ink"), ("muted", "--muted")):
        value = page.evaluate(f"getComputedStyle(document.documentElement).getPropertyValue('{variable}').trim()")
        assert page.evaluate(f"window.pictures.channels.signal('{name}')") == value


def test_the_pictures_follow_a_change_of_theme(browser, written):
    page = opened(browser, written, "light")
    light = page.evaluate("window.pictures.massive.signal('ink')")
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("light => window.pictures.massive.signal('ink') !== light", arg=light)
    page.context.close()


def test_a_dark_page_prints_dark_on_white_and_is_dark_again_afterwards(browser, written):
    page = opened(browser, written, "dark")
    dark = page.evaluate("window.pictures.sorted.signal('ink')")
    page.evaluate("""() => {
      window.printed = [];
      window.addEventListener("beforeprint", () => {
        const label = document.querySelector("#sorted-drawing svg .role-axis-label text");
        window.printed.push(getComputedStyle(label).fill, window.pictures.sorted.signal("ink"));
      });
    }""")
    page.emulate_media(media="print")
    background, ink = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    page.emulate_media(media="screen")
    assert (background, contrast(*([int(c) for c in text[4:-1].split(",")] for text in (background, ink))) > 10) == (
        "rgb(255, 255, 255)",
        True,
    )
    content = page.pdf(format="A4", print_background=True)
    assert content[:5] == b"%PDF-"
    fill, signal = page.evaluate("window.printed")
    assert contrast([int(c) for c in fill[4:-1].split(",")], (255, 255, 255)) >= CONTRAST
    assert signal != dark
    page.wait_for_function("dark => window.pictures.sorted.signal('ink') === dark", arg=dark)
    page.context.close()


def test_pictures_scroll_inside_the_page_on_a_narrow_screen(browser, written):
    page = opened(browser, written)
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.context.close()


def test_texts_with_scripts_in_them_do_not_run_not_even_in_a_tooltip(browser, report, tmp_path):
    outlier_page.write_page(hostile(report), tmp_path / "page.html")
    page = opened(browser, tmp_path / "page.html")
    shown = hovered(page, "massive", b=3, position=0)
    assert shown["token"] == repr(SCRIPT)
    hovered(page, "channels", b=0)
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    assert page.title() == f"Outliers in {SCRIPT}"
    assert page.complaints == []
    page.context.close()


def test_a_seven_billion_model_opens_in_reasonable_time(browser, tmp_path):
    path = tmp_path / "page.html"
    outlier_page.write_page(outlier_report(blocks=32, hidden=4096, intermediate=11008), path)
    page = opened(browser, path)
    loaded = page.evaluate("performance.getEntriesByType('navigation')[0].domInteractive")
    assert page.complaints == []
    assert overflowing(page) == []
    assert loaded < 10_000
    page.context.close()
