"""OliVe: pairs of an outlier and its victim, their search, their format, and what reads it."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from reference.statistics import correlated_inputs, random_weight, row_errors, statistics_of
from safetensors.torch import load_file, save_file

from outlierq.core.errors import RecipeError, SourceError
from outlierq.core.scheme import QuantScheme
from outlierq.load import open_checkpoint, unpacked
from outlierq.load.packed.outlier_victim import ILLEGAL, pairs_of_bytes
from outlierq.ops import outlier_victim as ovp
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.quantize import quantize
from outlierq.pipeline.verify import verify
from outlierq.quantize.gptq import gptq
from outlierq.quantize.rtn import rtn
from outlierq.recipe import load, parse

ROWS, WIDTH = 24, 96
PAIRS = QuantScheme(4, None, kind="outlier-victim")
FEW = ["calibration.samples=6", "calibration.sequence_length=32", "calibration.unseen_tokens=false"]


@pytest.fixture(scope="module")
def w() -> torch.Tensor:
    weight = random_weight(ROWS, WIDTH)
    weight[::5, ::7] *= 12
    return weight


@pytest.fixture(scope="module")
def stats():
    return statistics_of(correlated_inputs(256, WIDTH))


def legal() -> torch.Tensor:
    """Every pair of nibbles that stands for something, [n, 2]."""
    normal = [n for n in range(16) if n != ovp.VICTIM]
    outliers = [n for n in range(16) if n & 7]
    pairs = [*itertools.product(normal, normal), *((ovp.VICTIM, n) for n in outliers)]
    return torch.tensor(pairs + [(n, ovp.VICTIM) for n in outliers], dtype=torch.uint8)


# Pairs.


def test_every_legal_pair_of_nibbles_is_decoded_and_encoded_again():
    nibbles = legal()
    values = ovp.decode(nibbles)
    assert torch.equal(ovp.encode(values), nibbles)
    assert torch.equal(ovp.nearest_pairs(values), values)
    assert torch.equal(ovp.unpack(ovp.pack(nibbles)), nibbles)
    assert ovp.MAGNITUDES == (12, 16, 24, 32, 48, 64, 96)
    assert len({tuple(row) for row in values.tolist()}) == 15 * 15 + 2 * 14


def test_the_reader_knows_each_of_the_256_bytes_and_refuses_those_that_are_no_pair():
    nibbles = legal()
    table = torch.from_numpy(pairs_of_bytes())
    assert torch.equal(table[ovp.pack(nibbles).flatten().long()].float(), ovp.decode(nibbles))
    assert int((table[:, 0] == ILLEGAL).sum()) == 256 - len(nibbles)


def test_pairs_hold_as_many_victims_as_outliers_and_err_no_more_than_integers_do():
    u = 6 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    u[:, ::9] *= 8
    values = ovp.nearest_pairs(u)
    victims = (ovp.encode(values) == ovp.VICTIM).unflatten(1, (-1, 2)).sum(-1)
    assert victims.max() == 1 and int(victims.sum()) == int((values.abs() > 7).sum()) > 0
    error = (values - u).square().unflatten(1, (-1, 2)).sum(-1)
    integers = (u.round().clamp(-7, 7) - u).square().unflatten(1, (-1, 2)).sum(-1)
    assert (error <= integers).all()


def test_the_channel_that_matters_is_spared_and_what_is_lost_is_made_up_for():
    pair, unlike = torch.tensor([[9.7, 3.0]]), torch.diag_embed(torch.tensor([[1.0, 100.0]]))
    assert ovp.nearest_pairs(pair, unlike)[0, 1] == 3
    assert ovp.nearest_pairs(pair * torch.tensor([3.0, 1.0]), unlike.flip(1, 2))[0, 1] == 0
    together = torch.tensor([[[1.0, 0.9], [0.9, 1.0]]])  # of inputs that are nearly the same
    assert ovp.nearest_pairs(torch.tensor([[13.0, 4.0]]), together).tolist() == [[16.0, 0.0]]
    assert ovp.nearest_pairs(torch.tensor([[13.0, 4.0]])).tolist() == [[12.0, 0.0]]


def test_curvatures_are_those_of_neighbours_in_every_group(stats):
    blocks = torch.stack([stats.hessian[:48, :48], stats.hessian[48:, 48:]])
    found = ovp.curvatures(blocks, QuantScheme(4, 48, kind="outlier-victim"))
    places = torch.arange(WIDTH).view(-1, 2)
    assert torch.equal(found, stats.hessian[places[:, :, None], places[:, None, :]])
    diagonal = ovp.curvatures(stats.hessian.diagonal().view(2, 48), PAIRS)
    assert torch.equal(diagonal.diagonal(dim1=1, dim2=2).flatten(), stats.hessian.diagonal())
    assert ovp.curvatures(blocks, QuantScheme(4, 48)) is None


# Methods.


def test_olive_is_ten_decibels_above_the_best_int4_on_a_gauss_with_spikes():
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(32, 4096, generator=generator)
    spikes = torch.rand(w.shape, generator=generator) < 0.003
    w = torch.where(spikes, w * (8 + 12 * torch.rand(w.shape, generator=generator)), w)
    made = rtn(w, None, PAIRS, scale_search="mse")
    steps = [share * w.abs().amax(1, keepdim=True) / 7 for share in torch.linspace(0.05, 1, 60).tolist()]
    best = min(((w / step).round().clamp(-8, 7) * step - w).square().sum() for step in steps)
    assert 10 * torch.log10(best / (made.dequantize() - w).square().sum()) >= 10
    assert made.bits_per_weight == 4 + 16 / 4096


@pytest.mark.parametrize("group", [None, 16])
def test_searches_and_error_feedback_each_lose_less(group, w, stats):
    scheme = QuantScheme(4, group, kind="outlier-victim")
    made = [rtn(w, stats, scheme, scale_search=search) for search in ("minmax", "importance", "hessian")]
    made += [gptq(w, stats, scheme, refine_passes=0), gptq(w, stats, scheme)]
    errors = [row_errors(each.dequantize() - w, stats.hessian).sum().item() for each in made]
    assert max(errors[1:3]) < errors[0] and errors[4] < errors[3] < min(errors[1:3])
    for each in made:
        assert torch.equal(ovp.nearest_pairs(each.codes.float()), each.codes.float())
        assert each.scale.shape == (ROWS, scheme.groups(WIDTH)) and each.scale.dtype == torch.bfloat16


def test_rows_of_zeros_and_dead_channels_do_no_harm(w):
    x = correlated_inputs(256, WIDTH)
    x[:, 6:9] = 0
    w = w.clone()
    w[3] = 0
    for made in (rtn(w, None, PAIRS), gptq(w, statistics_of(x), PAIRS)):
        assert not made.dequantize()[3].any() and made.dequantize().isfinite().all()


# The format.


@pytest.fixture(scope="module")
def folder(tiny_llama, tmp_path_factory):
    """The tiny model through recipe olive-w4, of the planned size."""
    out = tmp_path_factory.mktemp("olive") / "out"
    plan = make_plan(open_checkpoint(str(tiny_llama)), load("olive-w4", FEW))
    quantize(plan, out)
    assert sum(path.stat().st_size for path in out.iterdir() if path.name != "outlierq.json") == plan.output_bytes
    return out


def test_a_written_model_has_four_bits_a_weight_one_scale_a_row_and_nothing_else(folder, tiny_llama):
    stored = open_checkpoint(str(folder))
    parts = {name.rpartition(".")[2] for name in stored.tensors if "proj" in name}
    assert parts == {"weight_pairs", "weight_scale"}
    for name, info in stored.tensors.items():
        if name.endswith(".weight_pairs"):
            rows, columns = open_checkpoint(str(tiny_llama)).tensors[name.replace("_pairs", "")].shape
            assert (info.dtype, info.shape) == ("U8", (rows, columns // 2))
            assert stored.tensors[name.replace("_pairs", "_scale")].shape == (rows, 1)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config == {"quant_method": "outlierq-olive", "bits": 4, "modules_to_not_convert": ["lm_head"]}


def test_a_written_model_verifies_and_is_read_back(folder, tiny_llama):
    assert verify(str(folder), str(tiny_llama)).sound
    plain, source = unpacked(open_checkpoint(str(folder))), open_checkpoint(str(tiny_llama))
    name = "model.layers.1.mlp.down_proj.weight"
    weight, quantized = source.read(name).float(), plain.quantized(name)
    assert torch.equal(plain.read(name), quantized.dequantize()) and quantized.scheme == PAIRS
    assert (plain.read(name) - weight).norm() / weight.norm() < 0.2


def damaged(folder, tmp_path, change):
    """A copy whose first linear has other bytes."""
    out = tmp_path / "damaged"
    out.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    change(tensors, name)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return unpacked(open_checkpoint(str(out))), f"{name}.weight"


def test_a_byte_that_is_no_pair_is_refused(folder, tmp_path):
    def change(tensors, name):
        tensors[f"{name}.weight_pairs"][0, 0] = 0x88

    plain, name = damaged(folder, tmp_path, change)
    with pytest.raises(SourceError, match=r"1 of .* bytes are no pair of an outlier and its victim"):
        plain.read(name)


@pytest.mark.parametrize(
    ("value", "said"), [(float("nan"), "1 of .* scales .* are no positive numbers"), (0.0, "are 0 over weights")]
)
def test_a_scale_that_is_none_is_refused(folder, tmp_path, value, said):
    def change(tensors, name):
        tensors[f"{name}.weight_scale"][3] = value

    plain, name = damaged(folder, tmp_path, change)
    with pytest.raises(SourceError, match=said):
        plain.check_scales(name)


@pytest.mark.parametrize("shape", [lambda s: s[1:], lambda s: s.flatten(), lambda s: s[0, 0]])
def test_scales_that_do_not_fit_are_refused(folder, tmp_path, shape):
    def change(tensors, name):
        tensors[f"{name}.weight_scale"] = shape(tensors[f"{name}.weight_scale"]).clone()

    with pytest.raises(SourceError, match="which does not fit codes"):
        damaged(folder, tmp_path, change)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("bits: 3", r"bits: `kind: outlier-victim` has 4 \(this is 3\)"),
        ("symmetric: false", "symmetric: `kind: outlier-victim` has true"),
        ("group_size: 31", "group_size: pairs need an even number of columns"),
        ("activations: {}", "activations: `kind: outlier-victim` has none"),
    ],
)
def test_what_pairs_are_not_is_refused_before_work(keys, said):
    with pytest.raises(RecipeError, match=said):
        parse(f"quantize: {{method: rtn, kind: outlier-victim, {keys}}}\nexport: {{format: outlierq-olive}}\n")


def test_other_formats_and_other_numbers_are_refused_with_the_one_that_works():
    with pytest.raises(RecipeError, match=r"kind: compressed-tensors has no outlier-victim pairs; .* outlierq-olive"):
        load("olive-w4", ["export.format=compressed-tensors"])
    with pytest.raises(RecipeError, match="outlierq-olive stores `outlier-victim` pairs"):
        load("gptq-w4", ["export.format=outlierq-olive"])
