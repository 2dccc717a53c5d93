"""Attention that can do nothing without a sink: gates, and sinks that are learned beside the tokens.

Heads that have nothing to add put their attention on tokens without content, and the values there near 0, which is what
makes outliers grow (Bondarenko et al. 2023, arXiv:2306.12929). Models trained with a gate behind each head, or with a
logit of its own in each softmax, have no need to. Seen in shapes, not in names.
"""

from __future__ import annotations

import torch

GATE, SINK_LOGITS = "gates", "sink logits of its own"


def way_out(attention: torch.nn.Module, heads: int, key_heads: int, size: int, hidden: int) -> str | None:
    """Which of the two an attention has, None for neither.

    heads, key_heads: of queries and of keys, of `size` channels each. hidden: channels of what its linears read. Gates
    are rows [heads] or [heads * size] more than queries, keys and values need; sink logits are a parameter [heads].
    """
    linears = [part for part in attention.modules() if isinstance(part, torch.nn.Linear)]
    rows = sum(part.out_features for part in linears if part.in_features == hidden)
    if any((part.in_features, part.out_features) == (heads * size, hidden) for part in linears):
        rows -= hidden if heads * size == hidden else 0  # the projection back reads as many channels
    if rows - (heads + 2 * key_heads) * size in (heads, heads * size):
        return GATE
    inside = {id(each) for part in linears for each in part.parameters()}
    own = [each for each in attention.parameters() if id(each) not in inside]
    return SINK_LOGITS if any(each.numel() == heads and heads != size for each in own) else None


def sentence(ways: list[str | None]) -> str:
    """What follows for the attentions of a model, in words; empty where none has a way out."""
    known = [way for way in ways if way]
    if not known:
        return ""
    named = " and ".join(dict.fromkeys(known))
    return (
        f"{len(known)} of {len(ways)} attentions have {named}: their heads can add nothing without a sink among the "
        "tokens, so outliers are expected to be smaller (arXiv:2306.12929)"
    )
