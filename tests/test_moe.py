"""Mixtures of experts: separate experts compute what fused ones do, and go all the way to a checkpoint that loads."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from outlierq.calibrate.experts import routing
from outlierq.calibrate.folds import check_fold
from outlierq.calibrate.groups import find_groups
from outlierq.calibrate.runner import BlockRunner, PartWeights
from outlierq.calibrate.stored.stats_file import StatsReader
from outlierq.load import build_skeleton, find_structure, load_model, open_checkpoint, unpacked
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.planning.phases import peaks
from outlierq.pipeline.planning.work import NO_SAVINGS, work_of
from outlierq.pipeline.quantize import quantize
from outlierq.recipe import load

STARVED = 5
SMALL = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 32, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.08, "num_experts_per_tok": 2,
}  # fmt: skip
LATENT = {"q_lora_rank": None, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
FAMILIES = {
    "Mixtral": {"num_local_experts": 8},
    "Qwen2Moe": {"num_experts": 8, "shared_expert_intermediate_size": 32},
    "Qwen3Moe": {"num_experts": 8, "head_dim": 16, "norm_topk_prob": True},
    "DeepseekV3": {
        "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
        **LATENT,
    },
    "Olmoe": {"num_experts": 8, "num_experts_per_tok": 3},
    "Ernie4_5_Moe": {"moe_num_experts": 8, "moe_k": 2, "moe_layer_start_index": 1, "moe_num_shared_experts": 1},
}  # fmt: skip
CALIBRATION = ("--set", "calibration.samples=24", "--set", "calibration.sequence_length=64")


def write_mixture(folder: Path, family: str, tools, **config) -> Path:
    """A tiny random mixture in float32 as transformers saves it. No token is sent to one expert of every block.

    The first channel of the embeddings is large, and the router takes it as a reason against that expert only.
    """
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **FAMILIES[family], **config})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
        model.model.embed_tokens.weight[:, 0] = 1.0
        for layer in model.model.layers:
            if hasattr(layer.mlp, "experts"):
                layer.mlp.gate.weight[:, 0] = 0.0
                layer.mlp.gate.weight[STARVED, 0] = -100.0
    model.save_pretrained(folder)
    tools.write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory, tools):
    """A function from a family to its folder, written when it is first asked for. Read-only."""
    written: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in written:
            written[family] = write_mixture(tmp_path_factory.mktemp("mixtures") / family, family, tools)
        return written[family]

    return folder


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 259, (2, 24), generator=torch.Generator().manual_seed(1))


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """As stock transformers computes them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(ids).logits


def our_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return load_model(open_checkpoint(str(folder)))(ids).logits


def dequantized(folder: Path, source: Path, target: Path, group_size: int) -> Path:
    """The source with every packed weight of `folder` in its place: codes by the compressed-tensors package."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    shutil.copytree(source, target)
    tensors, stored = load_file(source / "model.safetensors"), load_file(folder / "model.safetensors")
    packed = [name.removesuffix("_packed") for name in stored if name.endswith(".weight_packed")]
    for name in packed:
        codes = unpack_from_int32(stored[f"{name}_packed"], 4, torch.Size(stored[f"{name}_shape"].tolist()))
        tensors[name] = codes.float() * stored[f"{name}_scale"].float().repeat_interleave(group_size, 1)
    tensors |= {name: value for name, value in stored.items() if name in tensors and name not in packed}
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("family", FAMILIES)
def test_separate_experts_compute_what_the_fused_ones_do(mixtures, ids, family):
    folder = mixtures(family)
    assert torch.allclose(our_logits(folder, ids), logits(folder, ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_is_three_sites_and_the_router_is_one_that_stays(mixtures, family):
    checkpoint = open_checkpoint(str(mixtures(family)))
    structure = find_structure(checkpoint, build_skeleton(checkpoint))
    block = structure.blocks[-1]
    per_expert = [[s for s in block.sites if s.expert and s.expert.endswith(f".experts.{e}")] for e in range(8)]
    assert [len(sites) for sites in per_expert] == [3] * 8
    assert {site.weight for sites in per_expert for site in sites} <= checkpoint.tensors.keys()
    routers = [site for site in block.sites if site.kind == "Router"]
    assert routers[0].out_features in (1, 8) and len(routers) == (2 if family == "Qwen2Moe" else 1)


def test_experts_that_see_all_tokens_give_the_same_output(mixtures, ids):
    model = load_model(open_checkpoint(str(mixtures("Qwen3Moe"))))
    with torch.no_grad():
        expected = model(ids).logits
        with routing(model, "all"):
            found = model(ids).logits
        with routing(model, "probe"):
            assert not torch.allclose(model(ids).logits, expected, atol=0.1)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


class Studied:
    """The last block of a mixture, ready for proofs."""

    def __init__(self, folder: Path, ids: torch.Tensor):
        self.model = load_model(open_checkpoint(str(folder)))
        checkpoint = open_checkpoint(str(folder))
        structure = find_structure(checkpoint, self.model)
        self.block = structure.blocks[-1]
        keep = lambda name: None  # noqa: E731
        runner = BlockRunner(self.model, structure, PartWeights(keep, keep), dtype=torch.float32, batch_size=2)
        hidden = runner.start(ids)
        self.module = self.model.get_submodule(self.block.name)
        self.run_once = runner.run_once(self.block.index, hidden)
        from outlierq.calibrate.folds import prove_folds

        found = find_groups(self.module, self.block, self.run_once)
        self.groups = prove_folds(self.module, self.block, found, self.run_once, self.model.config)

    def short(self, names) -> set[str]:
        return {site.module.removeprefix(f"{self.block.name}.mlp.") for site in names}


@pytest.mark.parametrize("family", ["Mixtral", "Qwen2Moe", "DeepseekV3"])
def test_the_norm_folds_into_all_experts_shared_ones_and_the_router(mixtures, ids, family):
    studied = Studied(mixtures(family), ids)
    group = next(group for group in studied.groups if group.parts)
    readers = {site for site in studied.block.sites if ".mlp." in site.module and site.in_features == 64}
    assert set(group.sites) == readers and group.sites[0].expert is None
    assert group.fold.kind == "norm" and "post_attention_layernorm" in group.fold.weight
    assert len(group.parts) == 8 and all(part.routed and len(part.sites) == 2 for part in group.parts)
    routed = [group for group in studied.groups if group.routed]
    assert len(routed) == 8
    for group in routed:
        up = group.fold.weight.removesuffix(".weight")
        assert group.fold.kind == "linear" and up.rpartition(".")[0] == group.sites[0].weight.rsplit(".", 2)[0]
        assert up.rpartition(".")[2] in ("up_proj", "w3")


def test_a_fold_that_forgets_the_router_or_one_expert_is_rejected(mixtures, ids):
    from dataclasses import replace

    studied = Studied(mixtures("Qwen3Moe"), ids)
    group = next(group for group in studied.groups if group.parts)
    forgotten = [site for site in group.sites if site.kind == "Router" or f".{STARVED}.gate" in site.module]
    assert len(forgotten) == 2
    for left_out in forgotten:
        rest = replace(group, sites=tuple(site for site in group.sites if site is not left_out))
        assert not check_fold(studied.module, studied.block, rest, group.fold, studied.run_once).admitted


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "DeepseekV3"])
def test_a_mixture_with_a_starved_expert_is_quantized_and_transformers_computes_what_is_meant(
    outlierq, mixtures, ids, tmp_path, family
):
    source, out = mixtures(family), tmp_path / "out"
    answer = outlierq("quantize", source, "-r", "gptq-w4", "-o", out, *CALIBRATION, "--set", "quantize.group_size=32")
    assert answer.code == 0, answer.err
    reference = logits(dequantized(out, source, tmp_path / "dense", 32), ids)
    assert torch.allclose(logits(out, ids), reference, rtol=1e-4, atol=1e-4)
    assert torch.allclose(our_logits(out, ids), reference, rtol=1e-4, atol=1e-4)
    report = json.loads((out / "outlierq.json").read_text())
    rows = {row["site"]: row for row in report["rows"]}
    assert not any(site.endswith(".gate") for site in rows) and sum(".experts." in site for site in rows) % 24 == 0
    starved = [row for site, row in rows.items() if f".1.mlp.experts.{STARVED}." in site]
    assert [row["method"] for row in starved].count("rtn") == 1
    assert all("got 0 of the 256 tokens" in row["note"] for row in starved)
    assert any(f"{STARVED} (0)" in note and "fewer than 256 tokens" in note for note in report["notes"])


def test_router_and_kept_experts_are_named_to_clients_as_they_are_on_disk(outlierq, mixtures, tmp_path):
    answer = outlierq("quantize", mixtures("Mixtral"), "-r", "rtn-w4", "-o", tmp_path / "out")
    assert answer.code == 0, answer.err
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert {"model.layers.1.mlp.gate", "model.layers.1.block_sparse_moe.gate"} <= set(ignored)
    source, out = (load_file(folder / "model.safetensors") for folder in (mixtures("Mixtral"), tmp_path / "out"))
    router = "model.layers.1.block_sparse_moe.gate.weight"
    assert torch.equal(source[router], out[router])
    assert "model.layers.1.block_sparse_moe.experts.3.w1.weight_packed" in out


def test_what_holds_for_all_experts_is_said_once(outlierq, mixtures, tmp_path):
    out = tmp_path / "out"
    answer = outlierq("quantize", mixtures("Qwen3Moe"), "-r", "gptaq-w4", "-o", out, *CALIBRATION)
    assert answer.code == 0, answer.err
    notes = json.loads((out / "outlierq.json").read_text())["notes"]
    (said,) = [note for note in notes if "its tokens are routed" in note]
    assert re.match(r"model.layers.0.mlp.experts.0.\w+ and \d+ more: its tokens are routed", said)


def test_a_transform_scales_experts_and_router_together(outlierq, mixtures, ids, tmp_path):
    source, out = mixtures("Qwen2Moe"), tmp_path / "out"
    (tmp_path / "smooth.yaml").write_text(
        "calibration: {}\ntransform: [{method: smoothquant}]\nquantize: {method: rtn, bits: 8, group_size: 32}\n"
    )
    answer = outlierq("quantize", source, "-r", tmp_path / "smooth.yaml", "-o", out, *CALIBRATION)
    assert answer.code == 0, answer.err
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    for name in ("gate", "shared_expert_gate"):
        weight = f"model.layers.0.mlp.{name}.weight"
        assert not torch.allclose(before[weight], after[weight], rtol=0.1)
    expected = logits(source, ids)
    error = (logits(out, ids) - expected).norm() / expected.norm()
    assert error < 0.02  # 8 bits: a scale that is not taken off again would change it by far more
    moved = {row["group"]: row for row in json.loads((out / "outlierq.json").read_text())["transforms"]}
    starved = moved[f"model.layers.0.mlp.experts.{STARVED}.down_proj"]
    assert starved["fold"] is None and "got 0 of the 64 tokens" in starved["note"]
    folded = [row for group, row in moved.items() if group.endswith(".down_proj") and ".0.mlp.experts" in group]
    folded = {row["group"]: row["fold"] for row in folded if row["fold"]}
    assert folded and all(fold == f"{group[: -len('down_proj')]}up_proj.weight" for group, fold in folded.items())


def test_statistics_of_experts_survive_the_folder_and_give_the_same_checkpoint(outlierq, mixtures, tmp_path, tools):
    source = mixtures("Qwen3Moe")
    recipe = ("-r", "awq-gptq-w4", *CALIBRATION, "--set", "quantize.group_size=32")
    answer = outlierq("calibrate", source, "-o", tmp_path / "stats", "--samples", 24, "--sequence-length", 64)
    assert answer.code == 0, answer.err
    assert outlierq("quantize", source, *recipe, "-o", tmp_path / "run").code == 0
    assert outlierq("quantize", source, *recipe, "-o", tmp_path / "file", "--stats", tmp_path / "stats").code == 0
    run, file = (tools.folder_hashes(tmp_path / name) for name in ("run", "file"))
    assert run["model.safetensors"] == file["model.safetensors"]
    groups, stats = StatsReader(tmp_path / "stats").block(0)
    parts = {part.name: stats[part.name].tokens for group in groups for part in group.parts if part.name in stats}
    assert 2 < len(parts) < 8
    observed = StatsReader(tmp_path / "stats").block_stats(0)
    assert observed.expert_tokens.sum() == 2 * 24 * 64, "every token went to two of the experts"
    of_text = sorted(observed.expert_tokens.tolist())
    # Tokens that the text does not hold are counted beside its own, where an expert got any.
    assert of_text.count(0) == 8 - len(parts)
    assert all(more >= tokens for more, tokens in zip(sorted(parts.values()), of_text[-len(parts) :], strict=True))


@pytest.fixture(scope="module")
def statistics(mixtures, tmp_path_factory):
    """A function from a family to the folder of its statistics."""
    from outlierq.pipeline.calibrate import calibrate
    from outlierq.recipe import Calibration

    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("statistics") / family
            settings = Calibration(samples=8, sequence_length=48)
            calibrate(open_checkpoint(str(mixtures(family))), settings, made[family])
        return made[family]

    return folder


def reap_recipe(folder: Path, statistics: Path, prune: float) -> Path:
    path = folder / "reap.yaml"
    options = f"{{method: reap, prune: {prune}, stats_folder: {statistics}}}"
    path.write_text(f"transform: [{options}]\nexport: {{format: dense}}\n")
    return path


def masked_logits(folder: Path, ids: torch.Tensor, kept: dict[int, list[int]]) -> torch.Tensor:
    """Of the whole model with a router that cannot choose the other experts: softmax routers only."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for index, layer in enumerate(model.model.layers):
        gate = layer.mlp.gate

        def forward(hidden, gate=gate, keep=kept[index]):
            scores = hidden.reshape(-1, hidden.shape[-1]) @ gate.weight.T
            allowed = torch.full_like(scores, float("-inf"))
            allowed[:, keep] = scores[:, keep]
            top, chosen = allowed.softmax(-1).topk(gate.top_k, dim=-1)
            return scores, top / top.sum(-1, keepdim=True), chosen

        gate.forward = forward
    with torch.no_grad():
        return model(ids).logits


def test_saliency_is_what_an_expert_adds_summed_over_its_tokens(mixtures, ids):
    from outlierq.calibrate.observe import BlockObserver

    studied = Studied(mixtures("Qwen3Moe"), ids)
    fused = transformers.AutoModelForCausalLM.from_pretrained(mixtures("Qwen3Moe"), dtype=torch.float32).eval()
    fused.requires_grad_(False)
    inside, last = [], fused.model.layers[-1].mlp
    last.experts.register_forward_pre_hook(lambda part, args: inside.append(args))
    with torch.no_grad():
        fused(ids)
    (hidden, chosen, weights), experts = inside[0], last.experts
    expected = torch.zeros(8, dtype=torch.float64)
    for token in range(len(hidden)):
        for number, weight in zip(chosen[token].tolist(), weights[token], strict=True):
            gate, up = (experts.gate_up_proj[number] @ hidden[token]).chunk(2)
            added = experts.down_proj[number] @ (torch.nn.functional.silu(gate) * up)
            expected[number] += float(weight * added.norm())
    wanted = frozenset({"expert_saliency", "expert_tokens"})
    for way in ("chosen", "all"):
        observer = BlockObserver(studied.module, studied.block, wanted, sequence_length=ids.shape[1])
        with torch.no_grad(), observer, routing(studied.module, way):
            studied.model(ids)
        found = observer.finish()
        assert torch.allclose(found.expert_saliency, expected, rtol=1e-4)
        assert torch.equal(found.expert_tokens, chosen.flatten().bincount(minlength=8))


def test_reap_keeps_what_adds_most_and_equally_many_of_every_group():
    from outlierq.core.measured.block_stats import BlockStats
    from outlierq.registry import transform_method

    tokens = torch.tensor([1, 2, 4, 0, 1, 1, 1, 1])
    stats = BlockStats(expert_tokens=tokens, expert_saliency=torch.tensor([1.0, 8, 8, 0, 9, 9, 7, 6]).double())
    reap = transform_method("reap").function  # means: 1, 4, 2, 0 | 9, 9, 7, 6
    assert reap(stats, 1, prune=0.5).tolist() == [4, 5, 6, 7]
    assert reap(stats, 2, prune=0.5).tolist() == [1, 2, 4, 5]
    assert reap(stats, 1, prune=0.2).tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert reap(stats, 1, prune=0.0).tolist() == list(range(8))


def test_a_pruned_mixture_computes_what_the_whole_one_does_without_the_dropped_experts(
    outlierq, mixtures, statistics, ids, tmp_path
):
    source, out = mixtures("Qwen3Moe"), tmp_path / "out"
    answer = outlierq("quantize", source, "-r", reap_recipe(tmp_path, statistics("Qwen3Moe"), 0.25), "-o", out)
    assert answer.code == 0, answer.err
    assert json.loads((out / "config.json").read_text())["num_local_experts"] == 6
    reader = StatsReader(statistics("Qwen3Moe"))
    kept = {}
    for index in range(2):
        observed = reader.block_stats(index)
        means = observed.expert_saliency / observed.expert_tokens.clamp_min(1)
        kept[index] = sorted(means.argsort(descending=True, stable=True)[:6].tolist())
        assert STARVED not in kept[index]
    assert torch.allclose(logits(out, ids), masked_logits(source, ids, kept), rtol=1e-4, atol=1e-4)


def test_pruning_nothing_changes_no_byte_of_the_weights(outlierq, mixtures, statistics, tmp_path):
    source, out = mixtures("DeepseekV3"), tmp_path / "out"
    answer = outlierq("quantize", source, "-r", reap_recipe(tmp_path, statistics("DeepseekV3"), 0.0), "-o", out)
    assert answer.code == 0, answer.err
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_pruned_mixture_with_groups_and_score_corrections_loads_and_can_be_quantized(
    outlierq, mixtures, statistics, ids, tmp_path
):
    recipe = reap_recipe(tmp_path, statistics("DeepseekV3"), 0.25)
    recipe.write_text(
        recipe.read_text().replace("export: {format: dense}", "quantize: {method: rtn, bits: 8, group_size: 32}")
    )
    answer = outlierq("quantize", mixtures("DeepseekV3"), "-r", recipe, "-o", tmp_path / "out")
    assert answer.code == 0, answer.err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["n_routed_experts"] == 6
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.layers.1.mlp.gate.e_score_correction_bias"].shape == (6,)
    assert torch.allclose(logits(tmp_path / "out", ids), our_logits(tmp_path / "out", ids), rtol=1e-3, atol=1e-3)


def test_the_shipped_recipe_finds_out_itself_what_to_prune(outlierq, mixtures, statistics, ids, tmp_path):
    source, few = mixtures("Qwen3Moe"), ("-s", "calibration.samples=8", "-s", "calibration.sequence_length=48")
    planned = outlierq("plan", source, "-r", "reap", "--json")
    assert planned.code == 0, planned.err
    assert "which experts go is decided once the model has run" in " ".join(json.loads(planned.out)["notes"])
    answer = outlierq("quantize", source, "-r", "reap", *few, "-o", tmp_path / "out")
    assert answer.code == 0, answer.err
    written = sum(path.stat().st_size for path in (tmp_path / "out").iterdir() if path.name != "outlierq.json")
    assert written == json.loads(planned.out)["output_bytes"]
    assert not (tmp_path / "out.experts").exists()
    by_hand = reap_recipe(tmp_path, statistics("Qwen3Moe"), 0.25)
    assert outlierq("quantize", source, "-r", by_hand, "-o", tmp_path / "by-hand").code == 0
    given = outlierq("quantize", source, "-r", "reap", "--stats", statistics("Qwen3Moe"), "-o", tmp_path / "given")
    assert given.code == 0, given.err
    expected = load_file(tmp_path / "by-hand" / "model.safetensors")
    for folder in ("out", "given"):
        found = load_file(tmp_path / folder / "model.safetensors")
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.isfinite(logits(tmp_path / "out", ids)).all()


def test_a_pruned_mixture_is_calibrated_anew_and_quantized(outlierq, mixtures, ids, tmp_path):
    sections = "quantize={method: gptq, bits: 4, group_size: 32}", "export.format=compressed-tensors"
    settings = [word for section in sections for word in ("-s", section)]
    answer = outlierq("quantize", mixtures("Mixtral"), "-r", "reap", *CALIBRATION, *settings, "-o", tmp_path / "out")
    assert answer.code == 0, answer.err
    report = json.loads((tmp_path / "out" / "outlierq.json").read_text())
    assert len([row for row in report["rows"] if ".experts." in row["site"]]) == 2 * 6 * 3
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_local_experts"] == 6
    assert torch.allclose(logits(tmp_path / "out", ids), our_logits(tmp_path / "out", ids), rtol=1e-3, atol=1e-3)


def test_a_result_in_the_way_is_said_before_the_experts_are_studied(outlierq, mixtures, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "other").write_text("")
    answer = outlierq("quantize", mixtures("Mixtral"), "-r", "reap", "-o", tmp_path / "out")
    assert answer.code == 1 and "exists already" in answer.err and not (tmp_path / "out.experts").exists()


def test_a_ceiling_holds_for_the_study_of_the_experts_and_for_what_follows(outlierq, mixtures, tmp_path):
    few = ("-s", "calibration.samples=8", "-s", "calibration.sequence_length=48")
    words = (mixtures("Qwen3Moe"), "-r", "reap", *few)
    pruned = make_plan(open_checkpoint(str(mixtures("Qwen3Moe"))), load("reap"))
    assert work_of(pruned).making and "rewrite" not in peaks(work_of(pruned), NO_SAVINGS)  # nothing is run in float32
    refused = outlierq("plan", *words, "--max-memory", "300MiB")
    least = re.search(r"give --max-memory (\d+)MiB or more", refused.err)[1]
    assert refused.code == 1
    early = outlierq("quantize", *words, "--max-memory", f"{int(least) - 1}MiB", "-o", tmp_path / "out")
    assert early.code == 1 and f"{least}MiB or more" in early.err and not (tmp_path / "out.experts").exists()
    accepted = outlierq("plan", *words, "--max-memory", f"{least}MiB")
    assert accepted.code == 0 and "memory stays below" in accepted.out
    answer = outlierq("quantize", *words, "--max-memory", f"{least}MiB", "-o", tmp_path / "out")
    assert answer.code == 0, answer.err


def test_a_plan_without_statistics_cannot_be_followed(mixtures):
    from outlierq.core.errors import RecipeError

    plan = make_plan(open_checkpoint(str(mixtures("Mixtral"))), load("reap"))
    with pytest.raises(RecipeError, match="reap needs statistics of this model"):
        plan.checkpoint.read("model.embed_tokens.weight")


def test_a_model_without_experts_is_refused(outlierq, tiny_llama, tmp_path):
    answer = outlierq("quantize", tiny_llama, "-r", "reap", "-o", tmp_path / "out")
    assert answer.code == 1 and "has no experts" in answer.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("prune", "fault"), [("0.9", "sent to 2 experts"), ("1.0", "less than 1")])
def test_dropping_more_experts_than_a_token_needs_is_refused(outlierq, mixtures, statistics, tmp_path, prune, fault):
    recipe = reap_recipe(tmp_path, statistics("Qwen3Moe"), float(prune))
    answer = outlierq("quantize", mixtures("Qwen3Moe"), "-r", recipe, "-o", tmp_path / "out")
    assert answer.code == 1 and fault in answer.err and not (tmp_path / "out").exists()


def test_with_all_experts_nobody_starves_and_the_next_block_sees_the_same(mixtures, tmp_path):
    from outlierq.pipeline.calibrate import calibrate
    from outlierq.recipe import Calibration

    found = {}
    for every in (False, True):
        settings = Calibration(samples=4, sequence_length=32, all_experts=every, unseen_tokens=False)
        calibrate(open_checkpoint(str(mixtures("Mixtral"))), settings, tmp_path / str(every))
        found[every] = [StatsReader(tmp_path / str(every)).block(index) for index in range(2)]
    groups, stats = found[True][0]
    assert not any(group.parts or group.routed for group in groups)
    downs = [stats[group.name] for group in groups if group.name.endswith(".w2")]
    assert len(downs) == 8 and {kept.tokens for kept in downs} == {4 * 32}
    for name in ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.gate"):
        few, all_ = (found[every][1][1][name] for every in (False, True))
        assert torch.allclose(few.hessian, all_.hessian, rtol=1e-3, atol=1e-4)


def test_a_threshold_of_the_recipe_decides_who_is_starved(outlierq, mixtures, tmp_path):
    options = ("-r", "gptq-w4", *CALIBRATION, "--set", "quantize.group_size=32")
    methods = {}
    for least in (0, 100_000):
        out = tmp_path / str(least)
        answer = outlierq(
            "quantize", mixtures("Mixtral"), *options, "-o", out, "--set", f"calibration.min_expert_tokens={least}"
        )
        assert answer.code == 0, answer.err
        rows = json.loads((out / "outlierq.json").read_text())["rows"]
        methods[least] = [row["method"] for row in rows if row["site"].endswith(".w2")]
    assert set(methods[100_000]) == {"rtn"} and methods[0].count("gptq") > 4


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ((), "transformers 5.23, experts: loads (decoded"),
        ((), "vLLM 0.32 (CPU build), experts: loads"),
        (("quantize.symmetric=false",), "does not load experts with zero points"),
        (("quantize.overrides=[{match: '*w2', group_size: 16}]",), "does not load experts of different schemes"),
    ],
)
def test_the_plan_says_what_clients_do_with_experts(outlierq, mixtures, settings, said):
    words = [word for setting in ("quantize.group_size=32", *settings) for word in ("--set", setting)]
    answer = outlierq("plan", mixtures("Mixtral"), "-r", "rtn-w4", *words)
    assert answer.code == 0 and said in " ".join((answer.out + answer.err).split())
    assert "mlp.experts.*.w1" in answer.out + answer.err and "experts.3" not in answer.out


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("rtn-w4", ["quantize.group_size=32"]),
        ("rtn-w4", ["quantize.group_size=32", "quantize.activations={kind: float}"]),
        *((name, []) for name in ("rtn-w8", "w8a8-dynamic", "nvfp4", "mxfp4", "mxfp8", "fp8-dynamic", "fp8-block")),
    ],
)
def test_transformers_does_with_experts_what_the_plan_says(recipe, settings, mixtures, tmp_path):
    plan = make_plan(open_checkpoint(str(mixtures("Qwen3Moe"))), load(recipe, settings))
    said = next(line for line in plan.clients if line.startswith("transformers 5.23, experts: "))
    quantize(plan, tmp_path / "out")
    assert said.partition(": ")[2].startswith("loads") == loads_the_experts(tmp_path / "out"), said


def loads_the_experts(folder: Path) -> bool:
    """Whether transformers has the weights of every expert that we decode."""
    plain = unpacked(open_checkpoint(str(folder)))
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    except Exception:  # whatever it raises, it does not load
        return False
    fused = {name: parameter for name, parameter in model.named_parameters() if name.endswith("experts.down_proj")}
    names = [name for name in plain.packed if ".experts." in name and name.endswith("down_proj.weight")]
    assert len(names) == sum(map(len, fused.values())) > 0
    for name in names:
        stack, _, rest = name.partition(".experts.")
        theirs = fused[f"{stack}.experts.down_proj"][int(rest.split(".")[0])].float()
        if not torch.allclose(theirs, plain.read(name), rtol=2**-7):  # they multiply in bfloat16
            return False
    return True


def test_a_rotated_mixture_computes_what_it_did(outlierq, mixtures, ids, tmp_path):
    recipe, source = tmp_path / "rotate.yaml", mixtures("DeepseekV3")
    recipe.write_text("transform: [{method: rotate}]\nexport: {format: dense}\n")
    answer = outlierq("quantize", source, "-r", recipe, "-o", tmp_path / "out")
    assert answer.code == 0, answer.err
    assert "residual stream by Hadamard 64" in answer.err
    stored = [load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out")]
    for name in ("gate.weight", f"experts.{STARVED}.down_proj.weight", "shared_experts.up_proj.weight"):
        before, after = (tensors[f"model.layers.1.mlp.{name}"] for tensors in stored)
        assert not torch.allclose(before, after, atol=1e-2)
    assert torch.allclose(logits(tmp_path / "out", ids), logits(source, ids), rtol=1e-3, atol=1e-3)


def test_a_static_scale_for_an_expert_without_tokens_is_refused_with_a_way_out(outlierq, mixtures, tmp_path):
    answer = outlierq("quantize", mixtures("Mixtral"), "-r", "w8a8-static", "-o", tmp_path / "out", *CALIBRATION)
    assert answer.code == 1 and f"experts.{STARVED} got no tokens" in answer.err
    assert "calibration.all_experts: true" in answer.err
