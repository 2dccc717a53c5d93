"""Experts as modules of their own: what stands in the place of a fused module of experts, and computes the same."""

from __future__ import annotations

import copy

import torch

from outlierq.load.model.experts.layout import Layout, Leaves


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
