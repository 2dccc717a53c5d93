"""Mixtures of experts: the model class keeps all experts of a block in a few tensors, here each is a module of its own.

The skeleton is given the experts as they are presented, one linear layer per tensor (`experts_apart.py` presents fused
tensors so), so that everything that knows linear layers (discovery, statistics, folds, quantization, export under the
names on disk) knows experts, too. What a fused module computes is not guessed: it must declare itself
(`expert_layout.py`). `calibrate/experts.py` says which tokens they see.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch

from outlierq.load.model.expert_layout import Layout, Leaves, fused_modules, leaves_of
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
            inner = shell._apply_gate(joined)
        output = self.get_submodule(self.leaves.down)(inner)
        if self.layout.has_post_expert_norm:
            output = shell.post_expert_norm(output)
        return output * gain[:, None]


class SeparateExperts(torch.nn.Module):
    """A fused module's experts, each a module of its own called by its number; the same output.

    routing: "chosen": an expert sees the tokens that the router sends to it. "all": it sees all of them, and those that
    were not sent to it count nothing, so the output stays the same. "probe": all of them count once more, so that every
    expert shows in the output, and the router still does; for proofs, never for text.
    """

    def __init__(self, fused: torch.nn.Module, layout: Layout, leaves: Leaves):
        super().__init__()
        dtype = fused._parameters[layout.up].dtype
        fused.widths = layout.widths(fused)
        self.num_experts = fused.widths[0]
        for name in layout.slots:
            del fused._parameters[name]
        if layout.has_post_expert_norm:  # one for all experts; it is called by the shell, and gets its weights here
            self.post_expert_norm = fused.post_expert_norm
        for number in range(self.num_experts):
            self.add_module(str(number), Expert(layout, leaves, fused, dtype))
        self.routing = "chosen"

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states: [tokens, hidden]. top_k_index, top_k_weights: [tokens, k]."""
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


def separate_experts(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Replace fused experts of the model by separate ones wherever the checkpoint has them so. Changes the model."""
    if checkpoint.kind == "gguf":
        return  # these files keep experts together
    layouts = fused_modules(model)
    if not layouts:
        return
    held = stored_names([name for name, info in checkpoint.tensors.items() if len(info.shape) == 3], model)
    for name, layout in layouts.items():
        short = name.rpartition(".")[2]
        leaves = leaves_of(model, short, layout)
        if f"{name}.{layout.up}" not in held and _is_apart(checkpoint, short, leaves):
            model.set_submodule(name, SeparateExperts(model.get_submodule(name), layout, leaves))


def _is_apart(checkpoint: Checkpoint, name: str, leaves: Leaves) -> bool:
    """Whether the checkpoint has a tensor of the first expert alone."""
    return any(tensor.endswith(f"{name}.0.{leaves.up}.weight") for tensor in checkpoint.tensors)


def fused_experts(model: torch.nn.Module, names: Mapping[str, str]) -> dict[str, list[str]]:
    """Module -> stored tensors of it that hold the matrices of all experts at once. names: parameter -> stored tensor.

    Every parameter of three dimensions is one but the kernels of convolutions, whatever its class is called.
    """
    held: dict[str, list[str]] = {}
    for name, part in model.named_modules():
        for slot, parameter in part._parameters.items():
            tensor = names.get(f"{name}.{slot}")
            if tensor and parameter.dim() == 3 and not isinstance(part, torch.nn.modules.conv._ConvNd):
                held.setdefault(name, []).append(tensor)
    return held


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
