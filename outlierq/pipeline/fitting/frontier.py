"""`outlierq frontier`: for every size the least predicted loss, and what every layer is then, as one value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from outlierq.load import check_recorded, reading_ahead
from outlierq.ops.search.knapsack import frontier as steps_of
from outlierq.ops.search.knapsack import smallest, total
from outlierq.pipeline.asked.request import Source
from outlierq.pipeline.asked.resources import USUAL, Resources
from outlierq.pipeline.fitting.choosing import Options
from outlierq.pipeline.fitting.goal import cache_shape, cache_size, loaded_bytes
from outlierq.pipeline.fitting.layers import Layer, Storage
from outlierq.pipeline.fitting.losses import Prediction
from outlierq.pipeline.fitting.space import ANY, Space, predicted, space_of
from outlierq.pipeline.fitting.storage import keys_of, rounding
from outlierq.pipeline.fitting.written import recipe_text
from outlierq.recipe import Recipe

ROUNDED = 1e-12  # of the largest loss: what sums are off by, where nothing is lost


@dataclass(frozen=True)
class Point:
    """One solution of the frontier: what the layer with this number becomes, beside what the points before it say.

    choice: number of the storage. layers_bytes: of all layers. loss: predicted, of all.
    """

    layer: int
    choice: int
    layers_bytes: int
    loss: float


@dataclass(frozen=True)
class Frontier:
    """All that there is to choose from, and the solutions that no other beats.

    start: the smallest storage of every layer, by number. points: from there, each better and larger than the one
    before. other_bytes: of the result beside the layers: all other tensors, headers and files; headers and the config
    differ by some bytes a layer. loaded_bytes: of the other tensors. cache_bytes: of a token, in 16 bits.
    recipe_text: the recipe without overrides.
    """

    model: str
    client: str
    recipe: str
    method: str
    in_nats: bool
    layers: Sequence[Layer]
    options: Options
    start: Sequence[int]
    points: Sequence[Point]
    other_bytes: int
    loaded_bytes: int
    cache_bytes: float
    recipe_text: str

    @cached_property
    def weights(self) -> int:
        """Number of weights in all layers."""
        return sum(layer.weights for layer in self.layers)

    def bits(self, point: Point) -> float:
        """Mean bits of a weight of the layers."""
        return 8 * point.layers_bytes / self.weights

    def chosen(self, at: int) -> list[int]:
        """The storage of every layer at a point, by number."""
        chosen = list(self.start)
        for point in self.points[1 : at + 1]:
            chosen[point.layer] = point.choice
        return chosen

    def schemes(self, at: int) -> list[tuple[str, float]]:
        """What the layers are at a point, each with its share of the weights, the commonest first."""
        weights: Counter[str] = Counter()
        for layer, storage in zip(self.layers, self.options.stored(self.chosen(at)), strict=True):
            weights[_named(storage)] += layer.weights
        return [(name, count / self.weights) for name, count in weights.most_common()]

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        return {
            "model": self.model,
            "client": self.client,
            "recipe": self.recipe,
            "method": self.method,
            "loss": "KL per token, nats" if self.in_nats else "no unit",
            "weights": self.weights,
            "other_bytes": self.other_bytes,
            "loaded_bytes": self.loaded_bytes,
            "cache_bytes_per_token": self.cache_bytes,
            "layers": [self._layer(number, layer) for number, layer in enumerate(self.layers)],
            "points": [
                {"layer": p.layer, "choice": p.choice, "bytes": p.layers_bytes, "bits": self.bits(p), "loss": p.loss}
                for p in self.points
            ],
        }

    def _layer(self, number: int, layer: Layer) -> dict[str, Any]:
        """A layer with all its choices."""
        units = zip(self.options.storages[number], self.options.units[number], strict=True)
        return {
            "modules": [site.module for site in layer.sites],
            "block": layer.sites[0].block,
            "weights": layer.weights,
            "start": self.start[number],
            "choices": [
                {"scheme": _named(storage), "keys": _keys(storage), "bytes": unit.nbytes, "loss": unit.loss}
                for storage, unit in units
            ],
        }


def _named(storage: Storage) -> str:
    """A storage in words."""
    return "16 bits" if storage is None else str(storage)


def _keys(storage: Storage) -> Mapping[str, Any]:
    """What an override says to ask for it."""
    return {"keep": True} if storage is None else keys_of(storage)


def frontier(
    source: Source,
    recipe: Recipe,
    stats: Path,
    *,
    client: str = "transformers",
    numbers: Sequence[str] = (),
    resources: Resources = USUAL,
) -> Frontier:
    """The frontier of a model for a client, from statistics and weights; no text runs through the model."""
    checkpoint = source.open()
    check_recorded(checkpoint)
    with reading_ahead(checkpoint):
        space = space_of(checkpoint, recipe, client, numbers, stats)
    return _drawn(space, predicted(space, stats, resources))


def _drawn(space: Space, prediction: Prediction) -> Frontier:
    """The frontier of what is predicted."""
    options = Options.of(space.layers, prediction.losses)
    start = smallest(options.units)
    at = total(options.units, start)
    points = [Point(0, start[0], at.nbytes, at.loss)]
    for step in steps_of(options.units):
        last = points[-1]
        loss = last.loss + step.loss
        loss = loss if loss > ROUNDED * points[0].loss else 0.0
        points.append(Point(step.unit, step.choice, last.layers_bytes + step.nbytes, loss))
    plan = space.planned(options.stored(start))
    return Frontier(
        model=space.checkpoint.source,
        client=space.client.word,
        recipe=space.base.name,
        method=rounding(space.base).method,
        in_nats=prediction.in_nats,
        layers=space.layers,
        options=options,
        start=start,
        points=points,
        other_bytes=plan.output_bytes - at.nbytes,
        loaded_bytes=loaded_bytes(plan) - at.nbytes,
        cache_bytes=_cache_of_a_token(space),
        recipe_text=recipe_text(space.base, space.layers, [ANY] * len(space.layers), "chosen on the frontier"),
    )


def _cache_of_a_token(space: Space) -> float:
    """Bytes that one more token of context takes; 0 where the config does not tell."""
    shape = cache_shape(space.plan)
    return 0.0 if shape is None else cache_size(shape, 1)
