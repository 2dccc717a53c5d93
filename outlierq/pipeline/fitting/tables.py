"""The table of embeddings and the output head as part of the choice: both as wide as the vocabulary, outside of blocks.

A GGUF file holds them in types of their own, in one where they are one tensor; other formats hold the head alone, where
it has a tensor of its own. Sensitivities tell what they lose: of the head what each logit and each channel counts, of
the table each token and each channel. Both are rounded to nearest, so errors of different weights do not add up.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from outlierq.core.errors import StatsError
from outlierq.core.measured.sensitivity import Sensitivity
from outlierq.core.model import EMBEDDING, LinearSite
from outlierq.core.scheme import QuantScheme
from outlierq.pipeline.fitting.layers import Layer, Storage
from outlierq.pipeline.fitting.storage import rounding
from outlierq.pipeline.planning.plan import Plan
from outlierq.pipeline.quantize import UNKNOWN_INPUT
from outlierq.recipe import Quantize, Recipe

if TYPE_CHECKING:
    import torch

ROWS = 512  # of a table that are rounded: half of them those that matter most, the others evenly among the rest
ANY_TYPE = "Q8_0"  # any number of columns that others hold, it holds
WEIGHT = ".weight"


def opened(recipe: Recipe, *, holds_types: bool, tables: Collection[str]) -> Recipe:
    """The recipe that leaves neither table nor head as it is, but for what its author says of them.

    tables: modules whose sensitivity is known.
    """
    section = rounding(recipe)
    if not tables:
        return recipe
    usual = Quantize.model_fields["ignore"].default
    update: dict[str, object] = {"ignore": tuple(name for name in section.ignore if name not in usual)}
    if holds_types and section.embeddings is None:
        update["embeddings"] = ANY_TYPE
    return recipe.model_copy(update={"quantize": section.model_copy(update=update)})


def tables_of(plan: Plan, recipe: Recipe, tables: Collection[str]) -> list[LinearSite]:
    """Those of an opened plan for which there is to choose. recipe: before it was opened."""
    left = rounding(recipe).embeddings is None
    sites = [site for site in plan.schemes if site.block is None and site.tower is None and site.module in tables]
    return [site for site in sites if left or site.kind != EMBEDDING]


@dataclass(frozen=True)
class _Share:
    """What the square of a change of a weight counts, as far as it depends on its row [out] and on its column [in]."""

    rows: torch.Tensor
    columns: torch.Tensor


def table_losses(plan: Plan, layer: Layer, sensitivity: Sensitivity) -> dict[Storage, float]:
    """Of the table or head in every type that it may have, in nats per token."""
    import torch

    from outlierq.detect.sample import spread
    from outlierq.registry import method

    [site] = layer.sites
    shares = list(_shares(plan, site, sensitivity))
    matters = torch.stack([share.rows * share.columns.sum() for share in shares]).sum(0)  # [out]
    order = matters.argsort(descending=True, stable=True)
    most, rest = order[: ROWS // 2], order[ROWS // 2 :]
    drawn = spread(rest[matters[rest] > 0].sort().values, ROWS // 2)
    counts = matters.new_ones(len(most) + len(drawn))
    counts[len(most) :] = matters[rest].sum() / matters[drawn].sum() if len(drawn) else 1.0
    at = torch.cat([most, drawn])
    rows = plan.checkpoint.read_some_rows(site.weight, at.tolist()).float()
    used, options = method("quantize", "rtn"), UNKNOWN_INPUT if plan.recipe.needs else {}

    def loss(scheme: QuantScheme) -> float:
        squares = used.function(rows.clone(), None, scheme, **options).dequantize().sub_(rows).square_().double()
        parts = torch.stack([(counts * share.rows[at]) @ (squares @ share.columns) for share in shares])
        return 0.5 * parts.sum().item() / sensitivity.tokens

    return {None: 0.0} | {scheme: loss(scheme) for scheme in layer.choices if scheme is not None}


def _shares(plan: Plan, site: LinearSite, sensitivity: Sensitivity) -> Iterator[_Share]:
    """Of what reads the tensor: rows of it are looked up, or multiplied as a head does, or both."""
    tied = {slot.removesuffix(WEIGHT) for slot, tensor in plan.structure.tied if tensor == site.weight}
    for module in sorted({site.module, *tied} & sensitivity.linears.keys()):
        found = sensitivity.linears[module]
        looked_up = site.kind == EMBEDDING and module == site.module
        rows, columns = (found.inputs, found.outputs) if looked_up else (found.outputs, found.inputs)
        if (len(rows), len(columns)) != (site.out_features, site.in_features):
            other = f"the sensitivity of {module} has other widths than {site.weight}"
            raise StatsError(other, hint="calibrate again")
        yield _Share(rows / found.outputs.mean(), columns)
