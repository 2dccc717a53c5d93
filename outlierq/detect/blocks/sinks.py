"""Attention sinks and heads that do nothing.

A sink head gives more than 0.3 of its attention to the first token (Xiao et al. 2023, arXiv:2309.17453; the limit as in
Gu et al. 2024, arXiv:2410.10781). A no-op head gives more than 0.8 to tokens without content whose values are small, so
that its output is nearly zero (Bondarenko et al. 2023, arXiv:2306.12929, section 3; both limits ours).
"""

from __future__ import annotations

from outlierq.core.measured.block_stats import MASS_COLUMNS, BlockStats

SINK_MASS = 0.3
NO_OP_MASS = 0.8
NO_OP_VALUE = 0.3
FIRST, REST = MASS_COLUMNS.index("first"), MASS_COLUMNS.index("rest")


def sink_heads(stats: BlockStats) -> float:
    """Share, 0..1, of the heads that are attention sinks at position 0, from attention_mass [heads, 4]."""
    return (stats.need("attention_mass")[:, FIRST] > SINK_MASS).float().mean().item()


def no_op_heads(stats: BlockStats) -> float:
    """Share, 0..1, of the heads that look at tokens without content, and find small values there.

    From attention_mass [heads, 4] and sink_value_norm [kv heads].
    """
    mass, norms = stats.need("attention_mass"), stats.need("sink_value_norm")
    away = mass.sum(1) - mass[:, REST]
    per_head = norms.repeat_interleave(len(mass) // len(norms))
    return ((away > NO_OP_MASS) & (per_head < NO_OP_VALUE)).float().mean().item()
