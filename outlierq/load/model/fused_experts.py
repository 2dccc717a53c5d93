"""Mixtures of experts: the model class keeps all experts of a block in two tensors, files keep each expert apart.

The skeleton is given the experts as they are stored, one linear layer per tensor, so that everything that knows linear
layers (discovery, statistics, folds, quantization, export under the names on disk) knows experts, too. What a fused
module computes is not guessed: it must declare itself by transformers' experts interface, and the names of its parts on
disk come from transformers' own conversion table. A fused module that declares anything else (biases, transposed
weights) stays as it is. `calibrate/experts.py` says which tokens they see.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from outlierq.core.model import Checkpoint

# How the fused modules of transformers 5 call their weights: [experts, 2 * inner, hidden], [experts, hidden, inner].
GATE_UP, DOWN = "gate_up_proj", "down_proj"
# What transformers' decorator for experts must have declared; both layouts beside it are written for other models.
PLAIN = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}


@dataclass(frozen=True)
class Leaves:
    """What an expert's three weights are called on disk."""

    gate: str
    up: str
    down: str


class Expert(torch.nn.Module):
    """down(activation(gate x) * up x) * gain, with one linear layer per weight.

    shell: the fused module without its weights; its gating is used, so that clamped variants come out right.
    """

    def __init__(self, leaves: Leaves, inner: int, hidden: int, shell: torch.nn.Module, dtype: torch.dtype):
        super().__init__()
        self.leaves, self.shell = leaves, (shell,)  # in a tuple: it is no part of this module
        sizes = {leaves.gate: (hidden, inner), leaves.up: (hidden, inner), leaves.down: (inner, hidden)}
        for leaf, (columns, rows) in sizes.items():
            self.add_module(leaf, torch.nn.Linear(columns, rows, bias=False, device="meta", dtype=dtype))

    def forward(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        """x: [tokens, hidden]. gain: [tokens], how much the router wants of this expert."""
        gate, up, down = (self.get_submodule(leaf) for leaf in (self.leaves.gate, self.leaves.up, self.leaves.down))
        inner = self.shell[0]._apply_gate(torch.cat([gate(x), up(x)], dim=-1))
        return down(inner) * gain[:, None]


class SeparateExperts(torch.nn.Module):
    """A fused module's experts, each a module of its own called by its number; the same output.

    routing: "chosen": an expert sees the tokens that the router sends to it. "all": it sees all of them, and those that
    were not sent to it count nothing, so the output stays the same. "probe": all of them count once more, so that every
    expert shows in the output, and the router still does; for proofs, never for text.
    """

    def __init__(self, fused: torch.nn.Module, leaves: Leaves):
        super().__init__()
        weight = fused._parameters[DOWN]
        self.num_experts, hidden, inner = weight.shape
        for name in (GATE_UP, DOWN):
            del fused._parameters[name]
        for number in range(self.num_experts):
            self.add_module(str(number), Expert(leaves, inner, hidden, fused, weight.dtype))
        self.routing = "chosen"

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states: [tokens, hidden]. top_k_index, top_k_weights: [tokens, k]."""
        output = torch.zeros_like(hidden_states)
        for name, expert in self.named_children():
            place, token = torch.where(int(name) == top_k_index.T)
            gain = top_k_weights[token, place]
            if self.routing == "chosen":
                if len(token):
                    output.index_add_(0, token, expert(hidden_states[token], gain).to(output.dtype))
                continue
            gains = torch.full(top_k_weights.shape[:1], float(self.routing == "probe"), device=gain.device)
            output += expert(hidden_states, gains.to(gain.dtype).index_add_(0, token, gain)).to(output.dtype)
        return output


def separate_experts(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Replace fused experts of the model by separate ones wherever the checkpoint stores them so. Changes the model."""
    if checkpoint.kind == "gguf":
        return  # these files keep experts together
    for name, part in list(model.named_modules()):
        if not _is_plain(part):
            continue
        leaves = _leaves(model, name.rpartition(".")[2])
        if leaves and _stored_apart(checkpoint, name.rpartition(".")[2], leaves):
            model.set_submodule(name, SeparateExperts(part, leaves))


def _is_plain(part: torch.nn.Module) -> bool:
    """Whether the module declares that it holds gate, up and down of all experts, and nothing else."""
    if {name for name, _ in part.named_parameters()} != {GATE_UP, DOWN}:
        return False
    return all(getattr(part, name, value) == value for name, value in PLAIN.items()) and hasattr(part, "_apply_gate")


def _leaves(model: torch.nn.Module, name: str) -> Leaves | None:
    """The names of the parts that transformers merges into a module called `name`; None when it does another thing."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    patterns: dict[str, list[str]] = {}
    for step in get_model_conversion_mapping(model):
        if isinstance(step, WeightConverter):
            target = step.target_patterns[0].rpartition(".")[2]
            operations = [type(operation).__name__ for operation in step.operations]
            merging = {GATE_UP: ["MergeModulelist", "Concatenate"], DOWN: ["MergeModulelist"]}
            if operations == merging.get(target):
                patterns[target] = [_leaf(pattern, name) for pattern in step.source_patterns]
    parts = [*patterns.get(GATE_UP, []), *patterns.get(DOWN, [])]
    return Leaves(*parts) if len(parts) == 3 and all(parts) else None


def _leaf(pattern: str, name: str) -> str:
    """ "w1" of ".experts.*.w1.weight" for the module called "experts"; empty for a pattern of another form."""
    before, _, leaf = pattern.removesuffix(".weight").rpartition(".")
    return leaf if pattern.endswith(".weight") and before.endswith(f"{name}.*") else ""


def _stored_apart(checkpoint: Checkpoint, name: str, leaves: Leaves) -> bool:
    """Whether the checkpoint has a tensor of the first expert alone."""
    return any(tensor.endswith(f"{name}.0.{leaves.gate}.weight") for tensor in checkpoint.tensors)


def fused_experts(model: torch.nn.Module, names: Mapping[str, str]) -> list[str]:
    """Names of the stored tensors that hold a weight of all experts at once. names: parameter -> stored tensor."""
    modules = [name for name, part in model.named_modules() if hasattr(part, "_apply_gate")]
    slots = [f"{name}.{slot}" for name in modules for slot, _ in model.get_submodule(name).named_parameters()]
    return [names[slot] for slot in slots if slot in names and model.get_parameter(slot).dim() == 3]


def expert_names(model: torch.nn.Module) -> list[str]:
    """Names of all separate experts within a module."""
    return [name for name, part in model.named_modules() if isinstance(part, Expert)]


def router_names(model: torch.nn.Module) -> set[str]:
    """Names of the parts beside separate experts that weigh them: a row for each expert, or one for a shared expert."""
    return set(_routers(model))


def _routers(model: torch.nn.Module) -> Iterator[str]:
    """The modules beside experts whose weight has a row for each of them, or a single one."""
    for name, part in model.named_modules():
        counts = {child.num_experts for child in part.children() if isinstance(child, SeparateExperts)}
        if counts:
            for child_name, child in part.named_children():
                weight = child._parameters.get("weight")
                if weight is not None and weight.dim() == 2 and len(weight) in counts | {1}:
                    yield f"{name}.{child_name}".removeprefix(".")
