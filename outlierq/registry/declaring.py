"""What a method says of itself: one decorator for each of the eight stages, and the table that they fill.

The stages are "quantize" (rounds weights), "transform" (scales the channels of one input group), "rewrite" (changes the
whole model and not what it computes), "turn" (the same, by what it sees of the model on a text), "permute" (brings
channels into another order), "prune" (drops experts) and "learn" (improves a whole rounded block). A recipe names
quantizers under `quantize`, what learns under `learn`, and those others under `transform`. Methods of the last,
"approximate", give what no format holds; `outlierq study methods` compares them with the rest.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict, TypeVar, Unpack

from outlierq.core.errors import MethodError, nearest
from outlierq.core.measured.block_stats import BLOCK_FIELDS
from outlierq.core.stats import DERIVED, FIELDS
from outlierq.registry.packages import package_of

F = TypeVar("F", bound=Callable[..., Any])
STAGES = ("quantize", "transform", "rewrite", "turn", "permute", "prune", "learn", "approximate")
# What a format must know of a result: columns beside the codes, or a scale that just holds the largest weight.
OUTLIER_COLUMNS, LARGEST_SCALES = "outlier columns", "scales of the largest weight"
# Float32 copies of its rows that a quantizer holds at once, where it does not say; rounding by the hessian: 4.5.
COPIES = 6

ByOption = Mapping[str, Mapping[Any, tuple[str, ...]]]  # {option: {value: names}}


@dataclass(frozen=True)
class Method:
    """A registered function, and what its decorator says of it.

    stage: one of `STAGES`. needs: statistics that it reads. needs_if: those that it reads as well where an option has
    a value. gives, gives_if: alike, what formats must know of a quantizer's result (`OUTLIER_COLUMNS`). copies: float32
    copies of its rows that a quantizer holds at once at most. factors: whether it factors the hessian and refines with
    it (`ops.solve`, `ops.search.refine`), which takes memory of its own. paper: the source. at_once: of a quantizer, or
    None. The same with fewer passes over memory: see `quantizer`.
    """

    name: str
    stage: str
    function: Callable[..., Any]
    needs: frozenset[str]
    paper: str
    at_once: Callable[..., Any] | None = None
    needs_if: ByOption = field(default_factory=dict, hash=False)
    gives: frozenset[str] = frozenset()
    gives_if: ByOption = field(default_factory=dict, hash=False)
    copies: int = COPIES
    factors: bool = False

    def __str__(self) -> str:
        return f"the {self.section} method {self.name!r} of {package_of(self.function)}"

    @property
    def section(self) -> str:
        """The key of a recipe under which it is named; `study` for what no recipe can name."""
        return section_of(self.stage)

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """The keyword-only arguments: what a recipe may set. MethodError when one has no type or no default."""
        try:
            parameters = inspect.signature(self.function, eval_str=True).parameters
        except NameError as error:
            raise MethodError(
                f"the annotations of {self} cannot be read: {error}",
                hint="import what they name outside of `if TYPE_CHECKING`",
            ) from error
        own = {n: p for n, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
        for name, option in own.items():
            if inspect.Parameter.empty in (option.annotation, option.default):
                raise MethodError(f"{self} has an option {name!r} without a type or a default", hint="give it both")
        return own

    def needs_with(self, options: Mapping[str, Any]) -> frozenset[str]:
        """The statistics that it reads with these options; those that are left out have their defaults."""
        return self.needs | self._said_of(self.needs_if, options)

    def gives_with(self, options: Mapping[str, Any]) -> frozenset[str]:
        """What formats must know of its result with these options."""
        return self.gives | self._said_of(self.gives_if, options)

    def _said_of(self, by_option: ByOption, options: Mapping[str, Any]) -> frozenset[str]:
        """The names that a declaration has for the values of the options."""
        values = {name: options.get(name, self.options[name].default) for name in by_option}
        return frozenset(each for name, value in values.items() for each in by_option[name].get(value, ()))

    @property
    def shifts(self) -> bool:
        """Whether a transform wants to know if a shift can be absorbed: its fifth argument, `shiftable`."""
        return "shiftable" in inspect.signature(self.function).parameters

    @property
    def reads(self) -> str:
        """Name of the first argument: what a rewrite wants to know of a model, `anatomy`, `keys` or `openings`."""
        return next(iter(inspect.signature(self.function).parameters))

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]


def section_of(stage: str) -> str:
    """The key of a recipe under which methods of a stage are named; `study` for what no recipe can name."""
    return {"quantize": "quantize", "learn": "learn", "approximate": "study"}.get(stage, "transform")


REGISTERED: dict[tuple[str, str], Method] = {}  # (section of a recipe, name) -> method


def _register(stage: str, name: str, needs: tuple[str, ...], paper: str, **more: Any) -> Callable[[F], F]:
    def keep(function: F) -> F:
        made = Method(name, stage, function, frozenset(needs), paper, **more)
        _check_name(made)
        _check_statistics(made)
        _check_options(made)
        REGISTERED[made.section, name] = made
        return function

    return keep


def _check_name(made: Method) -> None:
    """MethodError when another method of its section has the name."""
    other = REGISTERED.get((made.section, made.name))
    if other is not None:
        raise MethodError(
            f"two {made.section} methods are called {made.name!r}: one of {package_of(other.function)}, "
            f"one of {package_of(made.function)}",
            hint="uninstall one of these packages, or rename its method",
        )


def _check_statistics(made: Method) -> None:
    """MethodError when a method reads what calibration does not make."""
    known = sorted(BLOCK_FIELDS) if made.stage == "prune" else [*FIELDS, *DERIVED]
    asked = [*made.needs, *(name for by in made.needs_if.values() for names in by.values() for name in names)]
    for name in asked:
        if name not in known:
            close = nearest(name, known)
            raise MethodError(
                f"{made} needs the statistic {name!r}, which calibration does not make; known: {', '.join(known)}",
                hint=f"did you mean {close!r}?" if close else "correct `needs` in the method's decorator",
            )


def _check_options(made: Method) -> None:
    """MethodError when something is declared of an option that the function does not have."""
    missing = sorted({*made.needs_if, *made.gives_if} - inspect.signature(made.function).parameters.keys())
    if missing:
        raise MethodError(
            f"{made} declares what its option {missing[0]!r} means, but has no such option",
            hint="correct `needs_if` or `gives_if` in its decorator",
        )


class Declared(TypedDict, total=False):
    """What the decorator of a quantizer may say beside its name, statistics and source; see `Method`."""

    needs_if: ByOption
    gives: Collection[str]
    gives_if: ByOption
    copies: int
    factors: bool
    at_once: Callable[..., Any]


def quantizer(name: str, *, needs: tuple[str, ...] = (), paper: str, **declared: Unpack[Declared]) -> Callable[[F], F]:
    """Register `function(w, stats, scheme, *, options) -> QuantTensor` as `quantize.method: name`; see `Method`.

    at_once: `function(w, scheme, *, options)` for rows in their stored dtype, without statistics: the same
    `QuantTensor`, the sum of the squares of the weights and that of their errors; or None where it cannot.
    MethodError when the name is taken, or a statistic is unknown; that holds for all of these decorators.
    """
    gives = frozenset(declared.pop("gives", ()))
    return _register("quantize", name, needs, paper, gives=gives, **declared)


def transform(name: str, *, needs: tuple[str, ...] = (), paper: str) -> Callable[[F], F]:
    """Register `function(w, stats, scheme, tie, *, options) -> scale [in]` as `transform: [{method: name}]`.

    A function with a fifth argument `shiftable` may return a `Move` with a shift where that is true.
    """
    return _register("transform", name, needs, paper)


def rewriter(name: str, *, needs: tuple[str, ...] = (), paper: str) -> Callable[[F], F]:
    """Register `function(anatomy, *, options) -> Rewrite` of the whole model as `transform: [{method: name}]`.

    Rewrites come before all other transforms; statistics are those of the rewritten model. A first argument called
    `openings` instead asks for the biases that the model class could take, `keys` for where its keys and queries meet.
    """
    return _register("rewrite", name, needs, paper)


def turner(name: str, *, paper: str) -> Callable[[F], F]:
    """Register `function(model, *, options) -> turns` of the whole model as `transform: [{method: name}]`.

    It sees a `Turnable`: rotations and scales that would cancel, and what they do to the model on the recipe's text.
    Turns come before all other transforms; statistics are those of the turned model.
    """
    return _register("turn", name, (), paper)


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


def learner(name: str, *, paper: str) -> Callable[[F], F]:
    """Register `function(block, *, options) -> QuantTensor by linear` as `learn: {method: name}`.

    It sees a whole block whose linears a quantizer has rounded, and how to run it (`RoundedBlock`). Hessians are
    collected for it, whatever the quantizer reads, so that the report can say what each linear lost.
    """
    return _register("learn", name, ("hessian",), paper)


def approximation(name: str, *, needs: tuple[str, ...] = (), paper: str) -> Callable[[F], F]:
    """Register `function(w, stats, scheme, *, options) -> Approximation`, which `outlierq study methods` compares.

    For what no format holds, or not yet: its result is judged as decoded, with the bits that it would take.
    """
    return _register("approximate", name, needs, paper)
