"""The gate keeps to its limits and shows all of them when one fails."""

import pytest

from outlierq.core.errors import EXIT_GATE, GateError, OutlierqError
from outlierq.evaluate.divergence import Divergence
from outlierq.evaluate.gate import check_gate, raise_if_failed

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


def test_only_limits_that_are_given_are_checked():
    assert check_gate(MEASURED) == []
    assert [row.value for row in check_gate(MEASURED, max_kl=0.1, min_top1=0.5)] == [0.02, 0.9]


def test_a_value_at_its_limit_passes():
    rows = check_gate(MEASURED, max_kl=0.02, max_perplexity_increase=0.0500001, min_top1=0.9)
    assert all(row.passed for row in rows)
    raise_if_failed(rows)


def test_a_failed_gate_shows_every_limit():
    rows = check_gate(MEASURED, max_kl=0.01, max_perplexity_increase=0.1, min_top1=0.95)
    assert [row.passed for row in rows] == [False, True, False]
    with pytest.raises(GateError, match="2 of 3 quality limits failed") as raised:
        raise_if_failed(rows)
    assert raised.value.exit_code == EXIT_GATE
    for figure in ("0.02 <= 0.01", "0.05 <= 0.1", "0.9 >= 0.95"):
        assert figure in raised.value.what


def test_a_gate_without_a_reference_says_what_is_missing():
    alone = Divergence(tokens=1, windows=1, window_length=2, perplexity=5.0, seconds=0.1)
    with pytest.raises(OutlierqError, match="KL divergence per token"):
        check_gate(alone, max_kl=0.1)
