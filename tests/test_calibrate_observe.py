"""Block statistics against the whole model run the usual way, with eager attention."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from transformers import AttentionInterface
from transformers.models.llama import modeling_llama

from outlierq.calibrate import collect
from outlierq.calibrate.collect import BLOCK_FIELDS, token_stride
from outlierq.calibrate.observe import NO_INTERFACE, BlockObserver, kurtosis
from outlierq.calibrate.runner import BlockRunner, PartWeights
from outlierq.calibrate.text.windows import token_classes
from outlierq.core.errors import StatsError
from outlierq.core.measured.block_stats import TOP_COLUMNS
from outlierq.core.model import Block, LinearSite, Structure

SEQUENCES, LENGTH, BATCH = 5, 24, 2
SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
ARCHITECTURES = {
    "llama": ("LlamaConfig", SMALL),
    "mistral, with a window": ("MistralConfig", {**SMALL, "head_dim": 16, "sliding_window": 8}),
    "gemma2, with soft caps": ("Gemma2Config", {**SMALL, "head_dim": 16, "sliding_window": 8}),
    "gpt-oss, with learned sinks": (
        "GptOssConfig",
        {**SMALL, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
    "mixtral": ("MixtralConfig", {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "bloom": ("BloomConfig", {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
}


def build(name: str) -> SimpleNamespace:
    """A tiny random model, its blocks, tokens and their classes, and what its blocks return."""
    torch.manual_seed(0)
    kind, settings = ARCHITECTURES[name]
    config = getattr(transformers, kind)(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = model.eval().requires_grad_(False)
    prefix = "transformer.h" if name == "bloom" else "model.layers"
    blocks = tuple(block_of(f"{prefix}.{i}", i, module) for i, module in enumerate(model.get_submodule(prefix)))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 96, (SEQUENCES, LENGTH), generator=generator)
    classes = torch.randint(1, 4, (SEQUENCES, LENGTH), generator=generator).to(torch.uint8)
    classes[:, 0] = 0
    return SimpleNamespace(model=model, structure=Structure(blocks, (), ()), ids=ids, classes=classes)


def block_of(name: str, index: int, module: torch.nn.Module) -> Block:
    sites = tuple(
        LinearSite(f"{name}.{part}", f"{name}.{part}.weight", None, *linear.weight.shape, index)
        for part, linear in module.named_modules()
        if isinstance(linear, torch.nn.Linear)
    )
    return Block(index, name, sites, ())


def observed(tiny: SimpleNamespace, fields=BLOCK_FIELDS, batch: int = BATCH):
    """The statistics and notes of every block, run one by one."""
    runner = BlockRunner(
        tiny.model,
        tiny.structure,
        PartWeights(lambda name: None, lambda name: None),
        dtype=torch.float32,
        batch_size=batch,
    )
    hidden = runner.start(tiny.ids)
    found = []
    for index, block in enumerate(tiny.structure.blocks):
        module = tiny.model.get_submodule(block.name)
        observer = BlockObserver(module, block, fields, sequence_length=LENGTH, ids=tiny.ids, classes=tiny.classes)
        before = number_of_hooks(module)
        with observer:
            runner.run(module, index, hidden)
        assert number_of_hooks(module) == before
        found.append((observer.finish(), observer.notes))
    return found


def number_of_hooks(module: torch.nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


@pytest.fixture(scope="module")
def llama() -> SimpleNamespace:
    return build("llama")


def block_outputs(tiny: SimpleNamespace) -> list[np.ndarray]:
    """[sequences, tokens, H] float64, what every block returns in one forward of the whole model."""
    outputs, handles = [], []
    for block in tiny.structure.blocks:
        module = tiny.model.get_submodule(block.name)
        keep = lambda part, args, output: outputs.append(output[0] if isinstance(output, tuple) else output)  # noqa: E731
        handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        tiny.model(tiny.ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return [output.double().numpy() for output in outputs]


def test_the_residual_stream_is_described_as_numpy_describes_it(llama):
    stride = token_stride(LENGTH, 7)
    for (stats, _), h in zip(observed(llama), block_outputs(llama), strict=True):
        np.testing.assert_allclose(stats.residual_abs_max, np.abs(h).max((0, 1)), rtol=1e-4)
        order = np.argsort(-np.abs(h).ravel())[:20]
        places = np.stack(np.unravel_index(order, h.shape), 1)
        found = stats.residual_top.double().numpy()
        assert (found[:, [0, 1, 3]] == places).all() and found.shape == (20, len(TOP_COLUMNS))
        assert (found[:, 2] == llama.ids.numpy()[places[:, 0], places[:, 1]]).all()
        np.testing.assert_allclose(found[:, 4], h.ravel()[order], rtol=1e-4)
        medians = np.sort(np.abs(h), -1)[..., (h.shape[-1] - 1) // 2]
        np.testing.assert_allclose(found[:, 5], medians[places[:, 0], places[:, 1]], rtol=1e-4)
        for sequence, row in enumerate(stats.residual_first.double().numpy()):
            place = np.unravel_index(np.abs(h[sequence]).argmax(), h.shape[1:])
            assert (row[0], row[1], row[3]) == (sequence, *place)
        sample = np.sort(medians.ravel()[::stride])
        assert stats.residual_median.item() == pytest.approx(sample[(len(sample) - 1) // 2], rel=1e-4)
        centred = h - h.mean(-1, keepdims=True)
        peaked = (centred**4).mean(-1) / (centred**2).mean(-1) ** 2
        assert stats.residual_kurtosis[0].item() == pytest.approx(peaked.ravel()[::stride].mean(), rel=1e-4)
        largest = np.abs(h).max(-1).argmax(1)
        expected = max(peaked.ravel()[::stride].max(), peaked[np.arange(SEQUENCES), largest].max())
        assert stats.residual_kurtosis[1].item() == pytest.approx(expected, rel=1e-4)


def test_queries_keys_and_values_are_those_after_rope(llama, monkeypatch):
    rotated, values, keys = [], [], []
    original = modeling_llama.apply_rotary_pos_emb
    for layer in llama.model.model.layers:  # an observer of our own, with nothing of the one under test
        assert layer.self_attn.k_proj.out_features == 16
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(
            modeling_llama, "apply_rotary_pos_emb", lambda *a, **k: rotated.append(original(*a, **k)) or rotated[-1]
        )
        handles = [
            getattr(layer.self_attn, name).register_forward_hook(lambda m, a, out, into=into: into.append(out))
            for layer in llama.model.model.layers
            for name, into in (("v_proj", values), ("k_proj", keys))
        ]
        llama.model(llama.ids, use_cache=False)
        for handle in handles:
            handle.remove()
    for index, (stats, notes) in enumerate(observed(llama)):
        query, key = rotated[index]
        value = values[index].view(SEQUENCES, LENGTH, 2, 8).transpose(1, 2)
        assert notes == []
        assert torch.allclose(stats.query_abs_max, query.abs().amax((0, 2)), rtol=1e-5)
        assert torch.allclose(stats.key_abs_max, key.abs().amax((0, 2)), rtol=1e-5)
        assert torch.allclose(stats.value_abs_max, value.abs().amax((0, 2)), rtol=1e-5)
        assert stats.query_abs_max.shape == (4, 8) and stats.key_abs_max.shape == (2, 8)
        norms = value.norm(dim=-1).double().numpy()
        expected = (norms[:, :, 0] / np.sort(norms[:, :, 1:], -1)[:, :, (LENGTH - 2) // 2]).mean(0)
        np.testing.assert_allclose(stats.sink_value_norm, expected, rtol=1e-4)
        prefix = f"model.layers.{index}.self_attn"
        assert stats.output_names == (f"{prefix}.k_proj", f"{prefix}.v_proj")
        before = torch.cat([keys[index], values[index]], -1).flatten(0, 1).double()
        for name, expected in (
            ("output_min", before.amin(0)),
            ("output_max", before.amax(0)),
            ("output_sum", before.sum(0)),
            ("output_sum_sq", before.pow(2).sum(0)),
        ):
            assert torch.allclose(stats.need(name).double(), expected, rtol=1e-4, atol=1e-4), name
    assert not torch.allclose(stats.key_abs_max.flatten(), stats.output_max[:16].abs(), rtol=1e-2)  # RoPE shows


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "bloom"])
def test_the_mass_of_attention_is_that_of_the_eager_model(name):
    tiny = build(name)
    found = observed(tiny)
    tiny.model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = tiny.model(tiny.ids, use_cache=False, output_attentions=True).attentions
    queries = list(range(LENGTH - 1, -1, -8))
    for (stats, _), weights in zip(found, attentions, strict=True):
        expected = np.zeros((4, 4))
        firsts = range(0, SEQUENCES, BATCH)
        for sequence in firsts:
            for column in range(4):
                seen = weights[sequence][:, queries].double().numpy()[:, :, tiny.classes[sequence].numpy() == column]
                expected[:, column] += seen.sum(-1).mean(-1) / len(firsts)
        np.testing.assert_allclose(stats.attention_mass, expected, atol=1e-5)
        total = stats.attention_mass.sum(1)
        assert total.min() < 0.999 if "oss" in name else torch.allclose(total, torch.ones(4), atol=1e-5)


def test_tokens_of_experts_are_those_that_the_router_chose():
    tiny = build("mixtral")
    with torch.no_grad():
        routers = tiny.model(tiny.ids, use_cache=False, output_router_logits=True).router_logits
    for (stats, _), logits in zip(observed(tiny), routers, strict=True):
        expected = logits.topk(2).indices.flatten().bincount(minlength=4)
        assert torch.equal(stats.expert_tokens, expected) and stats.expert_tokens.sum() == 2 * SEQUENCES * LENGTH


def test_experts_in_a_list_are_counted_by_what_they_receive():
    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            self.experts[2](x[0, :5])
            self.experts[0](x[0, :1])
            return x

    module = Experts()
    observer = BlockObserver(module, Block(0, "b", (), ()), frozenset({"expert_tokens"}), sequence_length=6)
    with observer:
        module(torch.ones(1, 6, 4))
        module(torch.ones(1, 6, 4))
    assert observer.finish().expert_tokens.tolist() == [2, 0, 10]


def test_a_model_without_the_attention_interface_is_noted_and_its_residual_kept():
    for stats, notes in observed(build("bloom")):
        assert notes == [NO_INTERFACE]
        assert all(getattr(stats, name) is None for name in ("key_abs_max", "attention_mass", "output_min"))
        assert stats.residual_top.shape == (20, 6) and stats.expert_tokens is None
        with pytest.raises(StatsError, match="do not hold `key_abs_max` of this block"):
            stats.need("key_abs_max")


def test_only_what_was_asked_for_is_kept(llama):
    for stats, notes in observed(llama, frozenset({"key_abs_max", "value_abs_max"})):
        assert stats.tensors().keys() == {"key_abs_max", "value_abs_max"} and notes == []


def test_statistics_do_not_depend_on_the_size_of_batches_and_pieces(llama, monkeypatch):
    alike = BLOCK_FIELDS - {"attention_mass"}  # which is of the first sequence of each batch
    whole = observed(llama, alike, batch=SEQUENCES)
    monkeypatch.setattr(collect, "CHUNK_ELEMENTS", 5 * 32)
    for (one, _), (other, _) in zip(whole, observed(llama, alike, batch=1), strict=True):
        for name, value in one.tensors().items():
            assert torch.allclose(value, other.need(name), rtol=1e-4, atol=1e-6), name


def test_the_output_of_the_model_does_not_change_and_the_interface_is_given_back(llama):
    before = AttentionInterface.get_interface
    with torch.no_grad():
        expected = llama.model(llama.ids, use_cache=False).logits
        observer = BlockObserver(
            llama.model.model.layers[0], llama.structure.blocks[0], sequence_length=LENGTH, classes=llama.classes
        )
        with observer:
            assert AttentionInterface.get_interface is not before
            assert torch.equal(llama.model(llama.ids, use_cache=False).logits, expected)
        with pytest.raises(RuntimeError), observer:
            raise RuntimeError
    assert AttentionInterface.get_interface is before


def test_kurtosis_is_3_for_normal_values_and_n_for_a_single_peak():
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    assert kurtosis(x).item() == pytest.approx(3, abs=0.1)
    peak = torch.zeros(1000)
    peak[3] = 500.0
    assert kurtosis(peak).item() == pytest.approx(1000, rel=0.01)
    assert kurtosis(torch.ones(8)).item() == 0


def test_tokens_are_classed_by_place_and_text(tiny_llama):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    ids = torch.tensor([tokenizer("a, b\nc. d?")["input_ids"], tokenizer("<s>e</s>:  ok!!")["input_ids"]])
    text = [[tokenizer.decode([token]) for token in row] for row in ids.tolist()]
    classes = token_classes(tokenizer, ids)
    assert text[0][:3] == ["a", ",", " "] and classes[0].tolist() == [0, 2, 3, 3, 2, 3, 2, 3, 3, 2]
    assert text[1][:4] == ["<s>", "e", "</s>", ":"] and classes[1].tolist() == [0, 3, 1, 2, 3, 3, 3, 3, 2, 2]


def test_attention_called_in_an_unknown_way_is_noted_not_guessed():
    from outlierq.calibrate.attention import AttentionSums

    classes = torch.zeros(2, 6, dtype=torch.uint8)
    module, heads = torch.nn.Module(), torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(0))

    flat = AttentionSums(BLOCK_FIELDS, classes)
    flat.add(0, module, heads[0], heads[0], heads[0])
    assert flat.finish() == {} and "3 axes" in flat.notes[0]

    masked = AttentionSums(BLOCK_FIELDS, classes)
    masked.add(0, module, heads, heads, heads, torch.ones(2, 6))
    assert "attention_mass" not in masked.finish() and "a mask of an unknown form" in masked.notes[0]

    short = AttentionSums(BLOCK_FIELDS, classes)
    short.add(0, module, heads[:, :, :3], heads, heads)
    assert "attention_mass" not in short.finish() and "not those of whole sequences" in short.notes[0]

    twice = AttentionSums(BLOCK_FIELDS, classes)
    twice.add(0, module, heads, heads, heads)
    twice.add(0, torch.nn.Module(), 9 * heads, heads, heads)
    assert torch.equal(twice.finish()["query_abs_max"], heads.abs().amax((0, 2)))
    assert any("several attentions" in text for text in twice.notes)


def test_a_value_that_is_zero_everywhere_but_first_has_a_norm_of_one():
    from outlierq.calibrate.attention import sink_norms

    value = torch.zeros(1, 2, 5, 4)
    value[0, 0, 0] = 3.0
    value[0, 1] = 2.0
    value[0, 1, 0] = 1.0
    assert sink_norms(value).tolist() == [[1.0, 0.5]]
