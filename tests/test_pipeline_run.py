"""One run from load to export: statistics from a file or from the model, both modes, and the check of every fold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from outlierq.calibrate.runner import BlockRunner
from outlierq.core.errors import NumbersError, OutputError, RecipeError, StatsError
from outlierq.export import format_type
from outlierq.load import load_model, open_checkpoint
from outlierq.pipeline.block import fold as folding
from outlierq.pipeline.block import stats_run as calibration
from outlierq.pipeline.calibrate import calibrate
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.quantize import quantize
from outlierq.recipe import load

SMALL = ["calibration.samples=6", "calibration.sequence_length=32"]
IDS = torch.randint(3, 259, (2, 24), generator=torch.Generator().manual_seed(5))


def compress(source: Path, out: Path, recipe: str, *settings: str, **options):
    chosen = load(recipe, [*(SMALL if load(recipe).calibration else []), *settings])
    return quantize(make_plan(open_checkpoint(str(source)), chosen), out, **options)


def collect(source: Path, out: Path, *settings: str) -> Path:
    calibrate(open_checkpoint(str(source)), load("gptq-w4", [*SMALL, *settings]).calibration, out)
    return out


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(open_checkpoint(str(folder)))(IDS).logits


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (torch.linalg.norm(a - b) / torch.linalg.norm(b)).item()


@pytest.fixture(scope="module")
def statistics(tiny_llama, tmp_path_factory) -> Path:
    """Of the tiny model. Read-only."""
    return collect(tiny_llama, tmp_path_factory.mktemp("statistics") / "stats")


@pytest.fixture
def block_runs(monkeypatch) -> list[str]:
    """The names of all blocks that run, also for the discovery of groups and folds."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    ran: list[str] = []
    original = LlamaDecoderLayer.forward

    def counted(self, *args, **kwargs):
        ran.append(f"layer {self.self_attn.layer_idx}")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", counted)
    return ran


@pytest.mark.parametrize("recipe", ["gptq-w4", "awq-w4", "awq-gptq-w4", "gptq-w3"])
def test_statistics_from_a_file_give_the_same_weights_without_running_a_block(
    recipe, tiny_llama, statistics, block_runs, tmp_path
):
    reused = compress(tiny_llama, tmp_path / "reused", recipe, stats=statistics)
    assert block_runs == []
    compress(tiny_llama, tmp_path / "run", recipe)
    assert set(block_runs) == {"layer 0", "layer 1"}
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("reused", "run"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert any("statistics of an earlier calibration: 6 x 32 tokens" in note for note in reused.notes)
    assert reused.seeds == {"calibration": 0}


def test_the_seed_in_the_report_is_the_one_of_the_statistics(tiny_llama, tmp_path):
    stats = collect(tiny_llama, tmp_path / "stats", "calibration.seed=5")
    assert compress(tiny_llama, tmp_path / "out", "gptq-w4", stats=stats).seeds == {"calibration": 5}


def test_statistics_are_not_mixed_with_sequential_calibration(tiny_llama, statistics, tmp_path):
    with pytest.raises(RecipeError, match="sequential, which runs the model") as caught:
        compress(tiny_llama, tmp_path / "out", "gptq-w4", "calibration.mode=sequential", stats=statistics)
    assert "mode=static" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_statistics_that_a_recipe_does_not_need_are_reported_as_unused(tiny_llama, statistics, tmp_path):
    report = compress(tiny_llama, tmp_path / "out", "rtn-w4", stats=statistics)
    assert any("rtn-w4 needs no statistics" in note and "not used" in note for note in report.notes)


def test_statistics_of_another_model_are_refused(untied_llama, statistics, tmp_path):
    with pytest.raises(StatsError, match="statistics of another model"):
        compress(untied_llama, tmp_path / "out", "gptq-w4", stats=statistics)
    assert list(tmp_path.iterdir()) == []


def test_damaged_statistics_are_refused(tiny_llama, tmp_path):
    stats = collect(tiny_llama, tmp_path / "stats")
    block = stats / "block-00001.safetensors"
    raw = bytearray(block.read_bytes())
    raw[-3] ^= 1
    block.write_bytes(raw)
    with pytest.raises(StatsError, match=r"block-00001.safetensors is damaged"):
        compress(tiny_llama, tmp_path / "out", "gptq-w4", stats=stats)
    assert not (tmp_path / "out").exists()


def test_calibrating_again_into_a_finished_folder_runs_nothing(tiny_llama, statistics, block_runs, tools):
    before = tools.folder_hashes(statistics)
    collect(tiny_llama, statistics)
    assert block_runs == [] and tools.folder_hashes(statistics) == before


def test_sequential_calibration_sees_the_written_blocks(tiny_llama, tmp_path, monkeypatch):
    seen: dict[str, list[torch.Tensor]] = {"static": [], "sequential": []}
    original = BlockRunner.run
    for mode, inputs in seen.items():

        def noted(self, module, index, hidden, *args, inputs=inputs, **kwargs):
            if index == 1:
                inputs.append(hidden.values.float().clone())
            return original(self, module, index, hidden, *args, **kwargs)

        monkeypatch.setattr(BlockRunner, "run", noted)
        compress(
            tiny_llama,
            tmp_path / mode,
            "rtn-w4",
            "quantize.bits=2",
            "quantize.scale_search=hessian",
            *SMALL,
            f"calibration.mode={mode}",
        )
    static, sequential = seen["static"][0], seen["sequential"][0]
    assert static.shape == sequential.shape and 0.01 < distance(sequential, static) < 1.0


def test_eight_bits_lose_next_to_nothing_and_three_bits_lose_more(tiny_llama, tmp_path):
    expected = logits(tiny_llama)
    compress(tiny_llama, tmp_path / "w8", "rtn-w8")
    compress(tiny_llama, tmp_path / "w3", "gptq-w3")
    eight, three = (distance(logits(tmp_path / name), expected) for name in ("w8", "w3"))
    assert eight < 0.02 < three < 0.6


def test_every_fold_leaves_float32_logits_within_the_tolerance(untied_llama, tmp_path, monkeypatch):
    """What the run does to a block's float32 tensors, put into the whole model."""
    changed: dict[str, torch.Tensor] = {}
    original = calibration.StatsFromRun.check_transformed

    def kept(self, index, before, after):
        changed.update(after)
        return original(self, index, before, after)

    monkeypatch.setattr(calibration.StatsFromRun, "check_transformed", kept)
    compress(untied_llama, tmp_path / "out", "awq-w4")
    model = load_model(open_checkpoint(str(untied_llama)))
    with torch.no_grad():
        expected = model(IDS).logits
        moved = 0
        for name, parameter in model.named_parameters():
            if name in changed:
                moved += int(not torch.equal(parameter, changed[name]))
                parameter.copy_(changed[name])
        found = model(IDS).logits
    assert moved >= 3 * 4  # in each block at least a norm and the three linears that read it
    assert ((found - expected).abs().max() / expected.abs().max()).item() < 1e-4


def wrong_fold(monkeypatch) -> None:
    original = folding.apply_fold

    def wrong(tensors, fold, scale, shift=None):
        return {name: value * 1.01 for name, value in original(tensors, fold, scale, shift).items()}

    monkeypatch.setattr(folding, "apply_fold", wrong)


def test_a_fold_that_changes_the_function_stops_the_run_with_both_figures(tiny_llama, tmp_path, monkeypatch):
    wrong_fold(monkeypatch)
    monkeypatch.setattr(folding, "check_move", lambda *_: None)
    with pytest.raises(NumbersError, match=r"output of model.layers.0 by \d.\d\de-\d\d, more than 0.0001") as caught:
        compress(tiny_llama, tmp_path / "out", "awq-w4")
    assert caught.value.where == "transform on model.layers.0"
    assert not (tmp_path / "out").exists()


def test_a_wrong_fold_is_also_caught_where_no_block_runs(tiny_llama, statistics, tmp_path, monkeypatch):
    wrong_fold(monkeypatch)
    with pytest.raises(NumbersError, match=r"changed model.layers.0.input_layernorm.weight by \d.\d\de-\d\d") as caught:
        compress(tiny_llama, tmp_path / "out", "awq-w4", stats=statistics)
    assert caught.value.where == "transform on model.layers.0"


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_weights_stored_in_another_dtype_than_the_config_names_are_handled(stored, llama_copy, tmp_path):
    shard = llama_copy / "model.safetensors"
    tensors = load_file(shard)
    noise = torch.Generator().manual_seed(0)
    wider = {
        name: (t.float() * (1 + 1e-3 * torch.rand(t.shape, generator=noise))).to(stored) for name, t in tensors.items()
    }
    save_file(wider, shard, {"format": "pt"})
    assert open_checkpoint(str(llama_copy)).dtype == "bfloat16"
    report = compress(llama_copy, tmp_path / "out", "awq-gptq-w4")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["model.embed_tokens.weight"], wider["model.embed_tokens.weight"])
    assert max(row.output_error for row in report.rows) < 0.1


def test_a_float16_model_is_calibrated(tools, tmp_path):
    source = tools.write_llama(tmp_path / "model", dtype="float16")
    compress(source, tmp_path / "out", "awq-gptq-w4")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.float16
    assert distance(logits(tmp_path / "out"), logits(source)) < 0.5


def test_an_encoder_that_writes_something_else_is_caught(tiny_llama, tmp_path, monkeypatch):
    """The decoder shares no code with the packer: one wrong bit in what is written stops the run."""
    writer = format_type("compressed-tensors")
    encode = writer.encode

    def flipped(self, site, quantized):
        parts = encode(self, site, quantized)
        return {name: part ^ 1 if name.endswith("o_proj.weight_packed") else part for name, part in parts.items()}

    monkeypatch.setattr(writer, "encode", flipped)
    with pytest.raises(OutputError, match=r"o_proj: what is on disk decodes to something else .*in its codes"):
        compress(tiny_llama, tmp_path / "out", "rtn-w4")
    assert not (tmp_path / "out").exists()


def test_the_journal_keeps_rows_transforms_and_notes(tiny_llama, tmp_path, monkeypatch):
    """So that a resumed run reports what an earlier process did."""
    from outlierq.pipeline import quantize as run

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            compress(tiny_llama, tmp_path / "out", "awq-gptq-w4")
    lines = (tmp_path / "out.partial" / ".outlierq-journal.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert entries[0]["identity"].keys() == {"outlierq", "source", "recipe", "text"}
    assert [entry["unit"] for entry in entries[1:]] == ["outside", "block-00000", "block-00001"]
    assert len(entries[2]["rows"]) == 7 and len(entries[2]["transforms"]) == 4
