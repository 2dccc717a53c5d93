"""Experts stored as one tensor: quantized like experts stored apart, expert by expert, and put back where they stay."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_moe import CALIBRATION, logits, our_logits, write_mixture

from outlierq.load import open_checkpoint, unpacked
from outlierq.pipeline.planning.decide import make_plan
from outlierq.recipe import load

# What transformers 5 merges into `gate_up_proj` and `down_proj`, by family.
PARTS = {
    "Qwen3Moe": ("gate_proj", "up_proj", "down_proj"),
    "DeepseekV3": ("gate_proj", "up_proj", "down_proj"),
    "Mixtral": ("w1", "w3", "w2"),
}


def fuse(folder: Path, parts: tuple[str, str, str]) -> None:
    """Store all experts of a block in two tensors, as transformers 5 itself holds them."""
    tensors, experts = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if re.search(r"experts\.\d+\.", name)]:
        module, number, leaf = re.fullmatch(r"(.*experts)\.(\d+)\.(\w+)\.weight", name).groups()
        experts.setdefault(module, {}).setdefault(leaf, {})[int(number)] = tensors.pop(name)
    for module, leaves in experts.items():
        gate, up, down = (torch.stack([leaves[leaf][e] for e in sorted(leaves[leaf])]) for leaf in parts)
        tensors[f"{module}.gate_up_proj"], tensors[f"{module}.down_proj"] = torch.cat([gate, up], 1), down
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, tools):
    """A function from a family to two folders with the same model: experts apart, and fused. Read-only."""
    written: dict[str, tuple[Path, Path]] = {}

    def folders(family: str) -> tuple[Path, Path]:
        if family not in written:
            place = tmp_path_factory.mktemp(family)
            written[family] = tuple(write_mixture(place / kind, family, tools) for kind in ("apart", "fused"))
            fuse(written[family][1], PARTS[family])
        return written[family]

    return folders


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 259, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", PARTS)
def test_a_fused_checkpoint_is_presented_as_the_one_with_separate_experts(pairs, ids, family):
    apart, fused = pairs(family)
    separate, presented = open_checkpoint(str(apart)), unpacked(open_checkpoint(str(fused)))
    assert set(presented.tensors) == set(separate.tensors)
    together = presented.read_many(separate.tensors)
    for name, info in separate.tensors.items():
        assert presented.tensors[name] == info
        assert torch.equal(presented.read(name), separate.read(name)) and torch.equal(
            together[name], presented.read(name)
        )
    assert torch.allclose(our_logits(fused, ids), logits(fused, ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "recipe"), [("Qwen3Moe", "awq-gptq-w4"), ("Mixtral", "rtn-w8")])
def test_the_result_is_byte_for_byte_that_of_separate_experts(outlierq, pairs, tmp_path, family, recipe):
    for source, name in zip(pairs(family), ("apart", "fused"), strict=True):
        done = outlierq("quantize", source, "-r", recipe, "-o", tmp_path / name, *CALIBRATION)
        assert done.code == 0, done.err
    files = [tmp_path / name / "model.safetensors" for name in ("apart", "fused")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("family", PARTS)
def test_experts_that_stay_in_16_bits_stay_in_one_tensor(outlierq, pairs, tmp_path, family):
    source = load_file(pairs(family)[1] / "model.safetensors")
    plain = outlierq("quantize", pairs(family)[1], "-r", "dense", "-o", tmp_path / "dense")
    ignoring = ("--set", 'quantize.ignore=["*lm_head", "*experts.*"]')
    some = outlierq("quantize", pairs(family)[1], "-r", "rtn-w4", *ignoring, "-o", tmp_path / "some")
    assert plain.code == some.code == 0, plain.err + some.err
    assert "matches no linear" not in some.err + some.out
    written = load_file(tmp_path / "dense" / "model.safetensors")
    assert written.keys() == source.keys() and all(torch.equal(written[name], source[name]) for name in source)
    written = load_file(tmp_path / "some" / "model.safetensors")
    fused = [name for name in source if "experts." in name and source[name].dim() == 3]
    assert len(fused) >= 2 and all(torch.equal(written[name], source[name]) for name in fused)
    assert logits(tmp_path / "some", torch.arange(3, 20)[None]).isfinite().all()


def test_reading_one_expert_reads_no_other(pairs, monkeypatch):
    fused = open_checkpoint(str(pairs("Qwen3Moe")[1]))
    presented, rows = unpacked(fused), []
    read = fused.read_some_rows
    monkeypatch.setattr(fused, "read_some_rows", lambda name, some: rows.append((name, some)) or read(name, some))
    monkeypatch.setattr(fused, "read", lambda name: pytest.fail("the whole tensor was read"))
    leaves = [f"model.layers.0.mlp.experts.3.{leaf}.weight" for leaf in ("gate_proj", "up_proj")]
    presented.read_many(leaves)
    assert rows == [("model.layers.0.mlp.experts.gate_up_proj", [3])]


def test_experts_of_a_block_share_one_group_size(tools, tmp_path, outlierq):
    folder = write_mixture(tmp_path / "odd", "Qwen3Moe", tools, hidden_size=128, moe_intermediate_size=96)
    plan = make_plan(open_checkpoint(str(folder)), load("rtn-w4"))
    groups = {planned.scheme.group_size for planned in plan.sites if planned.site.expert}
    assert groups == {32} and {p.scheme.group_size for p in plan.sites if "self_attn" in p.site.module} >= {128}
    assert any("experts" in note and "group 32" in note for note in plan.notes)
    assert not any("different schemes" in client for client in plan.clients)
    done = outlierq("quantize", folder, "-r", "rtn-w4", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    few = torch.arange(3, 20)[None]
    assert torch.allclose(logits(tmp_path / "out", few), our_logits(tmp_path / "out", few), atol=0.05)
