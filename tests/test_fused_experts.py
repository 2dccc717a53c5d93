"""Experts stored as one tensor: quantized like experts stored apart, expert by expert, and put back where they stay."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from libraries import experts_in_one
from safetensors.torch import load_file, save_file
from test_moe import CALIBRATION, SMALL, logits, our_logits, write_mixture

from outlierq.load import experts_together, fused_pieces, open_checkpoint, unpacked
from outlierq.load.model.experts.fused import router_names
from outlierq.load.model.experts.layout import Layout
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


# Layouts that classes declare, and one that has to be proved (Llama 4); all stored in one tensor by transformers, too.
LAYOUTS = {
    "GptOss": ("GptOssConfig", {"num_local_experts": 8, "head_dim": 16, "sliding_window": 32}),
    "GraniteMoe": ("GraniteMoeConfig", {"num_local_experts": 8}),
    "AriaText": ("AriaTextConfig", {"moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 1}),
    "Llama4": ("Llama4TextConfig", {"num_local_experts": 4, "intermediate_size_mlp": 64, "head_dim": 16}),
}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory, tools):
    """A function from a family of `LAYOUTS` to its folder. Read-only."""
    written: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in written:
            torch.manual_seed(0)
            kind, own = LAYOUTS[family]
            config = getattr(transformers, kind)(**{**SMALL, **own}, pad_token_id=0)
            model = getattr(transformers, f"{family}ForCausalLM")(config)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.dim() == 1 and "norm" not in name:
                        parameter.normal_(std=0.1)
            written[family] = tmp_path_factory.mktemp("layouts") / family
            model.save_pretrained(written[family])
            tools.write_tokenizer(written[family])
        return written[family]

    return folder


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=experts_in_one if family == "AriaText" else ()) for family in LAYOUTS]
)
def test_separate_experts_of_every_layout_compute_what_the_class_computes(layouts, ids, family):
    folder = layouts(family)
    presented = unpacked(open_checkpoint(str(folder)))
    assert any(".experts.3." in name and len(info.shape) == 2 for name, info in presented.tensors.items())
    assert torch.allclose(our_logits(folder, ids), logits(folder, ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", LAYOUTS)
def test_experts_of_every_layout_are_put_together_bit_for_bit(layouts, family):
    presented = unpacked(open_checkpoint(str(layouts(family))))
    source = load_file(layouts(family) / "model.safetensors")
    again = experts_together(presented, {piece.module for piece in fused_pieces(presented).values()})
    assert set(again.tensors) == set(source)
    for name, tensor in source.items():
        assert torch.equal(again.read(name), tensor) and again.tensors[name].nbytes == tensor.nbytes


def test_experts_that_no_program_loads_apart_stay_in_16_bits_unless_they_are_named(outlierq, layouts, tmp_path, ids):
    source = layouts("GptOss")
    kept = outlierq("quantize", source, "-r", "rtn-w8", "-o", tmp_path / "kept")
    assert kept.code == 0, kept.err
    said = " ".join((kept.out + kept.err).split())
    assert "of the weights of the linear layers are quantized" in said and "GptOssForCausalLM from one tensor" in said
    assert torch.allclose(logits(tmp_path / "kept", ids), our_logits(tmp_path / "kept", ids), atol=1e-3)
    named = ("--set", "quantize.overrides=[{match: '*.experts.*', bits: 8}]")
    done = outlierq("quantize", source, "-r", "rtn-w8", *named, "-o", tmp_path / "named")
    assert done.code == 0, done.err
    assert "does not load them" in done.out + done.err and "are quantized; the rest" not in done.out + done.err
    apart = (our_logits(tmp_path / "named", ids) - our_logits(source, ids)).abs()
    assert 1e-4 < apart.mean() < 0.05  # some tokens change their experts


@pytest.mark.parametrize("settings", [(), ("--set", 'quantize.ignore=["*lm_head", "*experts.*"]')])
def test_llama_4_loads_with_its_experts_quantized_and_with_its_experts_kept(outlierq, layouts, tmp_path, ids, settings):
    done = outlierq("quantize", layouts("Llama4"), "-r", "rtn-w8", *settings, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert torch.allclose(logits(tmp_path / "out", ids), our_logits(tmp_path / "out", ids), atol=1e-3)


def test_experts_that_stay_are_declared_by_the_names_of_the_class_where_the_file_has_others(
    outlierq, layouts, tmp_path, ids
):
    source = layouts("GraniteMoe")
    assert any(
        name.endswith("block_sparse_moe.input_linear.weight") for name in load_file(source / "model.safetensors")
    )
    ignoring = ("--set", 'quantize.ignore=["*lm_head", "*experts.*"]')
    done = outlierq("quantize", source, "-r", "rtn-w8", *ignoring, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert torch.allclose(logits(tmp_path / "out", ids), our_logits(tmp_path / "out", ids), atol=1e-3)


def test_experts_that_transformers_loads_in_one_tensor_only_are_said_first_with_a_command_that_works(outlierq, layouts):
    source = layouts("GraniteMoe")
    said = outlierq("plan", source, "-r", "rtn-w8")
    notes = " ".join(said.out.split()).partition("note ")[2]
    assert notes.startswith("transformers 5.23, experts: does not load them"), said.out + said.err
    assert "compressed-tensors 0.20: loads" not in notes
    command = re.search(r"`--set '(quantize\.ignore=.*?)'` keeps them in 16 bits", notes).group(1)
    plan = make_plan(open_checkpoint(str(source)), load("rtn-w8", [command]))
    assert not any(planned.scheme for planned in plan.sites if planned.site.expert)
    lines = [line for line in plan.clients if line.startswith("transformers")]
    assert lines and all(": loads" in line for line in lines)  # and it does: see the test before
    merged = make_plan(open_checkpoint(str(layouts("Llama4"))), load("rtn-w8"))
    assert not merged.experts_remedy


def test_the_proof_refuses_a_module_that_computes_something_else(layouts):
    from outlierq.load.model.experts.proof import proved_layout

    class Other(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = torch.nn.Parameter(torch.empty(4, 64, 16, device="meta"))
            self.down_proj = torch.nn.Parameter(torch.empty(4, 16, 32, device="meta"))
            self.act_fn = torch.nn.SiLU()
            self.turned = False

        def forward(self, x, chosen, weights):
            output = torch.zeros_like(x)
            for token, (experts, gains) in enumerate(zip(chosen, weights, strict=True)):
                for expert, gain in zip(experts, gains, strict=True):
                    gate, up = (self.gate_up_proj[expert] @ x[token]).chunk(2)
                    gate, up = (up, gate) if self.turned else (gate, up)
                    output[token] += gain * (self.down_proj[expert] @ (self.act_fn(gate) * up))
            return output

    module = Other()
    assert proved_layout(module) == Layout()
    module.turned = True
    assert proved_layout(module) is None


def test_routers_inside_of_parts_are_known_by_their_rows():
    class Router(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.proj = torch.nn.Linear(64, 16), torch.nn.Linear(16, 9)

    class Mlp(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = torch.nn.Linear(12, 32), torch.nn.Linear(32, 12)

    class Fused(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.num_experts, self.weight = 8, torch.nn.Parameter(torch.empty(8, 32, 64))

    block = torch.nn.ModuleDict(
        {"router": Router(), "shared": Mlp(), "experts": Fused(), "one": torch.nn.Linear(64, 1)}
    )
    assert router_names(torch.nn.ModuleDict({"mlp": block})) == {"mlp.router.inner", "mlp.router.proj", "mlp.one"}
