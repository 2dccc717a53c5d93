"""Mixtures of experts: the model class keeps all experts of a block in a few tensors, here each is a module of its own.

The skeleton is given the experts as they are presented, one linear layer per tensor (`experts_apart.py` presents fused
tensors so), so that everything that knows linear layers (discovery, statistics, folds, quantization, export under the
names on disk) knows experts, too. What a fused module computes is not guessed: it must declare itself
(`expert_layout.py`). `calibrate/experts.py` says which tokens they see.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from outlierq.core.model import EXPERT_COUNTS
from outlierq.load.model.expert_layout import Layout, Leaves, fused_modules, merged_leaves, usual_leaves
from outlierq.load.model.names import stored_names

if TYPE_CHECKING:
    from outlierq.core.model import Checkpoint


class Expert(torch.nn.Module):
    """down(activation(gate x) * up x) * gain, with one linear layer per weight; without a gate down(activation(up x)).

    shell: the fused module without its weights; its gating is used, so that clamped variants come out right.
    """

    def __init__(self, layout: Layout, leaves: Leaves, shell: torch.nn.Module, dtype: torch.dtype):
        super().__init__()
        self.layout, self.leaves, self.shell = layout, leaves, (shell,)  # in a tuple: it is no part of this module
        _, inner, hidden = shell.widths
        sizes = {leaves.gate: (hidden, inner), leaves.up: (hidden, inner), leaves.down: (inner, hidden)}
        for leaf, (columns, rows) in sizes.items():
            if leaf is not None:
                linear = torch.nn.Linear(columns, rows, bias=layout.has_bias, device="meta", dtype=dtype)
                self.add_module(leaf, linear)

    def forward(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        """x: [tokens, hidden]. gain: [tokens], how much the router wants of this expert."""
        shell, up = self.shell[0], self.get_submodule(self.leaves.up)(x)
        if self.leaves.gate is None:
            inner = shell.act_fn(up)
        else:
            both = self.get_submodule(self.leaves.gate)(x), up
            joined = torch.cat(both, -1) if self.layout.is_concatenated else torch.stack(both, -1).flatten(-2)
            inner = _gated(shell, joined, self.layout)
        output = self.get_submodule(self.leaves.down)(inner)
        if self.layout.has_post_expert_norm:
            output = shell.post_expert_norm(output)
        return output * gain[:, None]


class SeparateExperts(torch.nn.Module):
    """A fused module's experts, each a module of its own called by its number; the same output.

    routing: "chosen": an expert sees the tokens that the router sends to it. "all": it sees all of them, and those that
    were not sent to it count nothing, so the output stays the same. "probe": all of them count once more, so that every
    expert shows in the output, and the router still does; for proofs, never for text.
    is_merged: whether transformers makes the fused module out of experts that are stored apart. is_replaced: whether it
    has modules of separate experts for compressed checkpoints of this class, and then takes no fused ones.
    """

    def __init__(
        self, fused: torch.nn.Module, layout: Layout, leaves: Leaves, *, is_merged: bool, is_replaced: bool = False
    ):
        super().__init__()
        self.layout, self.is_merged, self.is_replaced = layout, is_merged or is_replaced, is_replaced
        dtype = fused._parameters[layout.up].dtype
        fused.widths = layout.widths(fused)
        self.num_experts = fused.widths[0]
        for name in layout.slots:
            del fused._parameters[name]
        if layout.has_post_expert_norm:  # one for all experts; it is called by the shell, and gets its weights here
            self.post_expert_norm = fused.post_expert_norm
        first = Expert(layout, leaves, fused, dtype)
        for number in range(self.num_experts):  # copies: a linear fills its weights when it is made, even on meta
            self.add_module(str(number), copy.deepcopy(first, {id(fused): fused}))
        self.routing = "chosen"

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_states: [tokens, hidden]. top_k_index, top_k_weights: [tokens, k], for a layout that is not sorted."""
        if top_k_index is None or top_k_weights is None:
            return self._sorted(hidden_states)
        output = torch.zeros_like(hidden_states)
        for number in range(self.num_experts):
            expert = self.get_submodule(str(number))
            place, token = torch.where(number == top_k_index.T)
            gain = top_k_weights[token, place]
            if self.routing == "chosen":
                if len(token):
                    output.index_add_(0, token, expert(hidden_states[token], gain).to(output.dtype))
                continue
            gains = torch.full(top_k_weights.shape[:1], float(self.routing == "probe"), device=gain.device)
            output += expert(hidden_states, gains.to(gain.dtype).index_add_(0, token, gain)).to(output.dtype)
        return output

    def _sorted(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states: [experts * tokens, hidden], weighted by the router: zeros where an expert was not chosen."""
        inputs = hidden_states.view(self.num_experts, -1, hidden_states.shape[-1])
        if self.routing == "probe":
            inputs = inputs + inputs.sum(0)
        output = torch.zeros_like(inputs)
        for number, x in enumerate(inputs):
            seen = x.any(-1) if self.routing == "chosen" else torch.ones_like(x[:, 0], dtype=torch.bool)
            if bool(seen.any()):
                output[number, seen] = self.get_submodule(str(number))(x[seen], torch.ones_like(x[seen, 0]))
        return output.view_as(hidden_states)


def _gated(shell: torch.nn.Module, joined: torch.Tensor, layout: Layout) -> torch.Tensor:
    """What the module makes of gate and up, [tokens, 2 * inner] as they lie in its tensor; activation(gate) * up where
    it has no way of its own.
    """
    if hasattr(shell, "_apply_gate"):
        return shell._apply_gate(joined)
    gate, up = joined.chunk(2, -1) if layout.is_concatenated else (joined[..., ::2], joined[..., 1::2])
    return shell.act_fn(gate) * up


def separate_experts(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Replace fused experts of the model by separate ones wherever the checkpoint has them so. Changes the model."""
    if checkpoint.kind == "gguf":
        return  # these files keep experts together
    layouts = fused_modules(model)
    if not layouts:
        return
    held = stored_names([name for name, info in checkpoint.tensors.items() if len(info.shape) == 3], model)
    tables: dict[tuple[str, Layout], Leaves | None] = {}
    for name, layout in layouts.items():
        short, part = name.rpartition(".")[2], model.get_submodule(name)
        if (short, layout) not in tables:
            tables[short, layout] = merged_leaves(model, short, layout)
        merged = tables[short, layout]
        leaves = merged or usual_leaves(layout)
        if f"{name}.{layout.up}" not in held and _is_apart(checkpoint, short, leaves):
            ways = {"is_merged": merged is not None, "is_replaced": _is_replaced(part)}
            model.set_submodule(name, SeparateExperts(part, layout, leaves, **ways))


def _is_replaced(part: torch.nn.Module) -> bool:
    """Whether transformers replaces the module by one of separate experts when it loads a compressed checkpoint."""
    from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

    return type(part).__name__ in MODULES_TO_PATCH_FOR_QUANTIZATION


def unmerged_experts(model: torch.nn.Module) -> list[str]:
    """Modules of separate experts that transformers cannot load from separate experts: it knows their class fused."""
    return [name for name, part in model.named_modules() if isinstance(part, SeparateExperts) and not part.is_merged]


def replaced_experts(model: torch.nn.Module) -> list[str]:
    """Modules of separate experts that transformers has apart in compressed checkpoints, and loads in no other way."""
    return [name for name, part in model.named_modules() if isinstance(part, SeparateExperts) and part.is_replaced]


def _is_apart(checkpoint: Checkpoint, name: str, leaves: Leaves) -> bool:
    """Whether the checkpoint has a tensor of the first expert alone."""
    return any(tensor.endswith(f"{name}.0.{leaves.up}.weight") for tensor in checkpoint.tensors)


def expert_names(model: torch.nn.Module) -> list[str]:
    """Names of all separate experts within a module."""
    return [name for name, part in model.named_modules() if isinstance(part, Expert)]


def router_names(model: torch.nn.Module) -> set[str]:
    """Names of the parts that say which experts see a token, or how much of a shared one is wanted.

    Beside experts, together or apart: what has a row for each of them, or a single one, itself or as the last matrix of
    a part that holds no expert. All linears of such a part decide with it.
    """
    return set(_routers(model))


def _routers(model: torch.nn.Module) -> Iterator[str]:
    """The routers beside every mixture."""
    for name, part in model.named_modules():
        counts = {count for child in part.children() if (count := _experts_in(child))}
        for child_name, child in part.named_children() if counts else ():
            if not _experts_in(child):
                inside = f"{name}.{child_name}".removeprefix(".")
                yield from (f"{inside}.{each}".removesuffix(".") for each in _deciding(child, counts))


def _experts_in(part: torch.nn.Module) -> int:
    """The number of experts that a module holds, 0 when it is no mixture."""
    if isinstance(part, SeparateExperts):
        return part.num_experts
    stacks = [p for p in part._parameters.values() if p is not None and p.dim() == 3]
    number = next((getattr(part, key) for key in EXPERT_COUNTS if isinstance(getattr(part, key, None), int)), 0)
    return number if any(len(stack) == number for stack in stacks) else 0


def _deciding(child: torch.nn.Module, counts: set[int]) -> list[str]:
    """Names, within a part beside experts, of the matrices by which it chooses among them; none for another part."""
    matrices = {
        name: part._parameters["weight"]
        for name, part in child.named_modules()
        if part._parameters.get("weight") is not None and part._parameters["weight"].dim() == 2
    }
    if not matrices:
        return []
    width, rows = next(iter(matrices.values())).shape[1], list(matrices.values())[-1].shape[0]
    # A few more rows than experts: for none of them, or for shared ones. What gives back what it got is a layer.
    chooses = rows in counts or (rows != width and any(count < rows < 2 * count for count in counts))
    return list(matrices) if chooses or ("" in matrices and rows == 1) else []
