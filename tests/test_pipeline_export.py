"""Every shipped recipe runs on a tiny model, and what it writes loads in transformers by default."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from libraries import at_least, dense_words
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import outlierq
from outlierq.core.report import Report
from outlierq.load import load_model, open_checkpoint
from outlierq.pipeline.planning.decide import make_plan
from outlierq.recipe import load, shipped

SMALL = ["calibration.samples=6", "calibration.sequence_length=32"]
IDS = torch.randint(3, 259, (2, 24), generator=torch.Generator().manual_seed(5))


def compress(source: Path, out: Path, recipe: str, *settings: str) -> Report:
    """Run a shipped recipe with few, short windows."""
    calibrated = load(recipe).calibration is not None
    return outlierq.quantize(source, recipe, out=out, settings=[*(SMALL if calibrated else []), *settings])


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def as_transformers_loads(folder: Path) -> torch.nn.Module:
    """The way a user loads it: no extra argument."""
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def check_loads(folder: Path) -> torch.nn.Module:
    """Transformers and our own loader agree on the logits, and it generates. Returns transformers' model."""
    theirs = as_transformers_loads(folder)
    ours = load_model(open_checkpoint(str(folder)), dtype=str(theirs.dtype).removeprefix("torch."))
    with torch.no_grad():
        found, expected = theirs(IDS).logits, ours(IDS).logits
    assert torch.isfinite(found).all()
    if rounds_at_run_time(folder):
        # Inputs are rounded in 16 bits there and in float32 here; test_activation_schemes.py compares in float32.
        # Four bits hold so few values that the scale matters: max / 7.5 there, max / 7 here (see test_rotate.py).
        limit = 0.4 if input_bits(folder) == 4 else 0.1
        assert (found - expected).float().norm() < limit * expected.float().norm()
    else:
        # Both decode codes x scales into the checkpoint's own dtype, so that not even rounding differs.
        assert torch.equal(found, expected)
    generated = theirs.generate(IDS[:1], attention_mask=torch.ones_like(IDS[:1]), max_new_tokens=4, do_sample=False)
    assert generated.shape[1] > IDS.shape[1]
    return theirs


def input_bits(folder: Path) -> int:
    """Bits of the narrowest inputs, 16 where none are rounded."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    groups = config["config_groups"].values()
    return min(((g["input_activations"] or {}).get("num_bits", 16) for g in groups), default=16)


def rounds_at_run_time(folder: Path) -> bool:
    """Whether inputs or the KV cache are rounded in every forward."""
    config = json.loads((folder / "config.json").read_text()).get("quantization_config") or {}
    groups = (config.get("config_groups") or {}).values()
    return bool(config.get("kv_cache_scheme")) or any(group.get("input_activations") for group in groups)


def test_there_are_shipped_recipes():
    assert {"rtn-w4", "rtn-w8", "gptq-w4", "gptq-w3", "awq-w4", "awq-gptq-w4", "dense"} <= shipped().keys()


# The other formats need clients of their own, and have tests of their own.
# Recipes that prune need a mixture of experts (see test_moe.py).
THREE_BITS = ("gptq-w3", "best-w3")
PLAIN_TRANSFORMERS = [
    name
    for name in sorted(shipped())
    if load(name).export.format in ("compressed-tensors", "dense") and not load(name).pruning
]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=dense_words) if name in THREE_BITS else name for name in PLAIN_TRANSFORMERS]
)
def test_every_shipped_recipe_is_planned_to_the_byte_and_loads_in_transformers(name, tiny_llama, tmp_path):
    out = tmp_path / "out"
    report = compress(tiny_llama, out, name)
    written = sum(path.stat().st_size for path in out.iterdir() if path.name != "outlierq.json")
    assert report.output_bytes == written
    assert not (tmp_path / "out.partial").exists()
    theirs = check_loads(out)
    tied = theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    # A rotation of the residual stream needs both ends of the model to be of different weights; other rewrites do not.
    assert tied == (not any(step.options.get("residual", False) for step in load(name).rewrites))


def test_config_tokenizer_chat_template_and_other_files_are_carried_over(tiny_llama, tmp_path):
    out = tmp_path / "out"
    compress(tiny_llama, out, "rtn-w4")
    names = {path.name for path in tiny_llama.iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json", "LICENSE", "README.md"} <= names
    assert {path.name for path in out.iterdir()} == names | {"outlierq.json"}
    for name in names - {"config.json", "model.safetensors"}:
        assert (out / name).read_bytes() == (tiny_llama / name).read_bytes(), name
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (tiny_llama, out))
    assert after.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert after == before
    tokenizer = AutoTokenizer.from_pretrained(out)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "sea"}], tokenize=False)
    assert chat == "<|user|>sea</s>"


def test_every_source_tensor_is_copied_bit_for_bit_or_replaced_by_its_packed_parts(untied_llama, tmp_path):
    out = tmp_path / "out"
    report = compress(untied_llama, out, "rtn-w4")
    before, after = tensors_of(untied_llama), tensors_of(out)
    replaced = {f"{row.site}.weight" for row in report.rows}
    assert len(replaced) == 3 * 7
    for name, tensor in before.items():
        if name not in replaced:
            assert torch.equal(after.pop(name), tensor), name
    parts = {f"{row.site}.weight_{part}" for row in report.rows for part in ("packed", "scale", "shape")}
    assert after.keys() == parts


def test_the_report_says_where_from_how_and_how_well(tiny_llama, tmp_path):
    out = tmp_path / "out"
    returned = compress(tiny_llama, out, "awq-gptq-w4")
    values = json.loads((out / "outlierq.json").read_text())
    report = Report.from_dict(values)
    assert report == replace(returned, seconds=report.seconds, peak_bytes=report.peak_bytes)
    assert report.fingerprint == open_checkpoint(str(tiny_llama)).fingerprint
    assert report.recipe == "awq-gptq-w4" and report.model == str(tiny_llama)
    assert report.seeds == {"calibration": 0}
    assert report.versions.keys() >= {
        "outlierq",
        "torch",
        "transformers",
        "safetensors",
        "compressed-tensors",
        "python",
    }
    assert len(report.rows) == 14 and all(0 < row.output_error < 0.1 for row in report.rows)
    # 4-bit codes and one 16-bit scale for 64 or 32 weights.
    assert {row.bits_per_weight for row in report.rows} == {4.25, 4.5}
    assert any("96 columns are not a multiple of group_size 128" in note for note in report.notes)
    folded = [row for row in report.transforms if row["fold"]]
    assert len(report.transforms) == 8 and len(folded) >= 4


def test_a_data_free_recipe_reports_no_output_error(tiny_llama, tmp_path):
    report = compress(tiny_llama, tmp_path / "out", "rtn-w4")
    assert all(row.output_error is None and 0 < row.weight_error < 0.2 for row in report.rows)
    assert report.seeds == {} and report.transforms == ()


ASYMMETRIC = "quantize.symmetric=false"
EIGHT_BITS_BELOW = "quantize.overrides=[{match: '*layers.0.mlp*', bits: 8, group_size: channel}]"
KEPT_BELOW = "quantize.overrides=[{match: '*layers.1.self_attn.v_proj', keep: true}]"


@pytest.mark.parametrize(
    ("model", "recipe", "settings"),
    [
        ("tiny_llama", "rtn-w4", [ASYMMETRIC, "quantize.group_size=32"]),
        pytest.param("untied_llama", "gptq-w3", [ASYMMETRIC, "quantize.group_size=32"], marks=dense_words),
        pytest.param("untied_llama", "rtn-w8", [ASYMMETRIC, "quantize.bits=5"], marks=dense_words),
        ("tiny_llama", "rtn-w8", [ASYMMETRIC]),
        ("untied_llama", "rtn-w4", [EIGHT_BITS_BELOW]),
        pytest.param("tiny_llama", "rtn-w4", [KEPT_BELOW, "quantize.bits=3"], marks=dense_words),
        ("tiny_llama", "gptq-w4", ["calibration.mode=sequential", EIGHT_BITS_BELOW]),
        ("untied_llama", "rtn-w4", ["quantize.when_indivisible=keep", "quantize.group_size=64"]),
        ("tiny_llama", "rtn-w4", ["quantize.when_indivisible=per-channel", "quantize.bits=2"]),
        ("untied_llama", "awq-w4", ["export.format=dense", "quantize.bits=8"]),
    ],
)
def test_other_schemes_load_in_transformers_too(model, recipe, settings, request, tmp_path):
    out = tmp_path / "out"
    compress(request.getfixturevalue(model), out, recipe, *settings)
    check_loads(out)


@dense_words
def test_a_quantized_head_loads_in_transformers(untied_llama, tmp_path):
    out = tmp_path / "out"
    report = compress(untied_llama, out, "gptq-w4", "quantize.ignore=[]", "quantize.bits=3")
    head = next(row for row in report.rows if row.site == "lm_head")
    assert "no statistics" in head.note and any("lm_head" in note for note in report.notes)
    check_loads(out)


def clients(source: Path, *settings: str) -> str:
    return "\n".join(make_plan(open_checkpoint(str(source)), load("rtn-w4", list(settings))).clients)


def test_the_plan_says_which_clients_load_it(tiny_llama):
    assert "vLLM 0.32 (CPU build): loads" in clients(tiny_llama)
    assert "vLLM 0.32 (CPU build): has no kernel for 3-bit weights" in clients(tiny_llama, "quantize.bits=3")
    assert "dequantized at load" in clients(tiny_llama, ASYMMETRIC, "quantize.group_size=32")
    assert "every client" in clients(tiny_llama, "export.format=dense")


@pytest.mark.parametrize("extra", [[], ["quantize.group_size=32", EIGHT_BITS_BELOW]])
def test_several_schemes_with_zero_points_do_not_load_in_transformers_and_the_plan_says_so(extra, tiny_llama, tmp_path):
    settings = [ASYMMETRIC, *extra]
    assert "does not load 2 schemes of which some are asymmetric" in clients(tiny_llama, *settings)
    out = tmp_path / "out"
    report = compress(tiny_llama, out, "rtn-w4", *settings)
    # Loudly: without `dequantize` in its config, which would decode every linear with the first scheme.
    if at_least("transformers", "5.23"):  # earlier ones say nothing
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            as_transformers_loads(out)
    # We load it: every weight is as near to its source as the report says.
    ours, source = load_model(open_checkpoint(str(out))), tensors_of(tiny_llama)
    for row in report.rows:
        found, expected = ours.get_submodule(row.site).weight, source[f"{row.site}.weight"].float()
        assert torch.linalg.norm(found - expected) / torch.linalg.norm(expected) == pytest.approx(
            row.weight_error, rel=1e-3
        )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8, *(pytest.param(bits, marks=dense_words) for bits in (3, 5, 6, 7))])
def test_packed_bytes_are_those_of_the_compressed_tensors_package(bits, symmetric):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    from outlierq.core.model import LinearSite
    from outlierq.core.quant_tensor import QuantTensor
    from outlierq.core.scheme import QuantScheme
    from outlierq.export import format_type

    scheme = QuantScheme(bits, 32, symmetric)
    rng = torch.Generator().manual_seed(bits)
    codes = torch.randint(scheme.code_min, scheme.code_max + 1, (37, 96), generator=rng).to(torch.int16)
    zero = None if symmetric else torch.randint(0, scheme.code_max + 1, (37, 3), generator=rng).to(torch.uint8)
    quantized = QuantTensor(codes, torch.rand(37, 3, generator=rng).bfloat16(), zero, scheme)
    site = LinearSite("layer", "layer.weight", None, 37, 96, 0)
    found = format_type("compressed-tensors")({}).encode(site, quantized)
    offset = 0 if symmetric else 1 << (bits - 1)  # the package holds asymmetric codes shifted to signed ones
    signed = (codes - offset).to(torch.int8)
    assert torch.equal(found["layer.weight_packed"], pack_to_int32(signed, bits))
    if zero is not None:
        shifted = (zero.to(torch.int16) - offset).to(torch.int8)
        assert torch.equal(found["layer.weight_zero_point"], pack_to_int32(shifted, bits, packed_dim=0))


def test_written_shards_open_in_the_safetensors_library(untied_llama, tmp_path):
    out = tmp_path / "out"
    compress(untied_llama, out, "rtn-w4", "export.max_shard_size=50KB")
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(shards) > 2 and set(index.values()) == set(shards)
    for shard in shards:
        with safe_open(out / shard, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert {name for name in file.keys()} == {n for n, where in index.items() if where == shard}  # noqa: SIM118, C416
    check_loads(out)
