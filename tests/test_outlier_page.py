"""The outlier page: its figures are the report's, nothing from outside can run in it, and it needs no network."""

import base64
import hashlib
import json
import re
import struct
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from outlier_reports import PLANTED, SPIKE, SPIKE_BLOCK, SPIKE_CHANNEL, outlier_report

from outlierq.core.errors import OutputError
from outlierq.core.measured.outliers import MassiveEntry, OutlierReport
from outlierq.report.pages import outlier_charts, outlier_page, outlier_panels

NAMES = ("channels", "sorted", "massive", "errors")
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


def specifications(parsed):
    return json.loads(parsed.scripts[0])


def rows(specification):
    """The data of each panel of a picture."""
    panels = specification.get("vconcat") or specification.get("concat") or [specification]
    return [panel["data"]["values"] for panel in panels]


def test_the_page_holds_the_four_pictures_each_with_a_title_a_caption_and_words_for_who_cannot_see_it(parsed):
    assert tuple(figure["id"] for figure in parsed.all("figure")) == NAMES
    drawings = [a for a in parsed.all("div") if a.get("class") == "drawing"]
    assert [a["id"] for a in drawings] == [f"{name}-drawing" for name in NAMES]
    assert all(a["role"] == "img" and len(a["aria-label"]) > 40 for a in drawings)
    assert len(parsed.all("figcaption")) == 4
    assert list(specifications(parsed)) == list(NAMES)


def test_headline_and_cards_say_what_the_report_says(parsed, report):
    assert all(sentence in parsed.text for sentence in report.summary)
    dangerous = [group for group in report.groups if group.danger == "dangerous"]
    assert f"Dangerous inputs {len(dangerous)} of 120" in parsed.text
    assert "Outlier channels 3 channels 78, 214, 423" in parsed.text
    assert "Massive tokens 7 " in parsed.text  # position 0 of four sequences and three tokens of one
    worst = max(report.groups, key=lambda group: group.errors["w8a8"])
    assert f"Worst predicted W8A8 error {worst.errors['w8a8']:.0%}".replace("%", " %") in parsed.text
    assert "128 sequences of 512 tokens" in parsed.text


def test_the_table_lists_dangerous_inputs_first_and_tucks_calm_ones_away(page, report):
    order = re.findall(r'class="danger (\w+)"', page)
    assert len(order) == len(report.groups)
    assert order == sorted(order, key=("dangerous", "watch", "calm").index)
    assert page.index("<details>") < page.index('class="danger calm"')
    assert "a scale per token leaves 4 of 255 steps to the other channels" in page


def test_a_scheme_that_the_remedy_is_not_for_shows_its_own_best_remedy_by_name(report):
    errors = {"w8a8": 0.2, "w8a8 smoothquant": 0.02, "w4a16": 0.05, "w4a16 awq": 0.03, "w4a16 clip": 0.04}
    group = replace(report.groups[0], danger="dangerous", remedy="smoothquant", errors=errors)
    parsed = Page(outlier_page.page(replace(report, groups=(group, replace(group, danger="calm", remedy="")))))
    assert "20 % → 2 % 5 % → 3 % awq smoothquant" in parsed.text
    assert "20 % 5 % → 3 % awq –" in parsed.text


def test_notes_and_missing_measures_are_on_the_page_with_the_places(parsed):
    assert "because no --stats were given" in parsed.text
    assert "hill_alpha: fewer than 50 rows in the reservoir (model.layers.0.self_attn.o_proj, " in parsed.text
    assert "and 26 more)" in parsed.text


def test_nothing_on_the_page_points_outside(page, parsed):
    outward = ("src", "href", "srcset", "action", "data", "poster", "xlink:href")
    assert [a for _, a in parsed.elements if any(name in a for name in outward)] == []
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_the_security_policy_names_exactly_the_two_scripts_and_forbids_the_rest(parsed):
    policy = next(a["content"] for a in parsed.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "unsafe-eval" not in policy
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in parsed.scripts[1:]]
    assert len(hashes) == 2
    assert re.search("script-src ([^;]*)", policy)[1].split() == [f"'sha256-{value}'" for value in hashes]


def test_texts_with_scripts_in_them_stay_texts(report):
    parsed = Page(outlier_page.page(hostile(report)))
    assert len(parsed.scripts) == 3
    assert parsed.all("img") == []
    assert [a for _, a in parsed.elements if any(name.startswith("on") for name in a)] == []
    assert parsed.text.count(SCRIPT) >= 8
    assert rows(specifications(parsed)["massive"])[0][0]["text"] == repr(SCRIPT)


@pytest.mark.parametrize("size", [(30, 576, 1536), (32, 4096, 11008), (80, 8192, 28672)])
def test_the_page_stays_under_three_megabytes_for_small_and_large_models(size, page):
    pictures = {picture.name: picture.spec for picture in outlier_charts.pictures(outlier_report(*size))}
    fixed = len(page.encode()) - len(Page(page).scripts[0].encode())
    assert fixed + len(json.dumps(pictures, separators=(",", ":"))) < 3_000_000


def test_a_column_of_the_heat_map_shows_its_largest_channel_by_its_true_number():
    report = outlier_report(blocks=3, hidden=4096, intermediate=11008)
    panels = rows(outlier_charts.channel_map(report).spec)
    assert [len(panel) for panel in panels] == [3, 3, 3, 3]
    by_name = {group.group: group.abs_max for group in report.groups}
    for row in (row for panel in panels for row in panel):
        values = by_name[row["names"][0]]
        assert row["k"] == len(values)
        assert len(row["v"]) == -(-len(values) // row["w"]) <= outlier_charts.COLUMNS
        for column, (value, channel) in enumerate(zip(row["v"], row["c"], strict=True)):
            members = values[column * row["w"] : (column + 1) * row["w"]]
            assert value == pytest.approx(max(members), rel=1e-3)
            assert channel == column * row["w"] + members.index(max(members))
    assert all(set(PLANTED) <= set(row["c"]) for row in panels[0])
    assert SPIKE_CHANNEL in panels[3][SPIKE_BLOCK]["c"]
    assert max(panels[3][SPIKE_BLOCK]["v"]) == SPIKE


def test_a_cell_of_several_experts_names_the_one_with_the_largest_value(report):
    calm, loud = report.groups[3], replace(report.groups[3], group="model.layers.0.mlp.experts.7.down_proj")
    channel = calm.abs_max.index(min(calm.abs_max))
    loud = replace(loud, abs_max=tuple(900.0 if k == channel else 0.01 for k in range(len(calm.abs_max))))
    both = replace(report, groups=(calm, loud))
    (row,) = rows(outlier_charts.channel_map(both).spec)[0]
    at = row["c"].index(channel)
    assert (row["names"][row["n"][at]], row["v"][at]) == (loud.group, 900.0)
    assert {row["names"][n] for column, n in enumerate(row["n"]) if column != at} == {calm.group}
    assert "(1 of 2 inputs)" in outlier_charts.sorted_maxima(both).how_to_read


def test_sorted_curves_start_at_the_largest_channel_and_never_rise(report):
    curves = [curve for panel in rows(outlier_charts.sorted_maxima(report).spec) for curve in panel]
    by_name = {group.group: group.abs_max for group in report.groups}
    assert {curve["group"] for curve in curves} == set(by_name)
    assert len(curves) == len(by_name)
    for curve in curves:
        values = by_name[curve["group"]]
        expected = sorted(values, reverse=True)
        assert (curve["rank"][0], curve["rank"][-1]) == (1, len(expected))
        assert curve["value"] == pytest.approx([expected[rank - 1] for rank in curve["rank"]], rel=1e-3)
        assert [values[k] for k in curve["channel"]] == [expected[rank - 1] for rank in curve["rank"]]


def test_massive_activations_of_several_sequences_at_one_place_are_one_circle(report):
    circles = rows(outlier_charts.massive_map(report).spec)[0]
    places = {(e.block, e.position, e.channel) for block in report.blocks for e in block.massive}
    assert {(row["b"], row["position"], row["channel"]) for row in circles} == places
    assert len(circles) == len(places)
    first = next(row for row in circles if (row["b"], row["position"], row["channel"]) == (5, 0, 423))
    values = [e.value for e in report.blocks[5].massive if (e.position, e.channel) == (0, 423)]
    assert (first["sequences"], first["value"]) == (4, pytest.approx(max(values), rel=1e-3))


def test_circles_that_are_left_out_are_counted_in_the_caption(report, monkeypatch):
    monkeypatch.setattr(outlier_charts, "MOST_MASSIVE", 10)
    picture = outlier_charts.massive_map(report)
    assert len(rows(picture.spec)[0]) == 10
    assert re.search(r"Only the largest 10 of \d+ are drawn", picture.how_to_read)


def test_the_error_picture_shows_every_input_before_and_after_its_remedy(report):
    drawn = {row["group"]: row for panel in rows(outlier_charts.error_chart(report).spec) for row in panel}
    assert len(drawn) == len(report.groups)
    for group in report.groups:
        assert drawn[group.group]["before"] == pytest.approx(group.errors["w8a8"], rel=1e-3)
        after = group.errors.get(f"w8a8 {group.remedy}")
        assert drawn[group.group]["after"] == (None if after is None else pytest.approx(after, rel=1e-3))


def test_a_report_without_values_says_so_in_place_of_each_picture(report, tmp_path):
    empty = replace(report, groups=(), blocks=(), summary=(), outlier_channels=(), outlier_features={}, notes=())
    text = outlier_page.page(empty)
    assert text.count('<p class="absent">') == 4
    assert specifications(Page(text)) == {}
    assert "None: every input is calm." in text
    assert outlier_page.write_pictures(empty, tmp_path) == []


def test_values_that_are_not_finite_or_zero_leave_gaps_and_no_broken_json(report):
    odd = (float("nan"), float("inf"), 0.0, 3.5)
    group = replace(report.groups[0], abs_max=odd, errors={"w8a8": float("nan")}, danger="watch")
    odd_report = replace(report, groups=(group, *report.groups[1:]))
    shown = specifications(Page(outlier_page.page(odd_report)))
    assert [row["value"] for row in rows(shown["sorted"])[0] if row["group"] == group.group] == [[3.5]]
    assert group.group not in {row["group"] for row in rows(shown["errors"])[0]}


def test_a_report_read_back_from_json_gives_the_same_pictures(report):
    again = OutlierReport.from_dict(json.loads(json.dumps(report.to_dict())))
    assert outlier_charts.pictures(again) == outlier_charts.pictures(report)


def test_pictures_are_png_files_at_twice_the_size(tmp_path):
    import vl_convert

    report = outlier_report(blocks=4, hidden=64, intermediate=96)
    paths = outlier_page.write_pictures(report, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == [f"outliers-{name}.png" for name in NAMES]
    for path, picture in zip(paths, outlier_charts.pictures(report), strict=True):
        content = path.read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", content[16:24])
        plain = vl_convert.vegalite_to_svg(json.dumps({**picture.spec, "padding": 16}))
        drawn = [float(value) for value in re.search(r'width="([\d.]+)" height="([\d.]+)"', plain).groups()]
        assert width == pytest.approx(2 * drawn[0], abs=4)
        assert height == pytest.approx(2 * (drawn[1] + 50), abs=40)  # and a title of two lines
        assert width > 2 * 0.9 * outlier_panels.WIDTH


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
    [(None, "–"), (float("nan"), "–"), (0.0012345, "0.00123"), (12.34, "12.3"), (21430.4, "21\u202f430")],
)
def test_figures_have_three_digits_and_a_dash_for_what_is_unknown(value, text):
    assert outlier_page.figure(value) == text


@pytest.mark.parametrize(
    ("share", "text"), [(None, "–"), (0.0042, "0.42\u202f%"), (0.123, "12\u202f%"), (13.0, "1,300\u202f%")]
)
def test_shares_are_written_as_percentages(share, text):
    assert outlier_page.percent(share) == text
