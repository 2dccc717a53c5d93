"""`BlockStats`: what calibration keeps of a block beside its linear inputs: residual stream, attention, cache."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from outlierq.core.errors import StatsError

if TYPE_CHECKING:
    import torch

# Columns of the tables of extreme entries: where an entry was seen, its value, and the median |x| of its token.
TOP_COLUMNS = ("sequence", "position", "token", "channel", "value", "median")
# Columns of `attention_mass`: what share of a head's attention goes to which key positions.
MASS_COLUMNS = ("first", "special", "delimiter", "rest")


@dataclass(frozen=True)
class BlockStats:
    """Statistics of one decoder block's output and of its attention; H is the hidden size, D the head size.

    residual_top: [n, 6] float32, the entries with the largest |h| of the block's output (`TOP_COLUMNS`).
    residual_first: [sequences, 6], the largest entry of every sequence, to see what repeats.
    residual_abs_max: [H]. residual_median: [] median over a sample of tokens of median |h|.
    residual_kurtosis: [2], mean over that sample and largest (over it and the token of each sequence with the largest
    |h|) of E[(h - mean)^4] / var^2 over the channels.
    query_abs_max: [heads, D], key_abs_max, value_abs_max: [kv heads, D], all as attention sees them (keys and queries
    after RoPE). output_min, output_max: [outputs], output_sum, output_sum_sq: [outputs] float64: of the linears that
    may feed keys and values (before RoPE), concatenated in the order of `output_names`.
    attention_mass: [heads, 4] mean probability by class of key position (`MASS_COLUMNS`), over a sample of queries;
    sink_value_norm: [kv heads], mean over sequences of the norm of the value at position 0 over the median norm of the
    others. expert_tokens: [experts] int64, tokens routed to each expert. expert_saliency: [experts] float64, the sum
    over those tokens of the norm of what the expert adds to the output, g ||f(x)||, with g the router's weight.
    All tokens count, position 0 too. Medians are the lower one of two middle values. A field that could not be observed
    is None.
    """

    residual_top: torch.Tensor | None = None
    residual_first: torch.Tensor | None = None
    residual_abs_max: torch.Tensor | None = None
    residual_median: torch.Tensor | None = None
    residual_kurtosis: torch.Tensor | None = None
    query_abs_max: torch.Tensor | None = None
    key_abs_max: torch.Tensor | None = None
    value_abs_max: torch.Tensor | None = None
    output_min: torch.Tensor | None = None
    output_max: torch.Tensor | None = None
    output_sum: torch.Tensor | None = None
    output_sum_sq: torch.Tensor | None = None
    attention_mass: torch.Tensor | None = None
    sink_value_norm: torch.Tensor | None = None
    expert_tokens: torch.Tensor | None = None
    expert_saliency: torch.Tensor | None = None
    output_names: tuple[str, ...] = ()

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are present, by field name."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "output_names"}
        return {name: value for name, value in values.items() if value is not None}

    def need(self, name: str) -> torch.Tensor:
        """The field `name`; StatsError when it was not observed."""
        value: torch.Tensor | None = getattr(self, name)
        if value is None:
            raise StatsError(
                f"the statistics do not hold `{name}` of this block",
                hint="calibrate again; models whose attention does not go through transformers' interface have none",
            )
        return value


BLOCK_FIELDS = frozenset(field.name for field in fields(BlockStats)) - {"output_names"}
