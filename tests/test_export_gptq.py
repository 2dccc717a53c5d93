"""The layouts GPTQ version 1 and 2: written, read bit by bit, decoded to what was meant, and imported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from outlierq.core.errors import RecipeError, SourceError
from outlierq.core.model import LinearSite
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.export import format_type
from outlierq.load import decode_rows, load_model, open_checkpoint, unpacked
from outlierq.load.packed.gptq import fields, gptq_rows
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.quantize import quantize
from outlierq.recipe import load

WIDTHS = (2, 3, 4, 8)
GPTQ = format_type("gptq")({})


def site(rows: int, columns: int) -> LinearSite:
    return LinearSite("m.p", "m.p.weight", None, rows, columns, 0)


def random_weight(rows: int, columns: int, scheme: QuantScheme, seed: int = 0) -> QuantTensor:
    """Any codes, scales and zero points that the scheme allows."""
    make = torch.Generator().manual_seed(seed)
    groups, low, high = scheme.groups(columns), int(scheme.code_min), int(scheme.code_max)
    codes = torch.randint(low, high + 1, (rows, columns), generator=make)
    scale = torch.exp(torch.randn(rows, groups, generator=make) * 3 - 4).to(torch.float16)
    zero = None if scheme.symmetric else torch.randint(0, high + 1, (rows, groups), generator=make).to(torch.uint8)
    return QuantTensor(codes.to(torch.int8 if scheme.symmetric else torch.uint8), scale, zero, scheme)


def by_role(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}


def field(words: list[int], index: int, bits: int) -> int:
    """Field number `index` of a string of bits cut into 32-bit words, by arithmetic on one large integer."""
    whole = sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(words))
    return whole >> (index * bits) & ((1 << bits) - 1)


def bit_by_bit(stored: dict[str, torch.Tensor], shape: tuple[int, int], bits: int, version: int) -> np.ndarray:
    """The slow, clear reading. Version 1: each word of zero points gets a 1 in every field that begins in it."""
    rows, columns = shape
    dense = np.empty(shape, np.float32)
    zeros = stored["qzeros"].tolist()
    if version == 1:
        ones = [sum(1 << (p % 32) for p in range(0, rows * bits, bits) if p // 32 == w) for w in range(len(zeros[0]))]
        zeros = [[(word + one) & 0xFFFFFFFF for word, one in zip(row, ones, strict=True)] for row in zeros]
    for row in range(rows):
        words = stored["qweight"][:, row].tolist()
        for column in range(columns):
            group = int(stored["g_idx"][column])
            shifted = field(words, column, bits) - field(zeros[group], row, bits)
            dense[row, column] = np.float32(shifted) * np.float32(stored["scales"][group, row].item())
    return dense


@pytest.mark.parametrize("format", ["gptq", "gptq-v2"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
def test_what_is_written_means_what_was_meant_bit_by_bit(bits, symmetric, format):
    for rows, columns, size in ((32, 64, 32), (64, 32, None)):
        scheme = QuantScheme(bits, size, symmetric, "float16")
        meant = random_weight(rows, columns, scheme, seed=bits)
        stored = format_type(format)({}).encode(site(rows, columns), meant)
        specs = {name: (dtype, shape) for name, dtype, shape in GPTQ.tensor_specs(site(rows, columns), scheme)}
        kinds = {torch.int32: "I32", torch.float16: "F16"}
        assert {name: (kinds[t.dtype], tuple(t.shape)) for name, t in stored.items()} == specs
        version = 2 if format == "gptq-v2" else 1
        found = bit_by_bit(by_role(stored), (rows, columns), bits, version)
        assert np.array_equal(found, meant.dequantize().numpy())


@pytest.mark.parametrize("format", ["gptq", "gptq-v2"])
@pytest.mark.parametrize("zeros", ["random", "none", "largest"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
def test_decoding_what_was_encoded_gives_every_part_back(bits, symmetric, zeros, format):
    scheme = QuantScheme(bits, 32, symmetric, "float16")
    meant = random_weight(96, 64, scheme, seed=bits)
    if zeros != "random" and not symmetric:
        meant.zero_point.fill_(0 if zeros == "none" else int(scheme.code_max))
    stored = by_role(format_type(format)({}).encode(site(96, 64), meant))
    for start, stop in ((0, 96), (32, 96), (0, 32)):
        found = decode_rows(format, stored, scheme, (96, 64), start, stop)
        wanted = meant.rows(start, stop)
        assert found.scheme == scheme
        assert torch.equal(found.codes, wanted.codes) and torch.equal(found.scale, wanted.scale)
        assert symmetric or torch.equal(found.zero_point, wanted.zero_point)
        assert torch.equal(found.dequantize(), wanted.dequantize())


def test_symmetric_zero_points_are_the_constants_that_readers_expect():
    meant = random_weight(32, 32, QuantScheme(4, 32, True, "float16"))
    words = {name: by_role(format_type(name)({}).encode(site(32, 32), meant))["qzeros"] for name in FORMATS}
    assert set(words["gptq"].flatten().tolist()) == {0x77777777}
    assert set(words["gptq-v2"].flatten().tolist()) == {0x88888888 - (1 << 32)}


def test_a_zero_point_of_0_survives_the_addition_of_whole_words_that_gptqmodel_makes():
    scheme = QuantScheme(4, 32, False, "float16")
    meant = random_weight(32, 32, scheme)
    meant.zero_point.copy_(torch.arange(32)[:, None] % 3)
    stored = by_role(GPTQ.encode(site(32, 32), meant))["qzeros"]
    as_version_2 = (stored.long() + 0x11111111) & 0xFFFFFFFF
    nibbles = [(int(word) >> (4 * k)) & 15 for word in as_version_2[0] for k in range(8)]
    assert nibbles == (torch.arange(32) % 3).tolist()


def test_columns_in_activation_order_are_read_by_their_group():
    scheme = QuantScheme(4, 16, False, "float16")
    meant = random_weight(32, 64, scheme)
    stored = by_role(GPTQ.encode(site(32, 64), meant))
    stored["g_idx"] = torch.randint(0, 4, (64,), generator=torch.Generator().manual_seed(1)).int()
    from outlierq.load.packed.gptq import gptq_dense

    assert np.array_equal(gptq_dense(stored, scheme, (32, 64), 1), bit_by_bit(stored, (32, 64), 4, 1))
    with pytest.raises(SourceError, match="activation order"):
        gptq_rows(stored, scheme, (32, 64), 0, 32, version=1)


def test_words_that_do_not_fit_are_refused():
    scheme = QuantScheme(4, 32, False, "float16")
    stored = by_role(GPTQ.encode(site(32, 64), random_weight(32, 64, scheme)))
    with pytest.raises(SourceError, match="qweight is"):
        gptq_rows(stored, scheme, (32, 128), 0, 32, version=1)
    with pytest.raises(SourceError, match="qzeros is"):
        gptq_rows(stored, QuantScheme(4, 16, False, "float16"), (32, 64), 0, 32, version=1)
    with pytest.raises(SourceError, match="do not fit"):
        fields(np.zeros((1, 1), np.int32), 4, 9)


def test_what_the_format_cannot_hold_is_said():
    assert GPTQ.obstacle(site(32, 64), QuantScheme(3, 32)) is None
    assert "not int5" in GPTQ.obstacle(site(32, 64), QuantScheme(5, 32))
    assert "do not fill" in GPTQ.obstacle(site(12, 64), QuantScheme(4, 32))
    assert "bits" in GPTQ.conflict([QuantScheme(4, 32), QuantScheme(8, 32)])
    assert "symmetric" in GPTQ.conflict([QuantScheme(4, 32), QuantScheme(4, 32, False)])
    assert GPTQ.conflict([QuantScheme(4, 32)]) is None


def compressed(source: Path, out: Path, *settings: str) -> Path:
    """Recipe rtn-w4 with groups of 32."""
    recipe = load("rtn-w4", ["quantize.group_size=32", *settings])
    plan = make_plan(open_checkpoint(str(source)), recipe)
    quantize(plan, out)
    assert sum(path.stat().st_size for path in out.iterdir() if path.name != "outlierq.json") == plan.output_bytes
    return out


def test_both_versions_are_imported_as_the_same_model(tiny_llama, tmp_path):
    folders = [compressed(tiny_llama, tmp_path / f, f"export.format={f}", "quantize.symmetric=false") for f in FORMATS]
    first, second = (unpacked(open_checkpoint(str(folder))) for folder in folders)
    assert len(first.linears) == 14
    for name in first.tensors:
        assert torch.equal(first.read(name), second.read(name)), name
    with torch.no_grad():
        logits = load_model(open_checkpoint(str(folders[0])))(torch.arange(3, 23)[None]).logits
    assert torch.isfinite(logits).all()


FORMATS = ("gptq", "gptq-v2")


def test_a_run_writes_the_config_that_clients_read(tiny_llama, tmp_path):
    keep = "quantize.overrides=[{match: '*layers.1.mlp.down_proj', keep: true}]"
    out = compressed(tiny_llama, tmp_path / "out", "export.format=gptq-v2", keep)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config == {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "lm_head": False,
        "pack_dtype": "int32", "checkpoint_format": "gptq_v2",
        "dynamic": {r"-:^model\.layers\.1\.mlp\.down_proj$": {}},
    }  # fmt: skip
    found = unpacked(open_checkpoint(str(out)))
    assert len(found.linears) == 13 and found.quantized("model.layers.0.mlp.up_proj.weight").scheme.symmetric
    plan = make_plan(open_checkpoint(str(tiny_llama)), load("rtn-w4", ["export.format=gptq", "quantize.group_size=32"]))
    assert "vLLM 0.32 (CPU build): loads" in plan.clients


def test_mixed_widths_are_refused_by_the_plan(tiny_llama):
    mixed = "quantize.overrides=[{match: '*mlp*', bits: 8}]"
    recipe = load("rtn-w4", ["export.format=gptq", "quantize.group_size=32", mixed])
    with pytest.raises(RecipeError, match="gptq has one bits for the whole model"):
        make_plan(open_checkpoint(str(tiny_llama)), recipe)


def test_layouts_that_are_not_known_are_refused_by_name(tiny_llama, tmp_path):
    out = compressed(tiny_llama, tmp_path / "out", "export.format=gptq")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "marlin"
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="layout marlin"):
        unpacked(open_checkpoint(str(out)))


def test_the_table_of_clients_names_known_formats_and_says_what_was_not_tried():
    from outlierq.export.clients import client_facts, table
    from outlierq.registry import formats

    written_alike = {"gptq-v2"}  # the facts of gptq
    assert table()["formats"].keys() == formats().keys() - written_alike
    assert table()["checked"].startswith("20")
    said = client_facts("gptq", [QuantScheme(3, 32), QuantScheme(4, 32)])
    assert "vLLM 0.32 (CPU build): int3 symmetric g32: not tried" in said
    assert any("use awq" in line for line in client_facts("gptq", [QuantScheme(4, 32, False)]))
