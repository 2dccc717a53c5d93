"""The outlier page: its figures are the report's, nothing from outside can run in it, and it needs no network."""

import base64
import hashlib
import json
import re
import shlex
import struct
import zlib
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from outlier_reports import PLANTED, SPIKE, SPIKE_BLOCK, SPIKE_CHANNEL, outlier_report

from outlierq.core.errors import OutputError
from outlierq.core.measured.outliers import MassiveEntry, OutlierReport
from outlierq.recipe.shipped import shipped
from outlierq.report.pages import drawing, outlier_page, outlier_pictures
from outlierq.report.pages.page import model_name

NAMES = ("channels", "massive", "errors")
SCRIPT = "</script><script>window.hacked = 1</script><img src=x onerror=window.hacked=1>"


class Page(HTMLParser):
    """The elements of a page, its text without scripts, and the content of each script."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self.words, self._within = [], [], [], None
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._within = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._within = None

    def handle_data(self, data):
        if self._within == "script":
            self.scripts[-1] += data
        elif self._within != "style":
            self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def report():
    return outlier_report()


@pytest.fixture(scope="module")
def page(report):
    return outlier_page.page(report)


@pytest.fixture(scope="module")
def parsed(page):
    return Page(page)


def hostile(report):
    """The report with a script in every text that a model or a user can choose."""
    group = replace(report.groups[0], group=SCRIPT, role=SCRIPT, sites=(SCRIPT,), reasons=(SCRIPT,), remedy=SCRIPT)
    group = replace(group, danger="watch", missing=(SCRIPT,), errors={SCRIPT.replace(" ", ""): 0.5})
    block = replace(report.blocks[3], massive=(MassiveEntry(3, 0, 0, 1, SCRIPT, 5, 900.0, 800.0),), missing=(SCRIPT,))
    words = {
        "model": SCRIPT,
        "fingerprint": SCRIPT,
        "statistics": SCRIPT,
        "summary": (SCRIPT, SCRIPT),
        "notes": (SCRIPT,),
    }
    return replace(report, groups=(group,), blocks=(block,), outlier_features={SCRIPT: (0.5, 0.5)}, **words)


def levels(panel):
    """uint8 [blocks, columns] that a page reads out of a map."""
    cells = panel.cells
    flat = np.frombuffer(base64.b64decode(cells["levels"]), np.uint8)
    return flat.reshape(len(cells["blocks"]), cells["columns"])


def test_ten_seconds_are_enough_where_how_bad_and_what_to_run(parsed, report):
    assert report.summary[0] in parsed.text
    where = re.search(r"Where mlp.gate_proj (\d+) of these (\d+), in blocks 0, 1, ", parsed.text)
    assert where is not None and 1 < int(where[1]) < int(where[2])
    assert where.start() < parsed.text.index("How bad 38 % of the output")
    assert "3 channels (78, 214, 423) stand out in most blocks" in parsed.text
    assert parsed.text.index("What to run") < parsed.text.index("Where the outliers are")
    assert (
        "outlierq quantize HuggingFaceTB/SmolLM2-135M-Instruct -r gptq-w4 -o SmolLM2-135M-Instruct-gptq-w4"
        in parsed.text
    )


def test_pictures_are_in_the_page_without_scripts_and_have_words_for_who_cannot_see_them(parsed):
    drawn = [a for a in parsed.all("svg") if a.get("role") == "img"]
    assert len(drawn) == 4 + 1 + 4 and all(len(a["aria-label"]) > 40 for a in drawn)
    assert [a["id"] for a in parsed.all("section") if a.get("id")] == list(NAMES)
    assert len(parsed.all("figcaption")) == 9 and len(parsed.all("image")) == 2 * 4
    assert len(parsed.scripts) == 1


def test_headings_regions_and_tables_can_be_walked_through(parsed, page):
    named = [a for a in parsed.all("section") if a.get("aria-labelledby")]
    assert {a["aria-labelledby"] for a in named} <= {a["id"] for _, a in parsed.elements if "id" in a}
    assert all(
        a.get("role") == "region" and a.get("aria-label") for a in parsed.all("div") if a.get("class") == "scroll"
    )
    assert all("scope" in a for a in parsed.all("th")) and parsed.all("html")[0]["lang"] == "en"
    assert len(parsed.all("h1")) == 1 and "null" not in parsed.text and "remedy none" not in parsed.text


def test_inputs_are_grouped_by_kind_the_most_dangerous_first_and_reasons_are_said_once(parsed, page):
    kinds = re.findall(r'<summary><span class="danger (\w+)">', page)
    assert kinds == ["dangerous", "dangerous", "dangerous", "calm"]
    assert len([a for a in parsed.all("tr") if a.get("title")]) == 120
    few = "a scale per token leaves 4 of 255 steps to the other channels"
    assert page.count(few) == 3, "once for each kind"
    assert re.search(few + r" <small>at worst, in block \d+; so in blocks 0, 1, ", page)


def test_every_remedy_says_what_it_would_leave_and_how_to_run_it(parsed, report):
    rows = [outlier_page._remedy_row(report, remedy) for remedy in outlier_page.REMEDIES]
    known = {row["key"]: row for row in rows if row}
    assert set(known) == {"w8a8", "w8a8 smoothquant", "w4a16"}
    plain = sorted(group.errors["w8a8"] for group in report.groups)
    assert known["w8a8"]["worst_error"] == plain[-1] and known["w8a8"]["dangerous"] == sum(e >= 0.01 for e in plain)
    for row in known.values():
        words = shlex.split(row["command"])
        assert words[:2] == ["outlierq", "quantize"] and words[words.index("-r") + 1] in shipped()
        assert row["command"] in parsed.text
    assert all(remedy.recipe in shipped() for remedy in outlier_page.REMEDIES)


def test_thresholds_stand_with_their_sources(parsed):
    assert "predicted error in W8A8 0.1 % 1 % measured for outlierq" in parsed.text
    assert "arXiv:2306.12929: clean models 3 to 20, others above 100" in parsed.text


def test_a_scheme_that_the_remedy_is_not_for_shows_its_own_best_remedy_by_name(report):
    errors = {"w8a8": 0.2, "w8a8 smoothquant": 0.02, "w4a16": 0.05, "w4a16 awq": 0.03, "w4a16 clip": 0.04}
    group = replace(report.groups[0], danger="dangerous", remedy="smoothquant", errors=errors)
    parsed = Page(outlier_page.page(replace(report, groups=(group, replace(group, danger="calm", remedy="")))))
    assert "20 % → 2 % 5 % → 3 % awq smoothquant" in parsed.text
    assert "20 % 5 % → 3 % awq not needed" in parsed.text


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("/home/me/models/SmolLM2-135M/", "SmolLM2-135M"),
        ("./SmolLM2-135M", "SmolLM2-135M"),
        ("/x/hub/models--Qwen--Qwen3-8B/snapshots/0af1", "Qwen/Qwen3-8B"),
        ("C:\\models\\llama.Q4_1.gguf", "llama.Q4_1"),
    ],
)
def test_a_headline_names_the_model_and_no_path(report, source, name):
    assert model_name(source) == name
    heading = re.search("<h1>(.*?)</h1>", outlier_page.page(replace(report, model=source, groups=())))[1]
    assert heading == name.rpartition("/")[2]


def test_notes_and_missing_measures_are_on_the_page_with_the_places(parsed):
    assert "because no --stats were given" in parsed.text
    assert (
        "not measured: hill_alpha: fewer than 50 rows in the reservoir (model.layers.0.self_attn.o_proj, "
        in parsed.text
    )
    assert "and 26 more)" in parsed.text


def test_nothing_on_the_page_points_outside(page, parsed):
    outward = ("src", "href", "srcset", "action", "data", "poster", "xlink:href")
    pointing = [a[name] for _, a in parsed.elements for name in outward if name in a]
    assert pointing and all(value.startswith("data:image/png;base64,") for value in pointing)
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_the_security_policy_names_exactly_the_script_and_forbids_the_rest(parsed):
    policy = next(a["content"] for a in parsed.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "unsafe-eval" not in policy
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in parsed.scripts]
    assert len(hashes) == 1
    assert re.search("script-src ([^;]*)", policy)[1].split() == [f"'sha256-{value}'" for value in hashes]


def test_texts_with_scripts_in_them_stay_texts(report):
    parsed = Page(outlier_page.page(hostile(report)))
    assert len(parsed.scripts) == 1
    assert parsed.all("img") == []
    assert [a for _, a in parsed.elements if any(name.startswith("on") for name in a)] == []
    assert parsed.text.count(SCRIPT) >= 8


@pytest.mark.parametrize("size", [(30, 576, 1536), (80, 8192, 28672)])
def test_the_page_stays_under_three_megabytes_for_small_and_large_models(size):
    assert len(outlier_page.page(outlier_report(*size)).encode()) < 3_000_000


def test_colour_is_the_ratio_to_the_median_of_the_panel_and_a_column_shows_its_largest_channel():
    report = outlier_report(blocks=3, hidden=4096, intermediate=11008)
    quiet = replace(report, groups=tuple(replace(g, abs_max=tuple(v / 1e4 for v in g.abs_max)) for g in report.groups))
    for loud_panel, panel in zip(*(outlier_pictures.channel_map(r).panels for r in (report, quiet)), strict=True):
        assert (levels(loud_panel) == levels(panel)).mean() > 0.999, "an input that is quiet everywhere looks the same"
    panel = outlier_pictures.channel_map(report).panels[0]
    cells, width = levels(panel), panel.cells["width"]
    values = np.array([group.abs_max for group in report.groups if group.role == "self_attn.q_proj"])
    assert cells.shape == (3, -(-values.shape[1] // width)) and cells.shape[1] <= outlier_pictures.COLUMNS
    ratios = values / np.median(values)
    for channel in PLANTED:
        shown = panel.cells["top"] ** (cells[:, channel // width] / 255)
        assert shown == pytest.approx(ratios[:, channel], rel=0.05)
    spike = outlier_pictures.channel_map(report).panels[3]
    assert levels(spike)[SPIKE_BLOCK, SPIKE_CHANNEL // spike.cells["width"]] == 255
    assert f"in block {SPIKE_BLOCK}, channel {SPIKE_CHANNEL}" in spike.remark and SPIKE > 1000


def test_the_pixels_of_a_map_are_those_of_its_cells():
    cells = np.array([[0, 3, 1], [2, 2, 0]], np.uint8)
    content = drawing.png(cells, drawing.ramp(drawing.LIGHT))
    assert struct.unpack(">II", content[16:24]) == (3, 2)
    data = content[content.index(b"IDAT") + 4 :]
    lines = np.frombuffer(zlib.decompress(data), np.uint8).reshape(2, 4)
    assert (lines[:, 1:] == cells).all() and not lines[:, 0].any()


def test_of_several_experts_in_a_block_the_largest_value_counts(report):
    calm = report.groups[3]
    loud = replace(calm, group="experts.7", abs_max=tuple(900.0 if k == 5 else 0.01 for k in range(len(calm.abs_max))))
    panel = outlier_pictures.channel_map(replace(report, groups=(calm, loud))).panels[0]
    assert levels(panel).shape[0] == 1 and levels(panel).argmax() == 5 // panel.cells["width"]


def test_massive_activations_are_a_map_of_channels_and_blocks_with_the_largest_at_each_place(report):
    (panel,) = outlier_pictures.massive_map(report).panels
    places = {(e.block, e.channel) for block in report.blocks for e in block.massive}
    assert panel.drawing.count("<circle") == len(places)
    largest = max((e for block in report.blocks for e in block.massive), key=lambda e: abs(e.value))
    assert f"{largest.value:,.0f} after block {largest.block}, channel {largest.channel}" in panel.remark


def test_the_error_picture_shows_every_input_before_and_after_its_remedy(report):
    panels = outlier_pictures.error_chart(report).panels
    drawn = "".join(panel.drawing for panel in panels)
    helped = [group for group in report.groups if group.remedy]
    assert len(panels) == 4 and drawn.count("<circle") == len(report.groups) + len(helped)
    worst = max(report.groups, key=lambda group: group.errors["w8a8"])
    assert f"{worst.group}: 38\u202f%, 4.2\u202f% with {worst.remedy}" in drawn


def test_a_report_without_values_says_so_in_place_of_each_picture(report, tmp_path):
    empty = replace(report, groups=(), blocks=(), summary=(), outlier_channels=(), outlier_features={}, notes=())
    text = outlier_page.page(empty)
    assert text.count('<p class="absent">') == 3 and "Every input is calm." in text
    assert outlier_page.write_pictures(empty, tmp_path) == []


def test_values_that_are_not_finite_or_zero_leave_gaps(report):
    odd = (float("nan"), float("inf"), 0.0, 3.5)
    group = replace(report.groups[0], abs_max=odd, errors={"w8a8": float("nan")}, danger="watch", measures={})
    text = outlier_page.page(replace(report, groups=(group, *report.groups[4:])))
    assert not re.search(r"\b(nan|inf|None|null)\b", re.sub("<(style|script)>.*?</\\1>", "", text, flags=re.S))
    alone = outlier_page.page(replace(report, groups=(group,)))
    assert "The report holds no predicted errors." in alone and "up to 1× the median" in alone


def test_a_report_read_back_from_json_gives_the_same_pictures(report):
    again = OutlierReport.from_dict(json.loads(json.dumps(report.to_dict())))
    assert outlier_pictures.pictures(again) == outlier_pictures.pictures(report)


def test_pictures_are_png_files_at_twice_the_size(tmp_path):
    report = outlier_report(blocks=4, hidden=64, intermediate=96)
    paths = outlier_page.write_pictures(report, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == [f"outliers-{name}.png" for name in NAMES]
    for path, columns in zip(paths, (2, 1, 2), strict=True):
        content = path.read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">I", content[16:20])[0] == 2 * (
            columns * drawing.WIDTH + (columns + 1) * outlier_page.GAP
        )


def test_words_of_a_png_file_go_on_in_the_next_line_and_none_is_cut(report):
    long = replace(report, model="an-organisation/" + "A-Long-Name-" * 12)
    for picture in outlier_pictures.pictures(long, drawing.PAPER):
        drawn = outlier_page.sheet(picture, long.model)
        rows = re.findall(r'<text x="([\d.]+)" [^>]*>([^<]*)</text>', drawn)
        width = float(re.search(r'viewBox="0 0 (\d+)', drawn)[1])
        assert rows and all(float(x) + len(words) * 5.9 <= width for x, words in rows if float(x) >= outlier_page.GAP)
        assert "block" in drawn


def test_a_page_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path, report, monkeypatch):
    monkeypatch.setattr(outlier_page, "page", lambda report: "text")
    (tmp_path / "taken.html").mkdir()
    with pytest.raises(OutputError, match=r"cannot write .*taken\.html \(4 bytes\)"):
        outlier_page.write_page(report, tmp_path / "taken.html")
    assert [path.name for path in tmp_path.iterdir()] == ["taken.html"]
    outlier_page.write_page(report, tmp_path / "made" / "page.html")
    assert (tmp_path / "made" / "page.html").read_text() == "text"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (float("nan"), "–"), (0.0012345, "0.00123"), (12.34, "12.3"), (21430.4, "21,430")],
)
def test_figures_have_three_digits_and_a_dash_for_what_is_unknown(value, text):
    assert outlier_page.figure_of(value) == text


@pytest.mark.parametrize(
    ("share", "text"), [(None, "–"), (0.0042, "0.42\u202f%"), (0.123, "12\u202f%"), (13.0, "1,300\u202f%")]
)
def test_shares_are_written_as_percentages(share, text):
    assert outlier_page.percent(share) == text
