"""The gate keeps to its limits, reads them as people write them, and shows all of them when one fails."""

from xml.etree import ElementTree

import pytest

from outlierq.core.errors import EXIT_GATE, GateError, OutlierqError
from outlierq.core.limits import GateRow, Limits, TaskLimit, raise_if_failed, share
from outlierq.evaluate.divergence import Divergence
from outlierq.evaluate.gate import check_gate
from outlierq.report.ci.junit import junit_xml

MEASURED = Divergence(
    tokens=100,
    windows=2,
    window_length=51,
    perplexity=10.5,
    seconds=1.0,
    reference_perplexity=10.0,
    kl_per_token=0.02,
    kl_standard_error=0.001,
    top1_agreement=0.9,
    flips_to_wrong=5,
    flips_to_right=2,
)


def scores(**tasks):
    """Tasks as `run_tasks` returns them: name -> {metric: value}."""
    rows = [{"task": t, "metric": m, "value": v} for t, metrics in tasks.items() for m, v in metrics.items()]
    return {"rows": rows}


RESULTS = {
    "divergence": MEASURED.to_dict(),
    "tasks": scores(mmlu={"acc": 0.40}, arc_easy={"acc": 0.6, "acc_norm": 0.55}, wikitext={"word_perplexity": 33.0}),
    "reference_tasks": scores(mmlu={"acc": 0.41}, arc_easy={"acc": 0.6, "acc_norm": 0.60}),
}


def task_rows(*texts):
    return check_gate(RESULTS, Limits(min_task=tuple(map(TaskLimit.parse, texts))))


def test_only_limits_that_are_given_are_checked():
    assert check_gate(RESULTS, Limits()) == [] and not Limits()
    assert [row.value for row in check_gate(RESULTS, Limits(max_kl=0.1, min_top1=0.5))] == [0.02, 0.9]


def test_a_value_at_its_limit_passes():
    rows = check_gate(RESULTS, Limits(max_kl=0.02, max_perplexity_increase=0.0500001, min_top1=0.9))
    assert all(row.passed for row in rows)
    raise_if_failed(rows)


def test_a_failed_gate_shows_every_limit():
    rows = check_gate(RESULTS, Limits(max_kl=0.01, max_perplexity_increase=0.1, min_top1=0.95))
    assert [row.passed for row in rows] == [False, True, False]
    with pytest.raises(GateError, match="2 of 3 quality limits failed") as raised:
        raise_if_failed(rows)
    assert raised.value.exit_code == EXIT_GATE
    for figure in ("0.02 <= 0.01", "0.05 <= 0.1", "0.9 >= 0.95"):
        assert figure in raised.value.what


def test_a_gate_without_a_reference_says_what_is_missing():
    alone = Divergence(tokens=1, windows=1, window_length=2, perplexity=5.0, seconds=0.1)
    with pytest.raises(OutlierqError, match="KL divergence per token"):
        check_gate({"divergence": alone.to_dict()}, Limits(max_kl=0.1))


@pytest.mark.parametrize(
    ("limit", "value", "passed"),
    [
        ("mmlu:-1.0", -1.0, True),  # 40 % after 41 %, whatever floats make of it
        ("mmlu:-0.9", -1.0, False),
        ("mmlu:40", 40.0, True),
        ("mmlu:40.5", 40.0, False),
        ("arc_easy:-4", -5.0, False),  # acc_norm is the usual figure
        ("arc_easy/acc:-0", 0.0, True),
    ],
)
def test_a_task_is_judged_in_points_against_the_original_or_by_itself(limit, value, passed):
    (row,) = task_rows(limit)
    assert row.value == pytest.approx(value) and row.passed is passed and row.name.startswith(limit.split("/")[0][:4])


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("piqa:50", "`piqa` of the model, which was not run"),
        ("wikitext:50", "it has word_perplexity"),
        ("wikitext/word_perplexity:50", "max_perplexity_increase"),
        ("mmlu/f1:1", "no metric f1"),
    ],
)
def test_a_task_that_cannot_be_judged_is_an_error_not_a_pass(limit, message):
    with pytest.raises(OutlierqError) as raised:
        task_rows(limit)
    assert message in str(raised.value)


def test_a_change_needs_the_task_of_the_original():
    with pytest.raises(OutlierqError, match="of the original, which was not run"):
        check_gate({"tasks": RESULTS["tasks"]}, Limits(min_task=(TaskLimit.parse("mmlu:-1"),)))


@pytest.mark.parametrize(("text", "value"), [("3%", 0.03), ("3 %", 0.03), ("0.03", 0.03), (0.03, 0.03), ("-50%", -0.5)])
def test_a_share_is_a_number_or_a_percentage(text, value):
    assert share(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "%", "three", "nan", "inf", True, "3%%"])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(ValueError, match="not a share"):
        share(text)


@pytest.mark.parametrize("text", ["mmlu", "mmlu:", ":-1", "mmlu:x", "mmlu:-101", "a b:1", "mmlu:--1"])
def test_what_is_no_limit_on_a_task_is_refused(text):
    with pytest.raises(ValueError, match=r"mmlu|points"):
        TaskLimit.parse(text)


@pytest.mark.parametrize("text", ["mmlu:-1", "mmlu:+0", "arc_easy/acc_norm:-2.5", "mmlu:40"])
def test_a_limit_on_a_task_is_written_as_it_is_read(text):
    assert TaskLimit.parse(str(TaskLimit.parse(text))) == TaskLimit.parse(text)
    assert str(TaskLimit.parse(text)) == text


def test_a_loss_of_nothing_is_a_change_and_no_score():
    assert TaskLimit.parse("mmlu:-0").relative and not TaskLimit.parse("mmlu:0").relative


def test_junit_has_a_case_for_every_limit_and_a_failure_for_every_failed_one():
    rows = [GateRow("KL <&>", 0.2, "<=", 0.1), GateRow("top-1", 0.99, ">=", 0.9)]
    root = ElementTree.fromstring(junit_xml(rows, "./out", 1.5))
    (suite,) = root.findall("testsuite")
    assert root.get("failures") == suite.get("failures") == "1" and suite.get("tests") == "2"
    failed, passed = suite.findall("testcase")
    assert failed.get("name") == "KL <&>" and "0.2 <= 0.1" in failed.find("failure").get("message")
    assert passed.find("failure") is None and passed.find("system-out").text == "0.99 >= 0.9"
