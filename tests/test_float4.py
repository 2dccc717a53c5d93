"""NVFP4, MXFP4 and MXFP6 against their definition and the compressed-tensors package, from grid to file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from outlierq.core.errors import RecipeError, SourceError
from outlierq.core.model import LinearSite
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.core.stats import InputStats
from outlierq.export import format_type
from outlierq.export.writer import compare
from outlierq.load import decode_rows, open_checkpoint, unpacked
from outlierq.load.packed.codes.e2m1 import decode_e2m1
from outlierq.load.packed.codes.numbers import e2m1_values, e2m3_values
from outlierq.ops.grid import nearest_code, power_of_two
from outlierq.pipeline.convert import convert, make_conversion
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.quantize import quantize
from outlierq.pipeline.verify import verify
from outlierq.recipe import load
from outlierq.registry import method

NVFP4 = QuantScheme(4, 16, kind="float", scales="two-level")
MXFP4 = QuantScheme(4, 32, kind="float", scales="power-of-two")
FORMAT = format_type("compressed-tensors")({})
MXFP6 = QuantScheme(6, 32, kind="float", scales="power-of-two")
ALL = pytest.mark.parametrize("scheme", [NVFP4, MXFP4, MXFP6], ids=str)
RECIPES = pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp6"])
SITE = "model.layers.1.mlp.up_proj"
VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def weights(rows: int = 48, columns: int = 96, seed: int = 0, size: float = 0.05) -> torch.Tensor:
    """Columns of unlike size, some extremes and a zero row."""
    make = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=make) * torch.exp(torch.rand(1, columns, generator=make) * 3) * size
    w[::7, ::11] *= 6
    w[3] = 0
    return w


def site(rows: int, columns: int) -> LinearSite:
    return LinearSite(SITE, f"{SITE}.weight", None, rows, columns, 1)


def rounded(w: torch.Tensor, scheme: QuantScheme, search: str = "mse") -> QuantTensor:
    return method("quantize", "rtn").function(w.clone(), None, scheme, scale_search=search)


def error(found: QuantTensor, w: torch.Tensor) -> float:
    return ((found.dequantize() - w).norm() / w.norm()).item()


def package_decodes(tensors: dict[str, torch.Tensor], scheme: QuantScheme) -> torch.Tensor:
    """What the compressed-tensors package makes of the tensors of one linear."""
    from compressed_tensors import compressors
    from compressed_tensors.quantization import QuantizationScheme

    config = FORMAT.quantization_config([(site(48, 96), scheme)])
    group = QuantizationScheme(**config["config_groups"]["group_0"])
    compressor = getattr(compressors, f"{scheme.numbers.upper()}PackedCompressor", None)
    if compressor is None:
        pytest.skip("this version of compressed-tensors has no such format")
    return compressor.decompress({name.rpartition(".")[2]: value for name, value in tensors.items()}, group)["weight"]


def test_a_code_is_the_nearest_value_with_ties_to_the_even_mantissa():
    # Older versions have it elsewhere.
    cast_to_fp4 = pytest.importorskip("compressed_tensors.quantization.utils.fp4_utils").cast_to_fp4
    x = torch.cat([torch.linspace(-7, 7, 2801), torch.randn(2000) * 2])  # steps of 1/200: every tie is met
    found = nearest_code(x.clone(), None, NVFP4)
    assert torch.equal(found, cast_to_fp4(x.clone()))
    ties = {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5: 4, 6.5: 6, 1e9: 6}
    assert nearest_code(torch.tensor([*ties]), None, NVFP4).tolist() == [*ties.values()]
    assert e2m1_values().tolist() == [*VALUES, *(-v for v in VALUES)]


def test_a_number_of_6_bits_is_the_nearest_one_with_ties_to_the_even_mantissa():
    cast_to_fp6 = pytest.importorskip("compressed_tensors.quantization.utils.fp6_utils").cast_to_fp6
    x = torch.cat([torch.linspace(-8, 8, 12801), torch.randn(2000) * 2, torch.tensor([1e9, -1e9])])
    assert torch.equal(nearest_code(x.clone(), None, MXFP6), cast_to_fp6(x.clone()))
    every = torch.from_numpy(e2m3_values())
    assert torch.equal(nearest_code(every.clone(), None, MXFP6), every)


def test_powers_of_two_are_the_nearest_or_the_next_above():
    x = torch.tensor([1.0, 1.4, 1.42, 1.9, 2.0, 0.75, 3e-39, 0.0])
    assert power_of_two(x, up_from=0.5).tolist() == [1, 2, 2, 2, 2, 1, 2.0**-127, 1]
    assert power_of_two(x, up_from=0.5**0.5).tolist() == [1, 1, 2, 2, 2, 1, 2.0**-127, 1]
    assert power_of_two(x, up_from=1.0).tolist()[:6] == [1, 1, 1, 1, 2, 0.5]


@ALL
def test_the_search_beats_the_grid_that_just_holds_the_group(scheme):
    w = weights()
    plain, searched = (rounded(w, scheme, search) for search in ("minmax", "mse"))
    by_group = (w.shape[0], -1, scheme.group_size)
    before, after = ((q.dequantize() - w).view(by_group).square().sum(-1) for q in (plain, searched))
    assert (after <= before * (1 + 1e-5) + 1e-12).all()
    assert error(searched, w) < (0.97 if scheme.bits == 4 else 1.0) * error(plain, w)
    assert error(searched, w) < {"nvfp4": 0.1, "mxfp4": 0.14, "mxfp6": 0.04}[scheme.numbers]
    assert not searched.dequantize()[3].any()


def test_nvfp4_scales_are_those_of_the_package():
    """The same scales up to one rounding to E4M3; the divisors differ, so which way it goes may, too."""
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    w = weights()[4:]
    config = FORMAT.quantization_config([(site(48, 96), NVFP4)])["config_groups"]["group_0"]
    grouped = w.view(len(w), -1, 16)
    divisor = generate_gparam(w.amin(), w.amax())
    args = QuantizationScheme(**config).weights
    theirs, _ = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args, global_scale=divisor)
    ours = rounded(w, NVFP4, "minmax").float_scale
    assert ((theirs.float() / divisor) / ours - 1).abs().max() < 2 / 16
    assert ((theirs.float() / divisor) / ours - 1).mean().abs() < 0.01


@ALL
def test_the_package_decodes_what_we_write(scheme):
    w = weights()
    found = rounded(w, scheme)
    tensors = FORMAT.encode(site(48, 96), found)
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    assert shapes == {name: shape for name, _, shape in FORMAT.tensor_specs(site(48, 96), scheme)}
    assert torch.equal(package_decodes(tensors, scheme).float(), found.dequantize())
    assert torch.equal(found.dequantize().bfloat16().float(), found.dequantize())  # exact in 16 bits


@ALL
def test_our_decoder_agrees_with_the_package_on_any_bytes(scheme):
    make = torch.Generator().manual_seed(5)
    groups = 96 // scheme.group_size
    parts = {"weight_packed": torch.randint(0, 256, (48, 12 * scheme.bits), generator=make, dtype=torch.uint8)}
    if scheme == NVFP4:
        numbers = torch.randint(1, 127, (48, groups), generator=make, dtype=torch.uint8)
        parts |= {"weight_scale": numbers.view(torch.float8_e4m3fn), "weight_global_scale": torch.tensor([2048.0])}
    else:
        parts["weight_scale"] = torch.randint(100, 140, (48, groups), generator=make, dtype=torch.uint8)
    expected = package_decodes(parts, scheme).float().numpy()
    np.testing.assert_array_equal(decode_e2m1(*parts.values(), bits=scheme.bits), expected)
    rows = decode_rows("compressed-tensors", parts, scheme, (48, 96), 16, 48)
    np.testing.assert_array_equal(rows.dequantize().numpy(), expected[16:])


@pytest.mark.slow
@ALL
def test_a_million_blocks_are_decoded_as_the_package_decodes_them(scheme):
    make, rows = torch.Generator().manual_seed(6), 1 << 15
    columns = 32 * scheme.group_size
    packed = torch.randint(0, 256, (rows, columns * scheme.bits // 8), generator=make, dtype=torch.uint8)
    numbers = torch.randint(1, 127, (rows, 32), generator=make, dtype=torch.uint8)
    whole = {"weight_global_scale": torch.tensor([2048.0])} if scheme == NVFP4 else {}
    small = numbers.view(torch.float8_e4m3fn) if scheme == NVFP4 else numbers + 60
    parts = {"weight_packed": packed, "weight_scale": small, **whole}
    expected = package_decodes(parts, scheme).float().numpy()
    np.testing.assert_array_equal(decode_e2m1(*parts.values(), bits=scheme.bits), expected)


@ALL
def test_decoding_gives_back_what_was_meant_bit_for_bit(scheme):
    found = rounded(weights(), scheme)
    parts = {name.rpartition(".")[2]: v for name, v in FORMAT.encode(site(48, 96), found).items()}
    for start, stop in ((0, 48), (32, 48)):
        compare(SITE, decode_rows("compressed-tensors", parts, scheme, (48, 96), start, stop), found.rows(start, stop))
    with pytest.raises(SourceError, match="found"):
        decode_rows("compressed-tensors", parts, scheme, (48, 128), 0, 48)


@pytest.mark.parametrize("largest", [1e-6, 0.001, 0.3, 2.6, 40.0, 3e4])
def test_scales_of_weights_of_any_size_fit(largest):
    w = weights()
    w *= largest / w.abs().max()
    found = rounded(w, NVFP4, "minmax")
    assert found.scale.float().isfinite().all() and error(found, w) < 0.11
    unit = found.super_scale.item()
    assert np.log2(unit) == int(np.log2(unit)) and (unit == 1024) == (0.01 <= largest <= 2.6)


def test_one_divisor_holds_for_all_rows_of_a_weight(tiny_llama, tmp_path, tools):
    """Weights so large that each piece of rows would choose another."""
    from safetensors import safe_open

    folder = Path(shutil.copytree(tiny_llama, tmp_path / "loud"))
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{SITE}.weight"] *= torch.logspace(0, 2, 96)[:, None].to(torch.bfloat16) * 10
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    quantize(make_plan(open_checkpoint(str(folder)), load("nvfp4")), tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.get_tensor(f"{SITE}.weight_global_scale").item() < 1024
    found = verify(str(tmp_path / "out"), str(folder))
    assert found.sound and max(found.errors.values()) < 0.11


@ALL
def test_gptq_on_this_grid_errs_less_than_rounding(scheme):
    make = torch.Generator().manual_seed(1)
    x = torch.randn(400, 96, generator=make) @ torch.randn(96, 96, generator=make) / 96**0.5
    hessian = x.T @ x / 400
    stats = InputStats(tokens=400, sequences=4, hessian=hessian)
    w = weights()
    change = {
        name: method("quantize", name).function(w.clone(), stats, scheme, **options).dequantize() - w
        for name, options in (("rtn", {"scale_search": "hessian"}), ("gptq", {}))
    }
    errors = {name: ((d @ hessian) * d).sum().item() for name, d in change.items()}
    assert errors["gptq"] < 0.7 * errors["rtn"]


@pytest.fixture(scope="module")
def made(tiny_llama, tmp_path_factory) -> Callable[[str], Path]:
    """A checkpoint by recipe. Read-only."""
    known: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in known:
            known[name] = tmp_path_factory.mktemp(name) / "out"
            quantize(make_plan(open_checkpoint(str(tiny_llama)), load(name)), known[name])
        return known[name]

    return folder


@RECIPES
def test_transformers_computes_with_the_weights_that_we_decode(name, made):
    from transformers import AutoModelForCausalLM

    from outlierq.load import load_model

    model = AutoModelForCausalLM.from_pretrained(made(name), dtype=torch.bfloat16)
    plain = unpacked(open_checkpoint(str(made(name))))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        theirs, ours = model(ids).logits, load_model(open_checkpoint(str(made(name))), dtype="bfloat16")(ids).logits
    assert torch.equal(theirs, ours)
    assert len(plain.linears) == 14
    for weight in plain.linears:
        assert torch.equal(model.get_submodule(weight.removesuffix(".weight")).weight.float(), plain.read(weight))


@RECIPES
def test_verify_measures_it_and_the_packed_runtime_runs_it(name, made, tiny_llama, outlierq):
    from outlierq.load import load_model
    from outlierq.pipeline.measuring.packed_model import load_packed_model

    found = verify(str(made(name)), str(tiny_llama))
    assert found.sound and found.linears == 14 and not found.notes[1:]
    low, high = {"nvfp4": (0.07, 0.1), "mxfp4": (0.09, 0.13), "mxfp6": (0.02, 0.035)}[name]
    assert all(low < one < high for one in found.errors.values())
    report = json.loads((made(name) / "outlierq.json").read_text())
    assert {row["numbers"] for row in report["rows"]} == {name}
    assert report["quantized_bits_per_weight"] == pytest.approx(
        {"nvfp4": 4.5, "mxfp4": 4.25, "mxfp6": 6.25}[name], abs=0.02
    )
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        packed = load_packed_model(open_checkpoint(str(made(name))), dtype="float32")(ids).logits
        plain = load_model(open_checkpoint(str(made(name))), dtype="float32")(ids).logits
    assert torch.allclose(packed, plain, rtol=1e-4, atol=1e-4)


def damage(folder: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> str:
    copy = Path(shutil.copytree(folder, out))
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    (copy / "outlierq.json").unlink()  # its record would find everything
    return str(copy)


FAULTS = {
    "a scale that is NaN": ("nvfp4", "weight_scale", lambda t: t.view(torch.uint8)[2, 1:2].fill_(0x7F), "numbers"),
    "a divisor of 0": ("nvfp4", "weight_global_scale", lambda t: t.zero_(), "layout"),
    "no divisor": ("nvfp4", "weight_global_scale", None, "layout"),
    "an exponent that is NaN": ("mxfp4", "weight_scale", lambda t: t[3, 1:2].fill_(255), "layout"),
    "no scales": ("mxfp4", "weight_scale", None, "layout"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_verify_finds_a_planted_fault(fault, made, tmp_path):
    name, part, change, check = FAULTS[fault]

    def change_all(tensors: dict[str, torch.Tensor]) -> None:
        if change is None:
            del tensors[f"{SITE}.{part}"]
        else:
            change(tensors[f"{SITE}.{part}"])

    faults = verify(damage(made(name), tmp_path / "damaged", change_all)).faults
    assert {f.check for f in faults} == {check} and any(SITE in f.tensor + f.what for f in faults)


def test_a_checkpoint_of_the_package_itself_is_read(made, tiny_llama, tmp_path):
    """With a divisor that is no power of two, as llm-compressor writes it."""
    from compressed_tensors.compressors import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationScheme

    w = open_checkpoint(str(tiny_llama)).read(f"{SITE}.weight").float()
    divisor = 448 * 6 / w.abs().max()
    scale = (w.view(96, -1, 16).abs().amax(-1) / 6 * divisor).to(torch.float8_e4m3fn)
    config = json.loads((made("nvfp4") / "config.json").read_text())["quantization_config"]
    group = QuantizationScheme(**config["config_groups"]["group_0"])
    state = {"weight": w, "weight_scale": scale.float(), "weight_global_scale": divisor.reshape(1)}
    theirs = NVFP4PackedCompressor.compress(state, group)

    def replaced(tensors: dict[str, torch.Tensor]) -> None:
        for part, value in theirs.items():
            assert tensors[f"{SITE}.{part}"].dtype == value.dtype
            tensors[f"{SITE}.{part}"] = value.contiguous()

    folder = damage(made("nvfp4"), tmp_path / "theirs", replaced)
    found = verify(folder, str(tiny_llama))
    assert found.sound and found.errors[f"{SITE}.weight"] < 0.11
    meant = NVFP4PackedCompressor.decompress(theirs, group)["weight"].float()
    assert torch.allclose(unpacked(open_checkpoint(folder)).read(f"{SITE}.weight"), meant, rtol=2**-8)  # theirs: bf16


@pytest.mark.parametrize("recipe", ["nvfp4", "mxfp6", "mxfp8"])
def test_mxfp4_is_the_same_in_finer_floats_bit_for_bit(recipe, made, tmp_path):
    quantize(make_plan(open_checkpoint(str(made("mxfp4"))), load(recipe)), tmp_path / "out")
    before, after = (unpacked(open_checkpoint(str(folder))) for folder in (made("mxfp4"), tmp_path / "out"))
    assert len(before.linears) == 14 and before.linears.keys() == after.linears.keys()
    for name in before.linears:
        assert torch.equal(before.read(name).float(), after.read(name).float()), name


def test_mxfp4_is_converted_to_gguf_without_loss_and_nvfp4_says_why_not(made, tmp_path):
    from gguf import GGUFReader
    from gguf.quants import dequantize

    plain = unpacked(open_checkpoint(str(made("mxfp4"))))
    convert(make_conversion(open_checkpoint(str(made("mxfp4"))), "gguf"), tmp_path / "gguf")
    stored = {t.name: t for t in GGUFReader(tmp_path / "gguf" / "model.gguf").tensors}
    tensor = stored["blk.1.ffn_up.weight"]
    assert tensor.tensor_type.name == "MXFP4"
    np.testing.assert_array_equal(dequantize(tensor.data, tensor.tensor_type), plain.read(f"{SITE}.weight").numpy())
    refused = dict.fromkeys(("awq", "gptq", "bitsandbytes"), "14 of 14") | {"gguf": "2 of 14.* 96 is no multiple"}
    for form, said in refused.items():
        with pytest.raises(RecipeError, match=f"{form} cannot hold {said}"):
            make_conversion(open_checkpoint(str(made("nvfp4"))), form)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["quantize.group_size=32"], "NVFP4 has groups of 16 columns"),
        (["quantize.scales=plain"], "4-bit floats have `two-level` scales"),
        (["quantize.bits=8"], "`two-level` ones are for floats of 4 bits"),
        (["quantize.bits=6"], "`two-level` ones are for floats of 4 bits"),
        (["quantize.bits=6", "quantize.scales=plain"], "6-bit floats have `power-of-two` scales"),
        (["quantize.bits=5"], "E4M3 with 8 bits, E2M3 with 6 or E2M1 with 4"),
        (["quantize.symmetric=false"], "has no zero points"),
        (["quantize.activations={kind: float}"], "weights with `two-level` scales have inputs with such scales"),
        (["quantize.kind=int", "quantize.group_size=32"], "integers have `two-level` scales in `symmetric: false`"),
        (
            ["quantize.kind=int", "quantize.group_size=32", "quantize.symmetric=false"],
            "compressed-tensors has no two-level scales of integers",
        ),
    ],
)
def test_a_recipe_that_no_format_holds_is_refused(settings, said):
    with pytest.raises(RecipeError, match=said):
        load("nvfp4", settings)


def test_a_width_that_the_groups_do_not_divide_stays_in_16_bits(tools, tmp_path):
    odd = tools.write_llama(tmp_path / "odd", intermediate_size=72)
    plan = make_plan(open_checkpoint(str(odd)), load("nvfp4"))
    kept = {p.site.module: p.reason for p in plan.sites if p.scheme is None}
    assert "72 are no multiple" in kept["model.layers.0.mlp.down_proj"] and len(plan.schemes) == 12
    assert plan.clients == [
        "transformers 5.23 with compressed-tensors 0.20: loads (decoded to 16 bits when it first runs)",
        "vLLM 0.32 (CPU build): has no kernel for nvfp4",
        "vLLM 0.33 (GPU, as documented): loads",
    ]
    assert replace(NVFP4, scale_dtype="bfloat16") in set(plan.schemes.values())
