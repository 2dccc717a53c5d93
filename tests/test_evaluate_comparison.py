"""Comparing checkpoints counts logical parameters and stored bits, whatever the layout."""

import math

import pytest
import torch
from fakes import FakeCheckpoint

from outlierq.core.errors import SourceError
from outlierq.core.model import TensorInfo
from outlierq.evaluate.comparison import compare_checkpoints, logical_tensors, measure_size

BYTES = {"BF16": 2, "F16": 2, "F32": 4, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "F8_E4M3": 1}
MODULE = "model.layers.0.mlp.up_proj"


def headers(tensors, config=None, values=None):
    """A checkpoint of headers, and of the values of `weight_shape` tensors."""
    infos = [
        TensorInfo(name, dtype, shape, math.prod(shape) * BYTES[dtype]) for name, (dtype, shape) in tensors.items()
    ]
    return FakeCheckpoint(infos, config, {name: torch.tensor(value) for name, value in (values or {}).items()})


SOURCE = headers({f"{MODULE}.weight": ("BF16", (64, 128)), "model.norm.weight": ("BF16", (64,))})
PACKED = headers(
    {
        f"{MODULE}.weight_packed": ("I32", (64, 16)),
        f"{MODULE}.weight_scale": ("BF16", (64, 2)),
        f"{MODULE}.weight_shape": ("I64", (2,)),
        "model.norm.weight": ("BF16", (64,)),
    },
    values={f"{MODULE}.weight_shape": [64, 128]},
)


def test_a_packed_checkpoint_has_the_parameters_of_its_source():
    compared = compare_checkpoints(SOURCE, PACKED)
    assert compared.a.parameters == compared.b.parameters == 64 * 128 + 64
    assert compared.b.quantized_parameters == 64 * 128
    stored = 64 * 16 * 4 + 64 * 2 * 2 + 16
    assert compared.b.quantized_bits_per_weight == pytest.approx(8 * stored / (64 * 128))
    assert compared.a.bits_per_weight == 16
    assert compared.a.quantized_bits_per_weight is None
    assert compared.changed == (f"{MODULE}.weight",)
    assert (compared.added, compared.removed, compared.unchanged) == ((), (), 1)
    assert compared.size_ratio == pytest.approx((64 * 128 * 2 + 128) / (stored + 128))


def test_a_width_that_does_not_fill_words_is_counted_from_weight_shape():
    tensors = {f"{MODULE}.weight_packed": ("I32", (64, 10)), f"{MODULE}.weight_shape": ("I64", (2,))}
    checkpoint = headers(tensors, values={f"{MODULE}.weight_shape": [64, 100]})
    assert logical_tensors(checkpoint)[f"{MODULE}.weight"].parameters == 6400


@pytest.mark.parametrize(
    ("tensors", "config"),
    [
        ({"qweight": ("I32", (16, 64)), "scales": ("F16", (2, 64)), "g_idx": ("I32", (128,))}, {"bits": 4}),
        ({"qweight": ("I32", (128, 8)), "scales": ("F16", (2, 64)), "qzeros": ("I32", (2, 8))}, {"bits": 4}),
        ({"weight_packed": ("U8", (64, 64)), "weight_scale": ("F8_E4M3", (64, 8))}, {}),
        ({"weight": ("I8", (64, 128)), "weight_scale": ("BF16", (64, 1))}, {}),
    ],
    ids=["gptq", "awq", "fp4", "int8"],
)
def test_every_layout_gives_one_quantized_weight(tensors, config):
    named = {f"{MODULE}.{part}": header for part, header in tensors.items()}
    found = logical_tensors(headers(named, {"quantization_config": config}))
    assert list(found) == [f"{MODULE}.weight"]
    assert found[f"{MODULE}.weight"].parameters == 64 * 128
    assert found[f"{MODULE}.weight"].quantized


def test_tensors_that_come_and_go_are_named():
    untied = headers({"lm_head.weight": ("BF16", (8, 4)), "model.norm.weight": ("BF16", (64,))})
    compared = compare_checkpoints(SOURCE, untied)
    assert compared.added == ("lm_head.weight",)
    assert compared.removed == (f"{MODULE}.weight",)
    assert compared.to_dict()["added"] == ["lm_head.weight"]


def test_a_packed_weight_of_unknown_width_is_named():
    with pytest.raises(SourceError, match=f"{MODULE}.qweight"):
        logical_tensors(headers({f"{MODULE}.qweight": ("I32", (16, 64))}))


def test_a_checkpoint_without_parameters_is_refused():
    with pytest.raises(SourceError, match="no parameters"):
        measure_size({})
