"""The layers that are stored in one way each, with the exact bytes of every way, from headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from outlierq.core.model import LinearSite
from outlierq.core.scheme import QuantScheme
from outlierq.export.clients import merged_layers
from outlierq.export.layout import DTYPE_BYTES
from outlierq.pipeline.fitting.storage import Client, asking
from outlierq.pipeline.planning.decide import plan_site
from outlierq.pipeline.planning.plan import Plan
from outlierq.recipe import Recipe

Storage = QuantScheme | None  # None: 16 bits


@dataclass(frozen=True)
class Layer:
    """Linears that a client needs in one scheme, or one table as wide as the vocabulary.

    choices: bytes of all of them for every way to store them.
    """

    sites: tuple[LinearSite, ...]
    choices: Mapping[Storage, int]

    @property
    def name(self) -> str:
        """The first linear, and how many more there are."""
        first = self.sites[0].module
        return first if len(self.sites) == 1 else f"{first} and {len(self.sites) - 1} more"

    @property
    def is_table(self) -> bool:
        """Whether it is the table of embeddings or the output head."""
        return self.sites[0].block is None

    @property
    def weights(self) -> int:
        """Number of weights in all linears."""
        return sum(site.out_features * site.in_features for site in self.sites)


def layers_of(
    plan: Plan, client: Client, schemes: Sequence[QuantScheme], tables: Sequence[LinearSite] = ()
) -> list[Layer]:
    """The layers among the linears that the plan quantizes inside of blocks, in the order of the model, then tables.

    schemes: to choose from. A layer that can have none of them is left as the plan has it, and is not listed.
    """
    recipes = {scheme: asking(plan.recipe, scheme) for scheme in schemes}
    layers = []
    for sites in [*together(plan, client), *((site,) for site in tables)]:
        held: dict[Storage, int] = {}
        for scheme, recipe in recipes.items():
            size = _bytes(plan, recipe, sites, scheme)
            if size is not None:
                held[scheme] = size
        if held:
            held[None] = sum(site_bytes(plan, site, None) for site in sites)
            layers.append(Layer(sites, held))
    return layers


def together(plan: Plan, client: Client) -> list[tuple[LinearSite, ...]]:
    """The linears that need one scheme: what the client merges, and the experts of a block or of the whole model."""
    inside = {site: scheme for site, scheme in plan.schemes.items() if site.block is not None}
    inside = {site: scheme for site, scheme in inside.items() if site not in plan.taken_over}
    alone = {site: scheme for site, scheme in inside.items() if site.expert is None}
    layers = list(merged_layers(client.word, alone)) if client.merges else [(site,) for site in alone]
    experts: dict[int | None, list[LinearSite]] = {}
    for site in inside:
        if site.expert is not None:
            experts.setdefault(None if client.one_expert_scheme else site.block, []).append(site)
    layers += [tuple(sites) for sites in experts.values()]
    order = {site: number for number, site in enumerate(inside)}
    return sorted(layers, key=lambda sites: order[sites[0]])


def _bytes(plan: Plan, recipe: Recipe, sites: Sequence[LinearSite], scheme: QuantScheme) -> int | None:
    """Bytes of the linears in a scheme; None when the format does not hold one of them in exactly that."""
    planned = [plan_site(site, recipe, plan.format, plan.model) for site in sites]
    if any(each.scheme != scheme for each in planned):
        return None
    return sum(site_bytes(plan, site, scheme) for site in sites)


def site_bytes(plan: Plan, site: LinearSite, scheme: Storage) -> int:
    """Bytes of the tensors that hold the weight of a linear in the plan's format."""
    if scheme is None:
        specs = [plan.format.plain_spec(plan.checkpoint.tensors[site.weight])]
    else:
        specs = plan.format.tensor_specs(site, scheme)
    return sum(prod(shape) * DTYPE_BYTES[dtype] for _, dtype, shape in specs)
