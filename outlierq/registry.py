"""Name -> method. A method's keyword-only arguments are its recipe schema; adding one touches nothing else."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

from outlierq.core.errors import RecipeError, nearest

F = TypeVar("F", bound=Callable[..., Any])

# Modules that hold methods. Imported when a method is first asked for, so that --help stays fast.
METHOD_MODULES = {
    "quantize": ("outlierq.quantize.rtn", "outlierq.quantize.gptq", "outlierq.quantize.int8_split"),
    "transform": (
        "outlierq.transform.awq",
        "outlierq.transform.smoothquant",
        "outlierq.transform.os_plus",
        "outlierq.transform.cheapest_remedy",
    ),
    "rewrite": ("outlierq.transform.rotate", "outlierq.transform.add_biases"),
    "permute": ("outlierq.transform.gather_outliers",),
    "prune": ("outlierq.transform.reap",),
}


@dataclass(frozen=True)
class Method:
    """A registered function. stage: "quantize", "transform" or "rewrite"; needs: statistics it reads; paper: source.

    at_once: of a quantizer, or None. The same with fewer passes over memory: see `quantizer`.
    """

    name: str
    stage: str
    function: Callable[..., Any]
    needs: frozenset[str]
    paper: str
    at_once: Callable[..., Any] | None = None

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """The keyword-only arguments: what a recipe may set."""
        parameters = inspect.signature(self.function, eval_str=True).parameters
        return {n: p for n, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}

    @property
    def shifts(self) -> bool:
        """Whether a transform wants to know if a shift can be absorbed: its fifth argument, `shiftable`."""
        return "shiftable" in inspect.signature(self.function).parameters

    @property
    def reads(self) -> str:
        """Name of the first argument: what a rewrite wants to know of a model, `anatomy` or `openings`."""
        return next(iter(inspect.signature(self.function).parameters))

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]


_methods: dict[tuple[str, str], Method] = {}


def _register(
    stage: str, name: str, needs: tuple[str, ...], paper: str, at_once: Callable[..., Any] | None = None
) -> Callable[[F], F]:
    def keep(function: F) -> F:
        if (stage, name) in _methods:
            raise ValueError(f"two {stage} methods are called {name!r}")
        _methods[stage, name] = Method(name, stage, function, frozenset(needs), paper, at_once)
        return function

    return keep


def quantizer(
    name: str, *, needs: tuple[str, ...] = (), paper: str, at_once: Callable[..., Any] | None = None
) -> Callable[[F], F]:
    """Register `function(w, stats, scheme, *, options) -> QuantTensor` as `quantize.method: name`.

    at_once: `function(w, scheme, *, options)` for rows in their stored dtype, without statistics: the same
    `QuantTensor`, the sum of the squares of the weights and that of their errors; or None where it cannot.
    """
    return _register("quantize", name, needs, paper, at_once)


def transform(name: str, *, needs: tuple[str, ...] = (), paper: str) -> Callable[[F], F]:
    """Register `function(w, stats, scheme, tie, *, options) -> scale [in]` as `transform: [{method: name}]`.

    A function with a fifth argument `shiftable` may return a `Move` with a shift where that is true.
    """
    return _register("transform", name, needs, paper)


def rewriter(name: str, *, needs: tuple[str, ...] = (), paper: str) -> Callable[[F], F]:
    """Register `function(anatomy, *, options) -> Rewrite` of the whole model as `transform: [{method: name}]`.

    Rewrites come before all other transforms; statistics are those of the rewritten model. A first argument called
    `openings` instead asks for the biases that the model class could take.
    """
    return _register("rewrite", name, needs, paper)


def permuter(name: str, *, needs: tuple[str, ...] = (), paper: str) -> Callable[[F], F]:
    """Register `function(stats, *, options) -> columns [k]` as `transform: [{method: name}]`.

    The channels that shall come last in the input of a group; they are moved there where that costs nothing.
    """
    return _register("permute", name, needs, paper)


def pruner(name: str, *, needs: tuple[str, ...] = (), paper: str) -> Callable[[F], F]:
    """Register `function(stats, groups, *, options) -> experts to keep` as `transform: [{method: name}]`.

    It sees the `BlockStats` of one block, of an earlier `outlierq calibrate`; what it drops is gone before all else.
    """
    return _register("prune", name, needs, paper)


def methods(stage: str) -> dict[str, Method]:
    """Every method of a stage, by name, in alphabetical order."""
    for module in METHOD_MODULES[stage]:
        import_module(module)
    return {name: m for (s, name), m in sorted(_methods.items()) if s == stage}


def method(stage: str, name: str) -> Method:
    """The method called `name`; RecipeError with the nearest name when there is none."""
    return _pick(stage, name, methods(stage))


def transform_method(name: str) -> Method:
    """What `transform:` may name: a transform of an input group, or a rewrite of the whole model; RecipeError."""
    known = methods("prune") | methods("rewrite") | methods("permute") | methods("transform")
    return _pick("transform", name, known)


def _pick(stage: str, name: str, known: dict[str, Method]) -> Method:
    """The method called `name` among those known."""
    if name not in known:
        close = nearest(name, list(known))
        raise RecipeError(
            f"there is no {stage} method {name!r}; known: {', '.join(known)}",
            hint=f"did you mean {close!r}?" if close else None,
        )
    return known[name]
