"""Discovery on tiny random models of many architectures: groups, folds, and blocks that run one by one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

from outlierq.calibrate.folds import apply_fold, check_fold, producer_scale, prove_folds
from outlierq.calibrate.groups import NOT_CALLED, find_groups
from outlierq.calibrate.runner import BlockRunner, PartWeights
from outlierq.core.model import Block, Fold, InputGroup, LinearSite, Structure

SMALL = {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SMALL, "intermediate_size": 80, "num_key_value_heads": 2, "max_position_embeddings": 64}
TOKENS = 20

NORM_QKV = ("q k v", "norm input_layernorm")
V_TO_O = ("o", "linear v_proj")
UP_TO_DOWN = ("down", "linear up_proj")
LLAMA_FOLDS = [NORM_QKV, V_TO_O, ("gate up", "norm post_attention_layernorm"), UP_TO_DOWN]
GEMMA_FOLDS = [
    ("q k v", "offset-norm input_layernorm"),
    V_TO_O,
    ("gate up", "offset-norm pre_feedforward_layernorm"),
    UP_TO_DOWN,
]
OPT = {**SMALL, "ffn_dim": 80, "max_position_embeddings": 64, "word_embed_proj_dim": 48}
NEOX = {**SMALL, "intermediate_size": 80, "max_position_embeddings": 64, "attention_bias": True}
GEMMA3 = {**LLAMA, "head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
DEEPSEEK = {
    **LLAMA,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 2,
}

# name -> (config class, its arguments, the folds of each block: sites of the group, what absorbs its scale)
ARCHITECTURES = {
    "llama": ("LlamaConfig", {**LLAMA, "tie_word_embeddings": True}, LLAMA_FOLDS),
    "mistral with wide heads": ("MistralConfig", {**LLAMA, "head_dim": 16, "sliding_window": 8}, LLAMA_FOLDS),
    "qwen2": ("Qwen2Config", LLAMA, LLAMA_FOLDS),
    "qwen3": ("Qwen3Config", {**LLAMA, "head_dim": 16}, LLAMA_FOLDS),
    "gemma2": ("Gemma2Config", {**LLAMA, "head_dim": 16, "sliding_window": 8}, GEMMA_FOLDS),
    "gemma3": ("Gemma3TextConfig", GEMMA3, GEMMA_FOLDS),
    "phi3": (
        "Phi3Config",
        {**LLAMA, "pad_token_id": 0},
        [
            ("qkv", "norm input_layernorm"),
            ("o", "linear qkv_proj"),
            ("gate_up", "norm post_attention_layernorm"),
            ("down", "linear gate_up_proj"),
        ],
    ),
    "olmo2, without norms before": (
        "Olmo2Config",
        LLAMA,
        [("q k v", None), V_TO_O, ("gate up", None), UP_TO_DOWN],
    ),
    "mixtral, whose router reads the norm": ("MixtralConfig", {**LLAMA, "num_local_experts": 2}, [NORM_QKV, V_TO_O]),
    "opt with relu": (
        "OPTConfig",
        {**OPT, "activation_function": "relu"},
        [
            ("k v q", "norm self_attn_layer_norm"),
            ("out_proj", "linear v_proj"),
            ("fc1", "norm final_layer_norm"),
            ("fc2", "linear fc1"),
        ],
    ),
    "opt with gelu": (
        "OPTConfig",
        {**OPT, "activation_function": "gelu"},
        [
            ("k v q", "norm self_attn_layer_norm"),
            ("out_proj", "linear v_proj"),
            ("fc1", "norm final_layer_norm"),
            ("fc2", None),
        ],
    ),
    "opt with norms behind": (
        "OPTConfig",
        {**OPT, "do_layer_norm_before": False},
        [("k v q", None), ("out_proj", "linear v_proj"), ("fc1", None), ("fc2", "linear fc1")],
    ),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": 96, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64},
        [("c_attn", "norm ln_1"), ("attn.c_proj", "linear c_attn"), ("c_fc", "norm ln_2"), ("mlp.c_proj", None)],
    ),
    "gpt-neox, parallel": (
        "GPTNeoXConfig",
        {**NEOX, "use_parallel_residual": True},
        [
            ("query_key_value", "norm input_layernorm"),
            ("attention.dense", "linear query_key_value"),
            ("dense_h_to_4h", "norm post_attention_layernorm"),
            ("dense_4h_to_h", None),
        ],
    ),
    "gpt-neox, in sequence": (
        "GPTNeoXConfig",
        {**NEOX, "use_parallel_residual": False},
        [
            ("query_key_value", "norm input_layernorm"),
            ("attention.dense", "linear query_key_value"),
            ("dense_h_to_4h", "norm post_attention_layernorm"),
            ("dense_4h_to_h", None),
        ],
    ),
    "cohere, one norm for attention and mlp": (
        "CohereConfig",
        LLAMA,
        [("q k v gate up", "norm input_layernorm"), V_TO_O, UP_TO_DOWN],
    ),
    "bloom": (
        "BloomConfig",
        {"vocab_size": 96, "hidden_size": 48, "n_layer": 2, "n_head": 4},
        [
            ("query_key_value", "norm input_layernorm"),
            ("self_attention.dense", "linear query_key_value"),
            ("dense_h_to_4h", "norm post_attention_layernorm"),
            ("dense_4h_to_h", None),
        ],
    ),
    "openai-gpt, norms behind and lists between": (
        "OpenAIGPTConfig",
        {"vocab_size": 96, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64},
        [("c_attn", None), ("attn.c_proj", "linear c_attn"), ("c_fc", None), ("mlp.c_proj", None)],
    ),
    "nemotron, offset layer norm and squared relu": (
        "NemotronConfig",
        LLAMA,
        [
            ("q k v", "offset-norm input_layernorm"),
            V_TO_O,
            ("up", "offset-norm post_attention_layernorm"),
            ("down", None),
        ],
    ),
    "deepseek, latent attention": (
        "DeepseekV3Config",
        DEEPSEEK,
        [
            ("q_a_proj kv_a_proj_with_mqa", "norm input_layernorm"),
            ("q_b_proj", "norm q_a_layernorm"),
            ("kv_b_proj", "norm kv_a_layernorm"),
            ("o", "linear kv_b_proj"),
            ("gate up", "norm post_attention_layernorm"),
            UP_TO_DOWN,
        ],
    ),
    "gpt-bigcode, one key-value head": (
        "GPTBigCodeConfig",
        {"vocab_size": 96, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64},
        [("c_attn", "norm ln_1"), ("attn.c_proj", "linear c_attn"), ("c_fc", "norm ln_2"), ("mlp.c_proj", None)],
    ),
    "falcon, one key-value head": (
        "FalconConfig",
        {**SMALL, "multi_query": True, "new_decoder_architecture": False, "parallel_attn": True, "bias": True},
        [("query_key_value dense_h_to_4h", "norm input_layernorm"), ("self_attention.dense", "linear query_key_value")],
    ),
    "falcon, grouped heads": (
        "FalconConfig",
        {**SMALL, "num_kv_heads": 2, "new_decoder_architecture": True},
        [
            ("query_key_value", "norm ln_attn"),
            ("self_attention.dense", "linear query_key_value"),
            ("dense_h_to_4h", "norm ln_mlp"),
            ("dense_4h_to_h", None),
        ],
    ),
}


@dataclass
class Tiny:
    """A tiny model, its structure, a runner that was started, and the hidden states that enter block 0."""

    model: torch.nn.Module
    structure: Structure
    runner: BlockRunner
    ids: torch.Tensor
    expected: list[tuple[str, str | None]]

    def block(self, index: int) -> torch.nn.Module:
        return self.model.get_submodule(self.structure.blocks[index].name)

    def proved(self, index: int, hidden) -> list[InputGroup]:
        block, run_once = self.structure.blocks[index], self.runner.run_once(index, hidden)
        groups = find_groups(self.block(index), block, run_once)
        return prove_folds(self.block(index), block, groups, run_once, self.model.config)


def structure_of(model: torch.nn.Module) -> Structure:
    """Blocks and sites, with tensor names as the model has them."""
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList)]
    name, layers = max(lists, key=lambda entry: sum(p.numel() for p in entry[1].parameters()))
    blocks = []
    for index, layer in enumerate(layers):
        prefix = f"{name}.{index}"
        sites = []
        for part_name, part in layer.named_modules():
            if isinstance(part, torch.nn.Linear | Conv1D):
                full, transposed = f"{prefix}.{part_name}", isinstance(part, Conv1D)
                rows, columns = reversed(part.weight.shape) if transposed else part.weight.shape
                bias = f"{full}.bias" if part.bias is not None else None
                kind = type(part).__name__
                sites.append(LinearSite(full, f"{full}.weight", bias, rows, columns, index, kind, transposed))
        blocks.append(Block(index, prefix, tuple(sites), tuple(f"{prefix}.{n}" for n, _ in layer.named_parameters())))
    return Structure(tuple(blocks), (), ())


def randomise(model: torch.nn.Module) -> None:
    """Weights large enough to matter; gains and biases far from one and zero, as in a trained model."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1 and name.endswith("weight"):
            parameter.data = 1 + 0.4 * noise
        elif parameter.dim() == 1:
            parameter.data = 0.3 * noise
        else:
            parameter.data = noise * (1.5 / parameter.shape[-1] ** 0.5)


def build(config_name: str, arguments: dict, expected: list, *, batch_size: int = 2) -> Tiny:
    config = getattr(transformers, config_name)(**arguments)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    randomise(model)
    structure = structure_of(model)
    ids = torch.randint(0, 96, (5, TOKENS), generator=torch.Generator().manual_seed(2))
    runner = BlockRunner(
        model,
        structure,
        PartWeights(lambda name: None, lambda name: None),
        dtype=torch.float32,
        batch_size=batch_size,
    )
    return Tiny(model, structure, runner, ids, expected)


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def tiny(request) -> Tiny:
    return build(*ARCHITECTURES[request.param])


@pytest.fixture(scope="module")
def llama() -> Tiny:
    return build(*ARCHITECTURES["llama"])


def short(group: InputGroup, block: Block) -> str:
    return " ".join(site.module.removeprefix(block.name + ".") for site in group.sites)


def matches(group: InputGroup, words: str) -> bool:
    """Whether the sites of the group end as the words say ("q k v" is q_proj, k_proj, v_proj)."""
    words = words.split()
    ends = [(f".{site.module}").removesuffix("_proj") for site in group.sites]
    return len(ends) == len(words) and all(
        end.endswith((f".{word}", f".{word}".removesuffix("_proj"))) for end, word in zip(ends, words, strict=True)
    )


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def test_groups_and_folds_are_those_of_the_architecture(tiny):
    hidden = tiny.runner.start(tiny.ids)
    for index, block in enumerate(tiny.structure.blocks):
        found = tiny.proved(index, hidden)
        for words, fold in tiny.expected:
            group = next((g for g in found if matches(g, words)), None)
            assert group, f"no group {words} in {[short(g, block) for g in found]}"
            if fold is None:
                assert group.fold is None, group.fold_note
                assert "absorbs the scale:" not in group.fold_note and group.fold_note
            else:
                kind, producer = fold.split()
                assert group.fold, f"{words}: {group.fold_note}"
                assert (group.fold.kind, producer) == (kind, group.fold.weight.split(".")[-2]), group.fold_note
                assert "absorbs the scale: output changed by" in group.fold_note
        tiny.runner.run(tiny.block(index), index, hidden)


def test_blocks_run_one_by_one_give_the_hidden_states_of_the_model(tiny):
    hidden = tiny.runner.start(tiny.ids)
    expected = model_hidden_states(tiny)
    assert len(hidden) == 3 and len(expected) == len(tiny.structure.blocks) + 1
    for index in range(len(tiny.structure.blocks)):
        assert relative(hidden.values, expected[index]) < 1e-6
        tiny.runner.run(tiny.block(index), index, hidden)
    assert relative(hidden.values, expected[-1]) < 1e-6


def model_hidden_states(tiny: Tiny) -> list[torch.Tensor]:
    """Input of every block and output of the last one, from hooks in one forward of the whole model."""
    seen: list[torch.Tensor] = []

    def note_input(part, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    def note_output(part, args, output):
        seen.append(output[0] if isinstance(output, tuple | list) else output)

    blocks = [tiny.block(index) for index in range(len(tiny.structure.blocks))]
    handles = [block.register_forward_pre_hook(note_input, with_kwargs=True) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(note_output))
    try:
        tiny.model(input_ids=tiny.ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def test_all_folds_together_leave_the_logits_of_the_model(tiny):
    hidden = tiny.runner.start(tiny.ids)
    before = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    logits = tiny.model(input_ids=tiny.ids).logits
    folded = 0
    for index in range(len(tiny.structure.blocks)):
        for group in tiny.proved(index, hidden):
            if group.fold:
                put_fold(tiny.model, group, seed=folded)
                folded += 1
        tiny.runner.run(tiny.block(index), index, hidden)
    assert folded == 2 * sum(fold is not None for _, fold in tiny.expected)
    changed = sum(not torch.equal(value, before[name]) for name, value in tiny.model.state_dict().items())
    error = relative(tiny.model(input_ids=tiny.ids).logits, logits)
    tiny.model.load_state_dict(before)
    assert changed > folded and error < 1e-4


def put_fold(model: torch.nn.Module, group: InputGroup, seed: int) -> None:
    """Scale one group of the whole model by random scales and let its producer absorb the inverse."""
    index = torch.tensor(group.fold.index)
    drawn = 0.5 + 1.5 * torch.rand(int(index.max()) + 1, generator=torch.Generator().manual_seed(seed))
    scale = drawn[index]
    parameters = dict(model.named_parameters())
    for name, value in apply_fold(parameters, group.fold, scale).items():
        parameters[name].data.copy_(value)
    for site in group.sites:
        parameters[site.weight].data.mul_(scale[:, None] if site.transposed else scale)


def test_a_wrong_fold_is_rejected(tiny):
    hidden = tiny.runner.start(tiny.ids)
    block, run_once = tiny.structure.blocks[0], tiny.runner.run_once(0, hidden)
    tried = 0
    for group in tiny.proved(0, hidden):
        if group.fold:
            assert check_fold(tiny.block(0), block, group, group.fold, run_once).admitted
        for wrong in wrong_folds(group, block):
            tried += 1
            proof = check_fold(tiny.block(0), block, group, wrong, run_once)
            assert not proof.admitted and proof.error > 1e-3, (group.name, wrong.kind, wrong.weight)
    assert tried >= 2


def wrong_folds(group: InputGroup, block: Block) -> list[Fold]:
    """Permuted channels, the other form of norm, one site of the group left out, another producer."""
    if group.fold is None:
        return []
    fold = group.fold
    wrong = [replace(fold, index=fold.index[1:] + fold.index[:1])]
    other = {"norm": "offset-norm", "offset-norm": "norm"}
    if fold.kind in other:
        wrong.append(replace(fold, kind=other[fold.kind]))
    for site in block.sites:
        if site.out_features > max(fold.index) and site not in group.sites and site.weight != fold.weight:
            wrong.append(Fold("linear", site.weight, site.bias, fold.index, site.transposed))
    return wrong


def test_a_fold_that_forgets_a_reader_is_rejected(llama):
    hidden = llama.runner.start(llama.ids)
    block, run_once = llama.structure.blocks[0], llama.runner.run_once(0, hidden)
    group = next(g for g in llama.proved(0, hidden) if len(g.sites) == 3)
    for left_out in group.sites:
        rest = replace(group, sites=tuple(site for site in group.sites if site is not left_out))
        assert not check_fold(llama.block(0), block, rest, group.fold, run_once).admitted


def test_a_fold_that_shows_nothing_is_not_admitted(llama):
    hidden = llama.runner.start(llama.ids)
    block, run_once = llama.structure.blocks[0], llama.runner.run_once(0, hidden)
    down = llama.block(0).mlp.down_proj
    before = down.weight.data.clone()
    down.weight.data.mul_(1e-9)
    try:
        groups = find_groups(llama.block(0), block, run_once)
        group = prove_folds(llama.block(0), block, groups, run_once, llama.model.config)[-1]
    finally:
        down.weight.data.copy_(before)
    assert group.fold is None and "shows nothing" in group.fold_note


def test_the_proof_leaves_the_weights_of_the_block_alone(llama):
    hidden = llama.runner.start(llama.ids)
    before = {name: value.clone() for name, value in llama.model.state_dict().items()}
    llama.proved(0, hidden)
    assert all(torch.equal(value, before[name]) for name, value in llama.model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.block(0).modules())


def test_folds_are_found_in_bfloat16_blocks_too():
    tiny = build(*ARCHITECTURES["llama"])
    tiny.model.to(torch.bfloat16)
    tiny.runner.dtype = torch.bfloat16
    hidden = tiny.runner.start(tiny.ids)
    assert hidden.values.dtype == torch.bfloat16
    assert all(group.fold for group in tiny.proved(0, hidden))


def test_tensor_names_with_another_prefix_than_the_model_are_understood():
    tiny = build(*ARCHITECTURES["gpt2"])
    tiny.structure = strip_prefix(tiny.structure, "transformer.")
    tiny.runner.structure = tiny.structure
    groups = tiny.proved(0, tiny.runner.start(tiny.ids))
    assert [group.fold and group.fold.weight for group in groups] == [
        "h.0.ln_1.weight",
        "h.0.attn.c_attn.weight",
        "h.0.ln_2.weight",
        None,
    ]
    assert groups[0].fold.bias == "h.0.ln_1.bias"


def strip_prefix(structure: Structure, prefix: str) -> Structure:
    """The structure as if the checkpoint wrote its tensor names without the prefix."""

    def site(old: LinearSite) -> LinearSite:
        return replace(old, weight=old.weight.removeprefix(prefix), bias=old.bias.removeprefix(prefix))

    return Structure(
        tuple(
            replace(
                block,
                sites=tuple(map(site, block.sites)),
                tensors=tuple(name.removeprefix(prefix) for name in block.tensors),
            )
            for block in structure.blocks
        ),
        (),
        (),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_that_hand_keys_and_values_to_later_ones_run_one_by_one(dtype):
    kinds = ["sliding_attention", "full_attention"] * 2
    arguments = {**LLAMA, "num_hidden_layers": 4, "head_dim": 12, "sliding_window": 8, "layer_types": kinds}
    tiny = build("Gemma4TextConfig", {**arguments, "num_kv_shared_layers": 2}, [])
    tiny.model.to(dtype)
    tiny.runner.dtype = dtype
    hidden = tiny.runner.start(tiny.ids)
    expected = model_hidden_states(tiny)
    for index in range(4):
        folds = [group.fold and group.fold.kind for group in tiny.proved(index, hidden)]
        assert folds == ["norm", None, "norm", "linear", None, None]
        tiny.runner.run(tiny.block(index), index, hidden)
        assert relative(hidden.values, expected[index + 1]) < (1e-6 if dtype == torch.float32 else 1e-2)


class PartlyUsed(torch.nn.Module):
    """A block with a linear that its forward does not call."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, hidden):
        return hidden + self.used(hidden)


def test_a_site_that_is_not_called_is_alone_and_noted():
    module = PartlyUsed()
    sites = tuple(LinearSite(f"b.0.{n}", f"b.0.{n}.weight", f"b.0.{n}.bias", 8, 8, 0) for n in ("unused", "used"))
    block = Block(0, "b.0", sites, tuple(f"b.0.{name}" for name, _ in module.named_parameters()))
    groups = find_groups(module, block, lambda part: part(torch.ones(1, 3, 8)))
    assert [group.name for group in groups] == ["b.0.unused", "b.0.used"]
    assert groups[0].fold_note == NOT_CALLED and groups[1].fold_note == ""


def test_channels_that_share_a_producer_must_share_their_scale():
    fold = Fold("linear", "v.weight", None, (0, 1, 0, 1))
    weight = torch.ones(2, 3)
    with pytest.raises(ValueError, match="2 of 4 channels"):
        apply_fold({"v.weight": weight}, fold, torch.tensor([2.0, 4.0, 3.0, 5.0]))
    changed = apply_fold({"v.weight": weight}, fold, torch.tensor([2.0, 4.0, 2.0, 4.0]))
    assert torch.equal(changed["v.weight"], torch.tensor([[0.5] * 3, [0.25] * 3])) and weight.eq(1).all()
    tail = Fold("linear", "qkv.weight", "qkv.bias", (3, 2))
    assert producer_scale(tail, torch.tensor([2.0, 4.0]), 4).tolist() == [1, 1, 4, 2]
    with pytest.raises(ValueError, match="3 channels, the fold 2"):
        producer_scale(tail, torch.ones(3))
