"""Collected statistics against float64 references."""

from __future__ import annotations

import pytest
import torch
from reference.statistics import tables_of

from outlierq.calibrate import collect as stage
from outlierq.calibrate.collect import ALL_FIELDS, Collector, Sequences, stored_fields, token_stride
from outlierq.core.errors import NumbersError, StatsError
from outlierq.core.model import InputGroup, LinearSite
from outlierq.ops.precision import matmul_operands

CHANNELS, LENGTH = 24, 10


class TwoLinears(torch.nn.Module):
    """A block of two sites: one reads [sequences, tokens, K], the other the same data as [tokens, K]."""

    def __init__(self):
        super().__init__()
        self.wide, self.flat = torch.nn.Linear(CHANNELS, 4), torch.nn.Linear(CHANNELS, 4)

    def forward(self, x):
        return self.wide(x).sum() + self.flat(x.reshape(-1, CHANNELS)).sum()


def group(name: str) -> InputGroup:
    return InputGroup(f"b.0.{name}", (LinearSite(f"b.0.{name}", f"b.0.{name}.weight", None, 4, CHANNELS, 0),))


IDS = torch.randint(0, 1000, (7, LENGTH), generator=torch.Generator().manual_seed(3))
GROUPS = (group("wide"), group("flat"))


def inputs(sequences: int, seed: int = 0, length: int = LENGTH) -> torch.Tensor:
    x = torch.randn(sequences, length, CHANNELS, generator=torch.Generator().manual_seed(seed))
    return x * torch.logspace(-1, 1, CHANNELS)


def collect(batches, needs=ALL_FIELDS, **settings):
    module = TwoLinears().to(batches[0].dtype)
    tokens = Sequences(LENGTH, settings.pop("skip_first_tokens", 0), settings.pop("ids", None))
    collector = Collector(module, GROUPS, needs, tokens, **settings)
    with torch.inference_mode(), collector:
        for batch in batches:
            module(batch)
    assert not any(part._forward_pre_hooks for part in module.modules())
    return collector.finish()


def reference(x: torch.Tensor, skip: int) -> dict[str, torch.Tensor]:
    """All sums in float64, the plain way. x: [sequences, tokens, K]."""
    x, first = x.double()[:, skip:], x.double()[:, 0]
    rows = x.reshape(-1, CHANNELS)
    tables = tables_of(x.numpy(), IDS[:, skip:].numpy(), stride=token_stride(LENGTH - skip, 3))
    tables["top_tokens"][:, 1] += skip
    return {
        **tables,
        "count_huge": (rows.abs() >= 20).sum(0).double(),
        "min": rows.amin(0),
        "max": rows.amax(0),
        "sum_x": rows.sum(0),
        "sum_abs": rows.abs().sum(0),
        "sum_sq": rows.pow(2).sum(0),
        "sum_cube": rows.pow(3).sum(0),
        "sum_fourth": rows.pow(4).sum(0),
        "count_large": (rows.abs() >= 6).sum(0).double(),
        "sequence_large": (x.abs() >= 6).double().mean(1).sum(0),
        "first_abs_max": first.abs().amax(0),
        "first_rows": first,
        "hessian": rows.T @ rows / len(rows),
    }


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).abs().max() / other.double().abs().max())


@pytest.mark.parametrize("skip", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_statistic_equals_its_float64_reference(skip, dtype):
    x = inputs(7).to(dtype)
    x[2, 7] = 0  # a token without a logarithm
    found = collect([x[:4], x[4:]], skip_first_tokens=skip, ids=IDS)
    expected = reference(x, skip)
    assert set(expected) | {"rows"} == ALL_FIELDS
    if skip:  # first tokens are left out
        del expected["first_rows"]
    for name in ("b.0.wide", "b.0.flat"):
        stats = found[name]
        assert (stats.tokens, stats.sequences) == (7 * (LENGTH - skip), 7)
        for field, value in expected.items():
            assert relative(stats.need(field), value) < 2e-6, field
        assert stats.sum_x.dtype == torch.float64 and stats.hessian.dtype == torch.float32


def test_the_tables_count_exactly_and_tokens_are_named():
    x = inputs(7)
    found = collect([x[:4], x[4:]], ids=IDS)["b.0.wide"]
    for field, expected in tables_of(x.numpy(), IDS.numpy(), stride=3).items():
        assert torch.equal(found.need(field), expected), field
    assert (found.log2_histogram.sum(1) == -(-found.tokens // 3)).all() and found.token_histogram.sum() == found.tokens
    assert (found.top_tokens[:, 4].abs().diff() <= 0).all()
    assert (collect([x])["b.0.wide"].top_tokens[:, 2] == -1).all()


def test_values_beyond_the_histogram_go_into_its_outer_bins(monkeypatch):
    monkeypatch.setattr(stage, "HISTOGRAM_STRIDE", 1)
    x = torch.zeros(1, LENGTH, CHANNELS)
    x[0, :5, 0] = torch.tensor([2.0**-24, 2.0**-25, -(2.0**-23), 2.0**23, -(2.0**40)])
    found = collect([x])["b.0.wide"]
    assert found.log2_histogram[0].nonzero().flatten().tolist() == [0, 1, 47]
    assert found.log2_histogram[0, [0, 1, 47]].tolist() == [LENGTH - 3, 1, 2]
    assert found.token_histogram[[0, 63]].tolist() == [LENGTH - 2, 2]


@pytest.mark.parametrize("length", [1, 7, 16, 49, 512, 7 * 8 * 9 * 11])
def test_a_sample_of_tokens_visits_every_position(length):
    stride = token_stride(length, 7)
    assert {(number * stride) % length for number in range(length)} == set(range(length))
    assert 7 <= stride <= 13


def test_long_sequences_are_summed_in_pieces(monkeypatch):
    x = inputs(3)
    whole = collect([x])["b.0.wide"]
    monkeypatch.setattr(stage, "CHUNK_ELEMENTS", 4 * CHANNELS)
    pieces = collect([x])["b.0.wide"]
    assert all(relative(pieces.need(field), whole.need(field)) < 1e-6 for field in ALL_FIELDS)


def test_halves_merge_to_the_whole():
    x = inputs(6)
    whole = collect([x])["b.0.wide"]
    one, two, three = (collect([part])["b.0.wide"] for part in (x[:2], x[2:3], x[3:]))
    # Each part samples its own tokens, so the histogram of the parts is of other tokens than that of the whole.
    left, right = one.merge(two).merge(three), one.merge(two.merge(three))
    assert torch.equal(left.log2_histogram, right.log2_histogram)
    assert torch.equal(left.log2_histogram, one.log2_histogram + two.log2_histogram + three.log2_histogram)
    for merged in (left, right):
        assert (merged.tokens, merged.sequences) == (whole.tokens, whole.sequences)
        assert all(relative(merged.need(f), whole.need(f)) < 1e-6 for f in ALL_FIELDS - {"rows", "log2_histogram"})


def test_only_the_statistics_needed_are_kept():
    stats = collect([inputs(2)], {"mean", "abs_max"})["b.0.wide"]
    assert set(stats.tensors()) == {"sum_x", "min", "max"}
    assert torch.equal(stats.abs_max, inputs(2).abs().amax((0, 1)))
    assert stored_fields({"abs_mean", "hessian"}) == {"sum_abs", "hessian", "first_rows"}
    with pytest.raises(StatsError, match=r"unknown statistics \['hesian'\]"):
        stored_fields({"hesian"})


def test_the_reservoir_holds_whole_tokens_chosen_by_seed():
    x = inputs(8).bfloat16()
    found = collect([x[:3], x[3:]], reservoir=12, seed=1)
    rows = found["b.0.wide"].rows
    assert rows.shape == (12, CHANNELS) and rows.dtype == torch.bfloat16
    places = [int((x.reshape(-1, CHANNELS) == row).all(1).nonzero()[0]) for row in rows]
    assert places == sorted(places) and len(set(places)) == 12
    assert torch.equal(rows, found["b.0.flat"].rows)
    assert torch.equal(rows, collect([x[:3], x[3:]], reservoir=12, seed=1)["b.0.wide"].rows)
    assert not torch.equal(rows, collect([x[:3], x[3:]], reservoir=12, seed=2)["b.0.wide"].rows)


def test_the_reservoir_gives_every_token_the_same_chance():
    x = torch.arange(40.0).repeat(CHANNELS, 1).T.reshape(4, LENGTH, CHANNELS)
    counts = torch.zeros(40)
    for seed in range(300):
        kept = collect([x[:1], x[1:]], {"rows"}, reservoir=10, seed=seed)["b.0.wide"].rows[:, 0].long()
        counts[kept] += 1
    assert counts.sum() == 3000
    assert counts.min() > 45 and counts.max() < 105  # 75 expected, standard deviation 7.5


def test_a_reservoir_larger_than_the_text_keeps_everything():
    x = inputs(2).bfloat16()
    assert torch.equal(collect([x[:1], x[1:]], {"rows"})["b.0.wide"].rows, x.reshape(-1, CHANNELS))


def test_statistics_can_be_changed_outside_of_inference_mode():
    stats = collect([inputs(2)])["b.0.wide"]
    assert not any(value.is_inference() for name, value in stats.tensors().items() if name != "rows")
    stats.hessian.add_(1)


def test_the_settings_of_matrix_products_are_restored():
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    with pytest.raises(RuntimeError), matmul_operands(torch.bfloat16):
        assert matmul.fp32_precision == "bf16"
        raise RuntimeError
    assert matmul.fp32_precision == before


def test_routed_tokens_are_counted_without_positions():
    module = TwoLinears()
    collector = Collector(module, GROUPS[1:], ALL_FIELDS, Sequences(LENGTH, 1))
    with collector:
        module.flat(inputs(1, length=7)[0])
        module.flat(inputs(1, length=10)[0])
        module.flat(inputs(1, length=10)[0][:0])
    stats = collector.finish()["b.0.flat"]
    assert stats.tokens == 17 and stats.sequence_large is None and stats.first_abs_max is None
    assert stats.top_tokens is None and stats.token_histogram.sum() == 17
    assert collector.notes == [
        "b.0.flat: its tokens are routed, so first tokens are not left out and positions are not counted"
    ]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_names_the_site(bad):
    x = inputs(2)
    x[1, 3, 5] = bad
    with pytest.raises(NumbersError, match=r"1 of 480 inputs of b\.0\.wide are NaN or Inf"):
        collect([x])


def test_a_site_that_saw_no_tokens_is_named():
    module = TwoLinears()
    collector = Collector(module, GROUPS, ALL_FIELDS, Sequences(LENGTH))
    with collector:
        module.wide(inputs(1))
    with pytest.raises(StatsError, match=r"b\.0\.flat saw no tokens"):
        collector.finish()


def test_skipping_whole_sequences_is_refused():
    with pytest.raises(StatsError, match="skip_first_tokens=10 must be below the 10"):
        Collector(TwoLinears(), GROUPS, ALL_FIELDS, Sequences(LENGTH, LENGTH))


def test_the_first_token_counts_sink_weight_times_in_the_hessian():
    x = inputs(3)
    stats = collect([x[:1], x[1:]], {"hessian"})["b.0.wide"].weighing_sinks(5.0)
    weight = torch.ones(3, LENGTH, 1).double()
    weight[:, 0] = 5.0
    rows = x.double()
    expected = ((rows * weight).flatten(0, 1).T @ rows.flatten(0, 1)) / weight.sum()
    torch.testing.assert_close(stats.hessian.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_wide_gram_matrix_is_summed_by_tiles_and_mirrored():
    from outlierq.ops.gram import TILE, add_gram, mirror

    width = 2 * TILE + 40
    rows = torch.randn(12, width, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(width, width)
    add_gram(total, rows)
    torch.testing.assert_close(mirror(total), rows.T @ rows, rtol=1e-5, atol=1e-4)
