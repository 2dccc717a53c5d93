"""Models of unusual shape: what one fault in reading configs or names would keep out."""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from libraries import decoded_first, decoder_of_parts, skip_unless_known
from safetensors.torch import load_file, save_file

import outlierq
from outlierq.calibrate.runner import BlockRunner, PartWeights
from outlierq.core.errors import RecipeError, SourceError
from outlierq.core.model import largest, sizes
from outlierq.load import build_skeleton, checkpoint_names, load_tensors_into, open_checkpoint, packed_fault, study
from outlierq.load.model.conversion.class_named import class_named
from outlierq.load.model.rounds import most_called
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.quantize import quantize
from outlierq.recipe import load

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from coverage_models import architectures, auto_class, tiny_config, tiny_model, tokens, write_checkpoint

FEW = {"calibration.samples": 4, "calibration.sequence_length": 32}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function from a model type to the folder of its tiny model, made once; read-only."""
    folders: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in folders:
            skip_unless_known(name, architectures())
            folders[name] = tmp_path_factory.mktemp(name) / "source"
            write_checkpoint(tiny_model(name, architectures()[name]), folders[name])
        return folders[name]

    return folder


def with_config(source: Path, folder: Path, **changes) -> Path:
    """A copy of a model whose config.json says something else."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_size_that_differs_by_layer_is_told_for_all_layers():
    config = tiny_config("gemma4_text")
    assert sorted(sizes(config, "head_dim")) == [32, 64] and largest(config, "head_dim") == 64
    assert sizes(config, "no_such_key") == [] and largest(config, "no_such_key", 7) == 7


@pytest.mark.parametrize("name", ["gemma4_text", "falcon_h1", "jamba"])
def test_configs_with_sizes_by_layer_infinities_and_no_positions_at_all_are_planned(name, made):
    plan = make_plan(open_checkpoint(str(made(name))), load("rtn-w8"))
    assert all(p.scheme is not None or p.site.module == "lm_head" or p.site.kind == "Router" for p in plan.sites)


def test_the_config_is_written_as_it_was_read_infinity_included(made):
    plan = make_plan(open_checkpoint(str(made("falcon_h1"))), load("rtn-w8"))
    written, read = (
        json.loads(plan.small_files["config.json"]),
        json.loads((made("falcon_h1") / "config.json").read_text()),
    )
    assert {"__float__": "Infinity"} in read["time_step_limit"]
    assert {key: value for key, value in written.items() if key != "quantization_config"} == read


def test_a_long_context_is_refused_where_tables_of_it_are_made_and_nowhere_else(made, tmp_path):
    long = with_config(made("jamba"), tmp_path / "jamba", max_position_embeddings=1 << 20)
    assert make_plan(open_checkpoint(str(long)), load("rtn-w8")).schemes
    masks = with_config(made("gpt_neo"), tmp_path / "masks", max_position_embeddings=1 << 20)
    with pytest.raises(SourceError, match=r"asks for tables of [\d,]+ bytes before any weight is read"):
        build_skeleton(open_checkpoint(str(masks)))


def test_a_parameter_that_is_joined_of_stored_tensors_is_filled_and_written_by_their_names(made, tmp_path):
    source = made("kimi_linear")
    checkpoint = open_checkpoint(str(source))
    skeleton = build_skeleton(checkpoint)
    load_tensors_into(skeleton, checkpoint, checkpoint_names(checkpoint, skeleton))
    from transformers import AutoModelForCausalLM

    ids = tokens(torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    joined = [name for name, _ in model.named_parameters() if "conv1d" in name]
    assert joined
    for name in joined:
        assert torch.equal(skeleton.get_submodule(name.removesuffix(".weight")).weight, model.get_parameter(name))
    with torch.no_grad():
        ours, theirs = (each.float()(ids, use_cache=False).logits for each in (skeleton, model))
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()
    quantize(make_plan(checkpoint, load("fp8-dynamic")), tmp_path / "out")
    pieces = [name for name in open_checkpoint(str(tmp_path / "out")).tensors if "conv1d" in name]
    assert sorted(pieces) == sorted(n for n in checkpoint.tensors if "conv1d" in n) and len(pieces) == 6


@pytest.mark.parametrize("name", ["kimi_k25", "mistral_large4", "minimax_m3_vl", "step3p7"])
def test_parameters_that_transformers_splits_permutes_or_joins_are_made_as_it_makes_them(name, made, tmp_path):
    checkpoint = open_checkpoint(str(made(name)))
    skeleton = build_skeleton(checkpoint)
    load_tensors_into(skeleton, checkpoint, checkpoint_names(checkpoint, skeleton))
    model = auto_class("multimodal", name).from_pretrained(made(name), dtype=torch.bfloat16).eval()
    own = dict(skeleton.named_parameters())
    parts = [(key, value) for key, value in model.named_parameters() if key not in own and ".experts." not in key]
    assert parts
    for key, value in parts:
        owner, _, leaf = key.rpartition(".")
        assert torch.equal(getattr(skeleton.get_submodule(owner), leaf), value)
    ids = tokens(torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (each.float()(input_ids=ids, use_cache=False).logits for each in (skeleton, model))
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()
    quantize(make_plan(checkpoint, load("fp8-dynamic")), tmp_path / "out")
    after = open_checkpoint(str(tmp_path / "out")).tensors
    assert {key for key in checkpoint.tensors if key not in after} == set()
    assert not outlierq.verify(tmp_path / "out").faults


def test_a_linear_that_is_joined_of_linears_is_quantized_piece_by_piece_and_copied_with_them(made):
    plan = make_plan(open_checkpoint(str(made("minimax_m3_vl"))), load("fp8-dynamic"))
    shared = [p for p in plan.sites if "shared_experts" in p.site.module]
    assert len(shared) == 3 * 4 and all(p.scheme is not None and "gate_up" not in p.site.module for p in shared)
    mlp = plan.model.skeleton.get_submodule(plan.model.structure.blocks[0].name).mlp.shared_experts
    copied = copy.deepcopy(mlp).to_empty(device="cpu")
    with torch.no_grad():
        for number, parameter in enumerate(copied.parameters()):
            parameter.fill_(number + 1.0)
        x = torch.ones(1, copied.gate_proj.in_features, dtype=torch.bfloat16)
        given = copied.gate_up_proj(x)
    assert torch.equal(given, torch.cat([copied.gate_proj(x), copied.up_proj(x)], -1)) and given.unique().numel() == 2
    assert copied.gate_up_proj.weight.shape == (2 * copied.gate_proj.out_features, copied.gate_proj.in_features)


def test_experts_of_a_tower_that_are_called_otherwise_do_not_name_those_of_the_decoder(made):
    plan = make_plan(open_checkpoint(str(made("dots3_note"))), load("rtn-w8"))
    experts = [p for p in plan.sites if p.site.expert is not None]
    assert len(experts) == 3 * 4 * 3 and all(p.scheme is not None for p in experts)


@decoder_of_parts
def test_parts_that_share_their_experts_are_refused_in_one_sentence(made):
    with pytest.raises(SourceError, match="shares the experts of several parts as whole tensors"):
        make_plan(open_checkpoint(str(made("diffusion_gemma"))), load("rtn-w8"))


def test_a_model_type_that_shares_its_class_with_another_one_is_no_fault(made, tmp_path):
    outlierq.quantize(made("pp_chart2table"), "rtn-w8", out=tmp_path / "out")
    assert not outlierq.verify(tmp_path / "out").faults


@pytest.mark.parametrize(
    ("name", "why", "dense"),
    [
        ("llama", None, False),
        ("kimi_k25", None, False),
        ("minimax_m3_vl", "cannot join packed weights", False),
        ("qianfan_ocr", "it splits attn.qkv.weight as it loads", False),
        ("nanochat", "initialises weights by a name that packed ones do not have", True),
        ("kimi_linear", "which it joins with others", False),
        ("hy_v4", "in float32, and so the weight made of it", False),
        ("ctrl", "gives transformer.pos_encoding its dtype as it runs", True),
    ],
)
def test_the_plan_says_whether_the_class_can_hold_packed_weights_and_the_config_asks_for_what_loads(
    name, why, dense, made
):
    plan = make_plan(open_checkpoint(str(made(name))), load("rtn-w8"))
    said = next(line for line in plan.clients if line.startswith("transformers"))
    config = json.loads(plan.small_files["config.json"])["quantization_config"]
    assert config.get("dequantize", False) is dense
    assert said.endswith(": loads") if why is None else why in said and ("loads (dequantized" in said) is dense


@pytest.mark.parametrize(
    ("name", "split"), [("kimi_linear", None), ("hrm_text", "gqkv_proj"), ("inkling_mm_model", "w2_md")]
)
def test_under_the_names_of_its_class_a_model_loads_whose_tensors_transformers_splits_or_joins(
    name, split, made, tmp_path
):
    plan = make_plan(open_checkpoint(str(made(name))), load("rtn-w8"))
    assert any(line.endswith("export.names: class writes what it loads") for line in plan.clients)
    outlierq.quantize(made(name), "rtn-w8", out=tmp_path / "out", settings={"export.names": "class"})
    assert not outlierq.verify(tmp_path / "out", made(name)).faults
    names = outlierq.open(tmp_path / "out").tensors
    assert split is None or not any(split in name for name in names)
    ids = tokens(torch.Generator().manual_seed(0))
    one, other = (logits(folder, ids, name) for folder in (tmp_path / "out", made(name)))
    assert (other.exp() * (other - one)).sum(-1).mean() < 0.3  # random routers turn; shuffled weights make 7


def test_the_names_of_the_class_change_nothing_where_they_are_those_of_the_file(made):
    checkpoint = open_checkpoint(str(made("llama")))
    assert class_named(checkpoint) is checkpoint


def test_a_model_that_runs_its_blocks_in_rounds_is_refused_before_work_where_calibration_is_needed(made):
    with pytest.raises(SourceError, match=r"HrmTextForCausalLM runs its block \S+ more than once \(6 times\)"):
        make_plan(open_checkpoint(str(made("hrm_text"))), load("awq-gptq-w4"))


def test_the_head_does_not_run_for_that(made):
    """Torch would copy it: a gigabyte, for a vocabulary of 128k at width 4096."""
    model = study(open_checkpoint(str(made("llama"))))
    ran = []
    model.skeleton.lm_head.forward = lambda *_: ran.append("head")
    assert most_called(model.skeleton)[1] == 1 and not ran


def test_weights_that_keep_their_names_load_everywhere(made):
    assert packed_fault(study(open_checkpoint(str(made("nanochat")))), ["model.layers.0.mlp.fc1.weight"], []) is None


def test_weights_do_not_load_whose_scales_transformers_knows_by_no_name(made, tmp_path, monkeypatch):
    """A table that renames "w2.weight" as a whole leaves "w2.weight_scale" as it is."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    folder, renamed = with_config(made("llama"), tmp_path / "renamed"), re.compile(r"mlp\.down_proj")
    weights = load_file(folder / "model.safetensors")
    save_file({renamed.sub("mlp.w2", key): value for key, value in weights.items()}, folder / "model.safetensors")
    table = [WeightRenaming(r"mlp\.w2\.weight$", "mlp.down_proj.weight")]
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda *_, **__: table)
    plan = make_plan(open_checkpoint(str(folder)), load("rtn-w8"))
    said = next(line for line in plan.clients if line.startswith("transformers"))
    assert "does not load it: it has another name for model.layers.0.mlp.w2.weight" in said
    assert said.endswith("export.names: class writes what it loads")
    plan = make_plan(open_checkpoint(str(folder)), load("rtn-w8", ["export.names=class"]))
    assert any("mlp.down_proj.weight_packed" in name for name in plan.layout.places)


SMALL = {"calibration.samples": 4, "calibration.sequence_length": 48}


def quantized(source: Path, out: Path, recipe: str = "awq-gptq-w4", **settings) -> tuple[dict, dict]:
    """The report and the config of a run with little text."""
    outlierq.quantize(source, recipe, out=out, settings=SMALL | settings, device="cpu")
    return json.loads((out / "outlierq.json").read_text()), json.loads((out / "config.json").read_text())


def logits(folder: Path, ids: torch.Tensor, name: str = "llama") -> torch.Tensor:
    """Log-probabilities of the model in a folder, as transformers loads one of its type."""
    auto = auto_class(architectures()[name], name)
    model, info = auto.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        return model.eval()(ids, use_cache=False).logits.float().log_softmax(-1)


@pytest.mark.parametrize("name", ["gemma3n_text", "deepseek_v4"])
def test_hidden_states_in_several_streams_are_carried_from_block_to_block(name, made):
    """Four streams, before the sequences or behind the tokens; batches of two and of one give the same."""
    checkpoint = open_checkpoint(str(made(name)))
    model = study(checkpoint)
    load_tensors_into(model.skeleton, checkpoint, model.names, dtype="float32")
    ids = tokens(torch.Generator().manual_seed(3), sequences=3)
    ends = []
    for batch_size in (1, 2):
        nothing = PartWeights(lambda name: None, lambda name: None)
        runner = BlockRunner(model.skeleton, model.structure, nothing, dtype=torch.float32, batch_size=batch_size)
        hidden = runner.start(ids)
        assert len(hidden.values) == 3 and hidden.values.numel() == 3 * 48 * 4 * 128
        for block in model.structure.blocks:
            runner.run(model.skeleton.get_submodule(block.name), block.index, hidden)
        ends.append(hidden.values.clone())
    assert torch.allclose(ends[0], ends[1], atol=1e-4) and ends[0].std() > 0


def test_a_weight_whose_module_is_never_called_is_rounded_and_says_so_and_may_be_ignored(made, tmp_path):
    report, _ = quantized(made("jamba"), tmp_path / "out")
    notes = [row["note"] for row in report["rows"] if row["site"].endswith("dt_proj")]
    assert notes and all("not called" in note and "rounded to nearest" in note for note in notes)
    ignoring = {"quantize.ignore": ["*dt_proj", "lm_head"]}
    report, _ = quantized(made("jamba"), tmp_path / "ignored", **ignoring)
    assert not [row for row in report["rows"] if row["site"].endswith("dt_proj")]


@decoded_first
def test_blocks_that_share_weights_are_written_once_and_loaded_by_all(made, tmp_path):
    _, config = quantized(made("zamba2"), tmp_path / "out", "rtn-w8")
    stored = open_checkpoint(str(tmp_path / "out")).tensors
    shared = [name for name in stored if "shared_transformer.feed_forward.down_proj.weight_packed" in name]
    assert len(shared) == 1 and config["quantization_config"]["dequantize"] is True
    ids = tokens(torch.Generator().manual_seed(4))
    before, after = logits(made("zamba2"), ids), logits(tmp_path / "out", ids)
    assert (before.exp() * (before - after)).sum(-1).mean() < 0.05


@pytest.mark.parametrize("recipe", ["nvfp4-w4a4", "best-w4-light"])
def test_what_cannot_run_beside_its_quantized_self_is_refused_with_what_can(recipe, made, tmp_path):
    source = made("gemma4_text")
    with pytest.raises(RecipeError, match="hands more than hidden states") as refused:
        outlierq.quantize(source, recipe, out=tmp_path / "out", settings=FEW)
    assert "gptq-w4, nvfp4 or mxfp4" in refused.value.hint
    for name in ("gptq-w4", "mxfp4"):
        outlierq.quantize(source, name, out=tmp_path / name, settings=FEW if name == "gptq-w4" else {})


def test_nothing_is_folded_into_what_other_blocks_use(made, tmp_path):
    report, _ = quantized(made("zamba2"), tmp_path / "out")
    notes = [row["note"] for row in report["transforms"] if "shared_transformer" in row["group"]]
    assert any("other blocks use" in note for note in notes)
    folded = [name for row in report["transforms"] for name in row.get("folded", ())]
    assert not [name for name in folded if "shared_transformer" in name and "adapter" not in name]


def test_a_linear_of_the_models_own_is_one_when_it_computes_the_same(made):
    sites = study(open_checkpoint(str(made("falcon")))).structure.sites
    assert {site.kind for site in sites} == {"Linear"}
    grouped = study(open_checkpoint(str(made("deepseek_v4")))).structure.sites
    assert {site.kind for site in grouped if site.module.endswith("o_a_proj")} == {"DeepseekV4GroupedLinear"}


@pytest.mark.parametrize("name", ["llama4_text", "inkling_text"])
def test_models_that_ask_where_their_embedding_is_or_norm_what_it_gives_are_calibrated(name, made, tmp_path):
    report, config = quantized(made(name), tmp_path / "out", "gptq-w4")
    assert not report.get("faults") and config["quantization_config"]["config_groups"]


@pytest.mark.parametrize("recipe", ["nvfp4", "llm-int8"])
def test_a_model_of_layers_that_a_packed_format_does_not_hold_is_refused_with_a_hint_that_works(recipe, made):
    with pytest.raises(RecipeError, match=r"quantizes none of the 16 linears: .*Conv1D") as refused:
        make_plan(open_checkpoint(str(made("gpt2"))), load(recipe))
    assert "`-r rtn-w8`" in refused.value.hint and "ignore" not in refused.value.hint
    assert len(make_plan(open_checkpoint(str(made("gpt2"))), load("rtn-w8")).schemes) == 16


@pytest.fixture(scope="module")
def packed_gpt2(made, tmp_path_factory):
    """Of a recipe with one scale for a channel, and one with groups: its plan and its result; read-only."""
    folder = tmp_path_factory.mktemp("gpt2")
    recipes = {"rtn-w8": {}, "gptq-w4": {"quantize.group_size": 64, **FEW}, "fp8-dynamic": {}}
    for recipe, settings in recipes.items():
        outlierq.quantize(made("gpt2"), recipe, out=folder / recipe, settings=settings, device="cpu")
    return folder


@decoded_first
@pytest.mark.parametrize("recipe", ["rtn-w8", "gptq-w4", "fp8-dynamic"])
def test_a_conv1d_is_packed_as_it_is_stored_and_decoded_by_transformers_to_the_same_weights(recipe, packed_gpt2):
    from transformers import AutoModelForCausalLM

    from outlierq.load import unpacked

    folder = packed_gpt2 / recipe
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    group = config["config_groups"]["group_0"]
    assert config["dequantize"] and group["targets"] == ["Linear", "Conv1D"] and "lm_head" in config["ignore"]
    assert group["weights"].get("block_structure") == ([64, 1] if recipe == "gptq-w4" else None)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    plain = unpacked(open_checkpoint(str(folder)))
    assert len(plain.packed) == 16
    for name in plain.packed:
        assert torch.equal(model.get_parameter(name), plain.read(name).to(torch.bfloat16))
    assert not outlierq.verify(folder).faults


def test_weights_of_a_conv1d_are_those_that_rounding_their_transpose_gives(packed_gpt2, made):
    from outlierq.load import unpacked

    name = "transformer.h.0.mlp.c_proj.weight"
    weight = open_checkpoint(str(made("gpt2"))).read(name).float()  # [in, out]
    scale = (weight.abs().amax(0) / 127).bfloat16().float()
    stored = unpacked(open_checkpoint(str(packed_gpt2 / "rtn-w8"))).read(name)
    assert ((stored - weight).abs() <= 0.51 * scale).float().mean() > 0.99
    again = make_plan(open_checkpoint(str(packed_gpt2 / "rtn-w8")), load("dense"))  # a source like any other
    assert "decoded to bfloat16" in " ".join(again.notes)


def test_no_other_client_is_said_to_load_a_packed_conv1d(made):
    lines = make_plan(open_checkpoint(str(made("gpt2"))), load("awq-gptq-w4")).clients
    assert ": loads (dequantized at load" in lines[0] and "Conv1D" in lines[0]
    assert len(lines) == 3 and all("does not load it: transformer.h.0.attn.c_attn is a Conv1D" in x for x in lines[1:])


@pytest.mark.parametrize(("recipe", "settings"), [("rtn-w8", ["quantize.symmetric=false"]), ("fp8-block", [])])
def test_a_conv1d_that_transformers_would_not_decode_is_refused(recipe, settings, made):
    with pytest.raises(RecipeError, match="only with symmetric scales for groups of inputs"):
        make_plan(open_checkpoint(str(made("gpt2"))), load(recipe, settings))


@pytest.mark.parametrize("damage", ["shape", "nan"])
def test_wrong_scales_of_a_conv1d_are_refused(damage, packed_gpt2, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = with_config(packed_gpt2 / "rtn-w8", tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    name = "transformer.h.0.attn.c_proj.weight_scale"
    tensors[name] = tensors[name].T.contiguous() if damage == "shape" else tensors[name] * float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "outlierq.json").unlink()  # it knows that the file was changed
    with pytest.raises(SourceError, match=r"do not fit|no finite numbers"):
        outlierq.quantize(folder, "rtn-w4", out=tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_model_that_has_no_row_in_the_table_of_gguf_is_sent_to_the_converter_of_llama_cpp(made):
    with pytest.raises(SourceError, match="is a gpt2") as refused:
        make_plan(open_checkpoint(str(made("gpt2"))), load("gguf-q4_k"))
    assert "--like model-f16.gguf" in refused.value.hint


def test_a_weight_of_three_dimensions_that_no_linear_holds_is_not_said_to_be_of_experts(made):
    note = next(n for n in make_plan(open_checkpoint(str(made("zamba"))), load("rtn-w8")).notes if "x_proj_weight" in n)
    assert "three dimensions that no linear layer holds" in note and "expert" not in note


def test_a_class_that_retypes_a_buffer_runs_as_it_was_written(made, tmp_path):
    outlierq.quantize(made("ctrl"), "fp8-dynamic", out=tmp_path / "out", device="cpu")
    ids = tokens(torch.Generator().manual_seed(0))
    before, after = logits(made("ctrl"), ids), logits(tmp_path / "out", ids)
    assert (before.exp() * (before - after)).sum(-1).mean() < 0.3


def test_what_the_class_keeps_in_float32_is_given_so_and_calibration_runs(made, tmp_path):
    checkpoint = open_checkpoint(str(made("inkling2_text")))
    model = study(checkpoint)
    load_tensors_into(model.skeleton, checkpoint, model.names, dtype="bfloat16")
    router = model.skeleton.get_submodule("model.layers.0.mlp.gate")
    assert router.weight.dtype == torch.float32 and model.skeleton.lm_head.weight.dtype == torch.bfloat16
    quantized(made("inkling2_text"), tmp_path / "out")


@pytest.mark.parametrize("name", ["chameleon", "phi4_multimodal"])
def test_the_blocks_of_the_text_are_found_beside_larger_ones_of_a_tower_inside_the_decoder(name, made):
    structure = study(open_checkpoint(str(made(name)))).structure
    assert len(structure.blocks) == 4 and all("self_attn" in block.sites[0].module for block in structure.blocks)
