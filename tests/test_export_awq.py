"""The GEMM layout of AutoAWQ: written, read bit by bit, decoded to what was meant, and imported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from outlierq.core.errors import RecipeError, SourceError
from outlierq.core.model import LinearSite
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import ActivationScheme, QuantScheme
from outlierq.export import format_type
from outlierq.load import decode_rows, load_model, open_checkpoint, unpacked
from outlierq.load.packed.awq import awq_rows
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.quantize import quantize
from outlierq.recipe import load

AWQ = format_type("awq")({})
SETTINGS = ("export.format=awq", "quantize.symmetric=false", "quantize.group_size=32")


def site(rows: int, columns: int) -> LinearSite:
    return LinearSite("m.p", "m.p.weight", None, rows, columns, 0)


def random_weight(rows: int, columns: int, scheme: QuantScheme, seed: int = 0) -> QuantTensor:
    """Any codes, scales and zero points that the scheme allows."""
    make = torch.Generator().manual_seed(seed)
    groups = scheme.groups(columns)
    low, high = int(scheme.code_min), int(scheme.code_max)
    codes = torch.randint(low, high + 1, (rows, columns), generator=make)
    scale = torch.exp(torch.randn(rows, groups, generator=make) * 3 - 4).to(torch.float16)
    zero = None if scheme.symmetric else torch.randint(0, high + 1, (rows, groups), generator=make).to(torch.uint8)
    return QuantTensor(codes.to(torch.int8 if scheme.symmetric else torch.uint8), scale, zero, scheme)


def bit_by_bit(stored: dict[str, torch.Tensor], rows: int, columns: int, group: int) -> np.ndarray:
    """The slow, clear reading: output row by output row, with the order that AutoAWQ's packer documents."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble k of a word holds row order[k]
    qweight, qzeros, scales = (stored[f"m.p.{role}"].numpy() for role in ("qweight", "qzeros", "scales"))
    dense = np.empty((rows, columns), np.float32)
    for row in range(rows):
        shift = 4 * order.index(row % 8)
        for column in range(columns):
            code = (int(qweight[column, row // 8]) >> shift) & 15
            zero = (int(qzeros[column // group, row // 8]) >> shift) & 15
            dense[row, column] = np.float32(code - zero) * np.float32(scales[column // group, row])
    return dense


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("rows", "columns", "size"), [(8, 32, 32), (40, 96, 32), (16, 24, None), (72, 64, 16)])
def test_what_is_written_means_what_was_meant_bit_by_bit(rows, columns, size, symmetric):
    scheme = QuantScheme(4, size, symmetric, "float16")
    meant = random_weight(rows, columns, scheme, seed=rows)
    stored = AWQ.encode(site(rows, columns), meant)
    assert np.array_equal(bit_by_bit(stored, rows, columns, size or columns), meant.dequantize().numpy())
    specs = {name: (dtype, shape) for name, dtype, shape in AWQ.tensor_specs(site(rows, columns), scheme)}
    kinds = {torch.int32: "I32", torch.float16: "F16"}
    assert {name: (kinds[t.dtype], tuple(t.shape)) for name, t in stored.items()} == specs


@pytest.mark.parametrize("fill", ["lowest", "highest", "mixed"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [32, None])
def test_decoding_what_was_encoded_gives_every_part_back(size, symmetric, fill):
    scheme = QuantScheme(4, size, symmetric, "float16")
    meant = random_weight(104, 64, scheme, seed=3)
    if fill != "mixed":
        end = scheme.code_min if fill == "lowest" else scheme.code_max
        meant.codes.fill_(int(end))
        meant.scale.fill_(6e-8 if fill == "lowest" else 65504)
        if meant.zero_point is not None:
            meant.zero_point.fill_(15 if fill == "lowest" else 0)
    stored = {name.rpartition(".")[2]: t for name, t in AWQ.encode(site(104, 64), meant).items()}
    for start, stop in ((0, 104), (32, 104), (0, 32)):
        found, wanted = decode_rows("awq", stored, scheme, (104, 64), start, stop), meant.rows(start, stop)
        assert torch.equal(found.codes, wanted.codes) and torch.equal(found.scale, wanted.scale)
        assert found.scheme == scheme and (found.zero_point is None) == symmetric
        assert symmetric or torch.equal(found.zero_point, wanted.zero_point)
        assert torch.equal(found.dequantize(), wanted.dequantize())


def test_the_decoder_refuses_tensors_of_another_group_size_and_odd_zero_points():
    scheme = QuantScheme(4, 32, False, "float16")
    meant = random_weight(16, 64, scheme)
    stored = {name.rpartition(".")[2]: t for name, t in AWQ.encode(site(16, 64), meant).items()}
    with pytest.raises(SourceError, match="qzeros is"):
        awq_rows(stored, QuantScheme(4, 16, False, "float16"), (16, 64), 0, 16)
    with pytest.raises(SourceError, match="zero points other than 8"):
        awq_rows(stored, QuantScheme(4, 32, True, "float16"), (16, 64), 0, 16)


def test_what_the_format_cannot_hold_is_said():
    good = site(16, 64)
    assert AWQ.obstacle(good, QuantScheme(4, 32, False, "float16")) is None
    assert "not int8" in AWQ.obstacle(good, QuantScheme(8, 32, False))
    assert "16-bit inputs" in AWQ.obstacle(good, QuantScheme(4, 32, True, activations=ActivationScheme()))
    assert "no multiple" in AWQ.obstacle(site(12, 64), QuantScheme(4, 32))
    head = LinearSite("lm_head", "lm_head.weight", None, 16, 64, None)
    assert "outside" in AWQ.obstacle(head, QuantScheme(4, 32))


@pytest.fixture(scope="module")
def awq_folder(untied_llama, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("awq") / "out"
    plan = make_plan(open_checkpoint(str(untied_llama)), load("rtn-w4", list(SETTINGS)))
    quantize(plan, out)
    assert sum(path.stat().st_size for path in out.iterdir() if path.name != "outlierq.json") == plan.output_bytes
    return out


def test_a_run_writes_the_config_that_clients_read(awq_folder):
    config = json.loads((awq_folder / "config.json").read_text())["quantization_config"]
    assert config == {
        "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32, "zero_point": True,
        "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip


def test_the_folder_is_imported_as_the_model_that_compressed_tensors_holds(awq_folder, untied_llama, tmp_path):
    """Both formats with scales in float16 would be equal; here they differ by the rounding of scales alone."""
    settings = ["quantize.symmetric=false", "quantize.group_size=32"]
    other = tmp_path / "ct"
    quantize(make_plan(open_checkpoint(str(untied_llama)), load("rtn-w4", settings)), other)
    found, expected = (unpacked(open_checkpoint(str(folder))) for folder in (awq_folder, other))
    assert found.tensors.keys() == expected.tensors.keys()
    packed = [name for name, info in found.tensors.items() if name in found.linears]
    assert len(packed) == 21
    for name in packed:
        one, two = found.read(name), expected.read(name)
        assert (one - two).norm() < 2e-2 * two.norm(), name
    with torch.no_grad():
        logits = load_model(open_checkpoint(str(awq_folder)))(torch.arange(3, 23)[None]).logits
    assert torch.isfinite(logits).all()


def test_two_group_sizes_in_one_checkpoint_are_refused_with_the_size_that_fits(tiny_llama):
    recipe = load("rtn-w4", ["export.format=awq", "quantize.group_size=64"])  # widths are 64 and 96
    with pytest.raises(RecipeError, match="awq has one group_size") as refusal:
        make_plan(open_checkpoint(str(tiny_llama)), recipe)
    assert "quantize.group_size=32 fits" in refusal.value.hint


def test_the_plan_says_which_clients_load_it(tiny_llama):
    plan = make_plan(open_checkpoint(str(tiny_llama)), load("rtn-w4", list(SETTINGS)))
    assert "vLLM 0.32 (CPU build): loads" in plan.clients and any("transformers" in line for line in plan.clients)
    assert {p.scheme.scale_dtype for p in plan.sites if p.scheme} == {"float16"}


def test_other_versions_are_refused_by_name(awq_folder, tmp_path):
    import shutil

    folder = Path(shutil.copytree(awq_folder, tmp_path / "gemv"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["version"] = "gemv"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="version gemv"):
        unpacked(open_checkpoint(str(folder)))
