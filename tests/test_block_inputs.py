"""Inputs in blocks with scales of their own, NVFP4, MXFP4 and MXFP8, against the package, from recipe to file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from outlierq.core.errors import OutlierqError, RecipeError
from outlierq.core.scheme import FP4_MAX, FP8_MAX, ActivationScheme, QuantScheme
from outlierq.load import load_model, open_checkpoint, unpacked
from outlierq.ops.activations import fake_quantize, mx_scale, unit_that_holds
from outlierq.pipeline.convert import convert, make_conversion
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.quantize import quantize
from outlierq.pipeline.verify import verify
from outlierq.recipe import load
from outlierq.registry import method

SCHEMES = {
    "NVFP4": ActivationScheme("float", 4, False, "group", 16, "two-level"),
    "MXFP4": ActivationScheme("float", 4, True, "group", 32, "power-of-two"),
    "MXFP8": ActivationScheme("float", 8, True, "group", 32, "power-of-two"),
}
RECIPES = ("nvfp4-w4a4", "mxfp4-w4a4", "mxfp4-w4a8", "mxfp8", "w4afp8")
SMALL = ["calibration.samples=4", "calibration.sequence_length=32"]


def blocks() -> dict[str, torch.Tensor]:
    """Values [256, 128] of every kind that rounding could get wrong."""
    make = torch.Generator().manual_seed(0)
    normal = torch.randn(256, 128, generator=make)
    return {
        "normal": normal,
        "heavy tails": normal / torch.rand(256, 128, generator=make).clamp(min=1e-3),
        "zeros": torch.zeros(256, 128),
        "blocks of zeros": normal * (torch.arange(128) < 64),
        "ties": torch.randint(-24, 25, (256, 128), generator=make) / 4,
        "tiny": normal * 1e-30,
        "huge": normal * 1e30,
        "powers": torch.exp2(torch.randint(-20, 20, (256, 128), generator=make).float()) * 1.75,
        "an outlier": normal.index_fill(1, torch.tensor([5]), 3e4),
    }


@pytest.mark.parametrize("kind", blocks())
@pytest.mark.parametrize("name", SCHEMES)
def test_rounding_is_that_of_the_package_bit_for_bit(name, kind):
    from compressed_tensors.quantization import quant_scheme
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize as theirs
    from compressed_tensors.quantization.utils.helpers import compute_dynamic_scales_and_zp, generate_gparam

    x, said = blocks()[kind], getattr(quant_scheme, name)["input_activations"]
    unit = generate_gparam(x.min(), x.max()) if name == "NVFP4" else None
    scale, zero = compute_dynamic_scales_and_zp(x, said, torch.nn.Linear(1, 1), global_scale=unit)
    assert torch.equal(fake_quantize(x, SCHEMES[name], unit), theirs(x, scale, zero, said, global_scale=unit))


# Signal over noise in dB for Gauss, Laplace and Student's t with 4 degrees of freedom, from an independent computation
# with two million samples. Weights: (scheme, scale search); inputs: a scheme.
MX4, NV4 = (QuantScheme(4, size, kind="float", scales=kind) for size, kind in ((32, "power-of-two"), (16, "two-level")))
NOISE = {
    "MXFP4, next power above": ((MX4, "minmax"), (18.76, 17.58, 17.13)),
    "MXFP4, the better power": ((MX4, "mse"), (19.05, 18.22, 17.88)),
    "NVFP4": ((NV4, "minmax"), (20.44, 20.66, 20.74)),
    "MXFP6": ((QuantScheme(6, 32, kind="float", scales="power-of-two"), "minmax"), (30.94, 30.28, 29.97)),
    "INT4 in groups of 16": ((QuantScheme(4, 16, scale_dtype="float32"), "minmax"), (21.39, 19.91, 19.51)),
    "INT4 in groups of 128": ((QuantScheme(4, 128, scale_dtype="float32"), "minmax"), (18.61, 15.91, 14.30)),
    "INT4 with zero points": ((QuantScheme(4, 128, False, "float32"), "minmax"), (19.95, 17.71, 16.76)),
    "MXFP4, inputs": (SCHEMES["MXFP4"], (19.03, 18.14, 17.78)),
    "NVFP4, inputs": (SCHEMES["NVFP4"], (20.44, 20.66, 20.74)),
    "MXFP8, inputs": (SCHEMES["MXFP8"], (31.52, 31.53, 31.52)),
}


def samples() -> list[torch.Tensor]:
    """[256, 4096] of each distribution."""
    make = torch.Generator().manual_seed(7)
    normal = torch.randn(5, 256, 4096, generator=make)
    laplace = torch.rand(256, 4096, generator=make).mul_(2).sub_(1)
    laplace = -laplace.sign() * (1 - laplace.abs()).clamp_(min=1e-7).log()
    return [normal[0], laplace, 0.7 * normal[0] / normal[1:].square().mean(0).sqrt()]


QUICK = ("MXFP4, inputs", "NVFP4, inputs", "MXFP8, inputs")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NOISE])
def test_noise_is_that_of_the_reference_within_a_tenth_of_a_decibel(name, shaped):
    how, expected = NOISE[name]
    for x, decibels in zip(shaped, expected, strict=True):
        if isinstance(how, tuple):
            y = method("quantize", "rtn").function(x.clone(), None, how[0], scale_search=how[1]).dequantize()
        else:
            y = fake_quantize(x, how, unit_that_holds(x.abs().amax(), how) if how.scales == "two-level" else None)
        found = 10 * (x.square().mean() / (y - x).square().mean()).log10()
        assert abs(found - decibels) < 0.1, (name, decibels, found)


@pytest.fixture(scope="module")
def shaped() -> list[torch.Tensor]:
    """Of `samples`."""
    return samples()


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMES)
def test_a_million_blocks_are_rounded_as_the_package_rounds_them(name):
    """Random ones and those of `blocks`, in whatever order."""
    from compressed_tensors.quantization import quant_scheme
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize as theirs
    from compressed_tensors.quantization.utils.helpers import compute_dynamic_scales_and_zp, generate_gparam

    said, make = getattr(quant_scheme, name)["input_activations"], torch.Generator().manual_seed(1)
    parts = [x for kind, x in blocks().items() if kind != "huge" or name != "NVFP4"]
    for _ in range((SCHEMES[name].group_size << 20) // (1 << 21)):
        sizes = torch.exp2(torch.randint(-12, 12, (1 << 14, 1), generator=make).float())
        x = torch.cat([torch.randn(1 << 14, 128, generator=make) * sizes, *parts])
        unit = generate_gparam(x.min(), x.max()) if name == "NVFP4" else None
        scale, zero = compute_dynamic_scales_and_zp(x, said, torch.nn.Linear(1, 1), global_scale=unit)
        assert torch.equal(fake_quantize(x, SCHEMES[name], unit), theirs(x, scale, zero, said, global_scale=unit))


def test_the_power_of_a_block_rises_where_its_largest_value_would_not_fit():
    largest = torch.tensor([4.0, 6.0, 6.99, 7.0, 8.0, 447.0, 448.0, 0.0])
    assert mx_scale(largest, 4).tolist() == [1, 1, 1, 2, 2, 64, 128, 1]
    assert mx_scale(largest, 8)[5:7].tolist() == [1, 2]
    assert mx_scale(torch.tensor([float("inf"), float("nan")]), 4).isnan().all()


@pytest.fixture(scope="module")
def made(tiny_llama, tmp_path_factory) -> Callable[[str], Path]:
    """A checkpoint by recipe. Read-only."""
    known: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in known:
            known[name] = tmp_path_factory.mktemp(name) / "out"
            recipe = load(name, SMALL if load(name).calibration else [])
            quantize(make_plan(open_checkpoint(str(tiny_llama)), recipe), known[name])
        return known[name]

    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_is_written_verified_and_declared_as_the_package_declares_it(name, made, tiny_llama):
    from compressed_tensors.quantization import QuantizationScheme, quant_scheme

    found = verify(str(made(name)), str(tiny_llama))
    assert found.sound and found.linears == 14
    config = json.loads((made(name) / "config.json").read_text())["quantization_config"]
    group = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    presets = {"nvfp4-w4a4": "NVFP4", "mxfp4-w4a4": "MXFP4", "mxfp8": "MXFP8", "w4afp8": "W4AFP8"}
    preset = getattr(quant_scheme, presets.get(name, "MXFP4"))
    inputs = quant_scheme.MXFP8["input_activations"] if name == "mxfp4-w4a8" else preset["input_activations"]
    for ours, theirs in ((group.weights, preset["weights"]), (group.input_activations, inputs)):
        for key in ("num_bits", "type", "symmetric", "strategy", "dynamic", "scale_dtype"):
            assert getattr(ours, key) == getattr(theirs, key), key


@pytest.mark.parametrize("name", RECIPES)
def test_transformers_loads_the_weights_that_we_decode_and_rounds_inputs(name, made):
    from transformers import AutoModelForCausalLM

    # The package decodes blocks to 16 bits, whatever is asked; scales of tokens it computes in the dtype of the inputs.
    dtype = torch.float32 if name == "w4afp8" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(made(name), dtype=dtype)
    stored = open_checkpoint(str(made(name)))
    plain, ids = unpacked(stored), torch.arange(3, 40)[None]
    with torch.no_grad():
        theirs = model(ids).logits
        ours = load_model(stored, dtype=str(dtype).removeprefix("torch."))(ids).logits
    for weight in plain.linears:
        assert torch.equal(model.get_submodule(weight.removesuffix(".weight")).weight, plain.read(weight).to(dtype))
    if name == "nvfp4-w4a4":  # the package computes its E4M3 scales in 16 bits, vLLM's kernels, as we do, in 32
        assert torch.nn.functional.cosine_similarity(theirs.float(), ours.float(), -1).min() > 0.95
    else:
        assert torch.equal(theirs, ours)


def test_linears_of_one_input_share_the_unit_that_holds_what_calibration_saw(made):
    stored = open_checkpoint(str(made("nvfp4-w4a4")))
    for parts in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        units = [stored.read(f"model.layers.1.{part}.input_global_scale") for part in parts]
        assert all(unit.dtype == torch.float32 and unit.shape == (1,) for unit in units)
        assert len({unit.item() for unit in units}) == 1
        assert 1e-3 < FP4_MAX * FP8_MAX / units[0].item() < 1e3


def test_codes_and_units_survive_a_conversion(made, tmp_path):
    out = tmp_path / "out"
    convert(make_conversion(open_checkpoint(str(made("nvfp4-w4a4"))), "compressed-tensors"), out)
    one, other = open_checkpoint(str(made("nvfp4-w4a4"))), open_checkpoint(str(out))
    assert set(one.tensors) == set(other.tensors)
    assert all(
        torch.equal(one.read(name).view(torch.uint8), other.read(name).view(torch.uint8)) for name in one.tensors
    )


def changed(folder: Path, out: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A copy without report in which one tensor is another."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, out)
    (out / "outlierq.json").unlink()
    tensors = load_file(out / "model.safetensors")
    save_file(tensors | {name: change(tensors[name].clone())}, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("linear", ["self_attn.q_proj", "mlp.down_proj"])
def test_a_unit_of_inputs_that_is_none_is_found(linear, factor, made, tmp_path):
    name = f"model.layers.1.{linear}.input_global_scale"
    found = verify(str(changed(made("nvfp4-w4a4"), tmp_path / "out", name, lambda unit: unit * factor)))
    assert name in {fault.tensor for fault in found.faults}


def a_byte(tensor: torch.Tensor, byte: int) -> torch.Tensor:
    """The tensor with this byte for one number of its last row."""
    tensor.view(torch.uint8)[-1, 3 % tensor.shape[1]] = byte
    return tensor


@pytest.mark.parametrize(("part", "byte"), [("weight_scale", 255), ("weight", 0x7F), ("weight", 0xFF)])
def test_a_nan_in_any_row_of_mxfp8_is_found_and_named(part, byte, made, tmp_path):
    module = "model.layers.1.mlp.down_proj"
    folder = changed(made("mxfp8"), tmp_path / "in", f"{module}.{part}", lambda tensor: a_byte(tensor, byte))
    assert any(module in fault.tensor for fault in verify(str(folder)).faults)
    stored = open_checkpoint(str(folder))
    for work in (
        lambda: make_conversion(stored, "compressed-tensors"),
        lambda: quantize(make_plan(stored, load("rtn-w4")), tmp_path / "out"),
        lambda: load_model(stored, dtype="float32"),
    ):
        with pytest.raises(OutlierqError, match="NaN") as refused:
            work()
        assert module in str(refused.value)


@pytest.mark.parametrize(
    ("recipe", "settings", "said"),
    [
        ("nvfp4-w4a4", ["quantize.activations.dynamic=true"], "their unit is fixed from calibration"),
        ("nvfp4-w4a4", ["quantize.activations.bits=8"], "no client multiplies 4-bit weights with 8-bit inputs"),
        ("nvfp4-w4a4", ["quantize.activations.per=token"], "belong to `kind: float` and `per: group`"),
        ("mxfp4-w4a4", ["quantize.activations.scales=two-level"], "need float weights with such scales"),
        ("mxfp4-w4a4", ["quantize.activations.dynamic=false"], "powers of two are computed at run time"),
        ("mxfp8", ["quantize.activations.bits=4"], "no client multiplies 8-bit weights with 4-bit inputs"),
        ("mxfp8", ["quantize.group_size=64"], "MXFP8 has groups of 32 columns"),
        ("w4afp8", ["quantize.symmetric=false"], "quantized inputs need symmetric weights"),
        ("rtn-w8", ["quantize.activations={kind: float}"], "must be that of the weights, int"),
    ],
)
def test_what_no_client_multiplies_is_refused_before_work(recipe, settings, said):
    with pytest.raises(RecipeError, match=said):
        load(recipe, settings)
