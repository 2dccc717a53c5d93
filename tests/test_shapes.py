"""Models of unusual shape: what one fault in reading configs or names would keep out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from outlierq.core.errors import SourceError
from outlierq.core.model import largest, sizes
from outlierq.load import build_skeleton, checkpoint_names, load_tensors_into, open_checkpoint, packed_fault
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.quantize import quantize
from outlierq.recipe import load

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from coverage_models import tiny_config, tiny_model, tokens, write_checkpoint


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function from a model type to the folder of its tiny model, made once; read-only."""
    folders: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name) / "source"
            write_checkpoint(tiny_model(name, "text"), folders[name])
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


@pytest.mark.parametrize(
    ("name", "why", "dense"),
    [
        ("llama", None, False),
        ("nanochat", "initialises weights by a name that packed ones do not have", True),
        ("kimi_linear", "which it joins with others", False),
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


def test_weights_that_keep_their_names_load_everywhere(made):
    assert packed_fault(open_checkpoint(str(made("nanochat"))), []) is None
