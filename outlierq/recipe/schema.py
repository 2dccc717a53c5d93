"""The checked, frozen `Recipe`: everything a run does, and what follows from its sections."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import Field

from outlierq.core.scheme import QuantScheme, gguf_scheme
from outlierq.recipe.patterns import matches
from outlierq.recipe.sections import (
    SCHEME_KEYS,
    Activations,
    Calibration,
    Export,
    Gate,
    KVCache,
    Learn,
    Override,
    Quantize,
    Section,
    Transform,
)
from outlierq.registry import code_of, code_of_format, method, transform_method

WHOLE_MODEL = ("prune", "rewrite", "turn")  # kinds of transforms


class Recipe(Section):
    """Everything a run does, apart from its source and its output folder."""

    description: str = ""
    calibration: Calibration | None = None
    transform: tuple[Transform, ...] = ()
    quantize: Quantize | None = None
    learn: Learn | None = None
    kv_cache: KVCache | None = None
    export: Export = Export()
    gate: Gate | None = None
    name: str = Field("recipe", exclude=True)

    @property
    def rewrites(self) -> tuple[Transform, ...]:
        """The transforms of the whole model; they come first."""
        return tuple(t for t in self.transform if transform_method(t.method).stage in WHOLE_MODEL)

    @property
    def pruning(self) -> tuple[Transform, ...]:
        """The steps that drop experts."""
        return tuple(step for step in self.transform if transform_method(step.method).stage == "prune")

    @property
    def turning(self) -> tuple[Transform, ...]:
        """The steps that turn the whole model by what they see of it."""
        return tuple(step for step in self.transform if transform_method(step.method).stage == "turn")

    @property
    def all_needs(self) -> frozenset[str]:
        """The same as `needs`, and what pruning reads of the whole model."""
        return self.needs.union(*(transform_method(step.method).needs for step in self.pruning))

    def clip_search_for(self, module: str) -> bool:
        """Whether the scale of the static input of the linear called `module` is searched."""
        activations = None if self.quantize is None else _activations_for(self.quantize, module)
        return activations is not None and activations.clip_search == "output"

    @property
    def group_transforms(self) -> tuple[Transform, ...]:
        """The transforms of one input group after another."""
        return tuple(t for t in self.transform if transform_method(t.method).stage == "transform")

    @property
    def permutations(self) -> tuple[Transform, ...]:
        """What brings channels into another order; done last, where that costs nothing."""
        return tuple(t for t in self.transform if transform_method(t.method).stage == "permute")

    @property
    def reads_statistics(self) -> bool:
        """Whether statistics of an earlier calibration can take the place of running the model."""
        calibration = self.calibration
        if not self.needs or calibration is None or self.rewrites or self.permutations:
            return False
        return calibration.mode == "static" and calibration.inputs == "exact"

    @property
    def stored_cache(self) -> KVCache | None:
        """The section of a cache whose scales are written; None without one."""
        return self.kv_cache if self.kv_cache is not None and self.kv_cache.scheme.is_stored else None

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that the methods of this recipe read; empty for a data-free recipe.

        Without those of the whole model that pruning reads, which are made before the others.
        """
        steps = ((transform_method(step.method), step.options) for step in self.transform)
        needs = frozenset().union(*(each.needs_with(options) for each, options in steps if each.stage != "prune"))
        if self.quantize is not None:
            needs |= method("quantize", self.quantize.method).needs_with(self.quantize.options)
            needs |= _needs_of_inputs(self.quantize, beside=needs)
        if self.learn is not None:
            needs |= method("learn", self.learn.method).needs
        return needs if self.kv_cache is None else needs | self.kv_cache.needs

    @property
    def outside_code(self) -> dict[str, str]:
        """What code the methods and the format are that do not come with outlierq, by "method NAME" or "format NAME".

        Ours is known by our version.
        """
        steps = [("transform", step.method) for step in self.transform]
        steps += [("quantize", self.quantize.method)] if self.quantize else []
        steps += [("learn", self.learn.method)] if self.learn else []
        outside = {f"method {name}": code for section, name in steps if (code := code_of(section, name))}
        code = code_of_format(self.export.format)
        return outside | ({f"format {self.export.format}": code} if code else {})

    @property
    def fingerprint(self) -> str:
        """sha256 hex of everything that decides the result; a gate only judges it.

        Without the number of shards, which may be left to the number of processes: runs keep that beside it.
        """
        aside: dict[str, bool | set[str]] = {"description": True, "gate": True, "calibration": {"shards"}}
        text = json.dumps(self.model_dump(mode="json", exclude=aside), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def scheme_for(
        self, module: str, scale_dtype: str, *, tower: str | None = None, type: str | None = None
    ) -> QuantScheme | None:
        """The scheme asked for the linear called `module`, or None when the recipe keeps it in 16 bits.

        tower: name of the part beside the text decoder that it belongs to. type: what its mix gives it.
        """
        if self.quantize is None or self.quantize.ignores(module) or self.quantize.protects(module, tower):
            return None
        settings = self.quantize.scheme_settings | ({} if type is None else {"type": type})
        for override in self.quantize.overrides:
            if matches(module, override.match):
                if override.keep:
                    return None
                settings = overridden(settings, override)
        return scheme_of(settings, scale_dtype)


def _needs_of_inputs(quantize: Quantize, beside: frozenset[str]) -> frozenset[str]:
    """The statistics that quantized inputs need. beside: what is collected anyway."""
    sections = (quantize.activations, *(override.activations for override in quantize.overrides))
    inputs = [section for section in sections if isinstance(section, Activations)]
    needs: frozenset[str] = frozenset().union(*(section.needs for section in inputs))
    if needs or not (beside and inputs):
        return needs
    return frozenset({"rows"})  # so that the report can say what quantized inputs cost


def _activations_for(quantize: Quantize, module: str) -> Activations | None:
    """The section on inputs that holds for the linear called `module`."""
    activations: Activations | Literal["none"] | None = quantize.activations
    for override in quantize.overrides:
        if matches(module, override.match) and override.activations is not None:
            activations = override.activations
    return activations if isinstance(activations, Activations) else None


def overridden(settings: dict[str, Any], override: Override) -> dict[str, Any]:
    """`settings` with the keys that an override gives. A group size replaces a block, and any key a type."""
    given = {name: value for name in SCHEME_KEYS if (value := getattr(override, name)) is not None}
    replaced = ({"block": None} if "group_size" in given else {}) | ({"type": None} if given else {})
    return settings | replaced | given


def scheme_of(settings: dict[str, Any], scale_dtype: str = "bfloat16") -> QuantScheme:
    """The scheme of the keys `SCHEME_KEYS`; a type decides all others."""
    if settings["type"] is not None:
        return gguf_scheme(settings["type"])
    activations = settings["activations"]
    return QuantScheme(
        bits=settings["bits"],
        group_size=None if settings["group_size"] == "channel" or settings["block"] else settings["group_size"],
        symmetric=settings["symmetric"],
        scale_dtype=scale_dtype,
        kind=settings["kind"],
        block=settings["block"],
        activations=activations.scheme if isinstance(activations, Activations) else None,
        scales=settings["scales"],
    )
