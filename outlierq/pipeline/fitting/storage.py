"""How a linear may be stored for a client: every scheme that the format holds, the method rounds to and it loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from outlierq.core.errors import ArgumentError, nearest
from outlierq.core.gguf.types import block_types
from outlierq.core.scheme import QuantScheme, gguf_scheme
from outlierq.export import format_type
from outlierq.export.clients import loads
from outlierq.recipe import Recipe
from outlierq.recipe.faults import impossible
from outlierq.recipe.sections import SCHEME_KEYS, Quantize
from outlierq.registry import FormatLimits

# Of integers by bits; smaller groups of 8 bits take half a bit more, and gain nothing that any size is short of.
GROUPS: dict[int, tuple[int | None, ...]] = dict.fromkeys((2, 3, 4, 5, 6), (32, 64, 128)) | {8: (128, None)}
# What a client loads together with other schemes is asked beside this one, which all of them hold.
BESIDE = QuantScheme(bits=8, group_size=128)


@dataclass(frozen=True)
class Client:
    """A program that the result is made for. word: with which its lines in data/clients.json begin.

    merges: it makes one layer of several linears. one_expert_scheme: of all blocks, else of each block.
    """

    word: str
    format: str
    merges: bool = False
    one_expert_scheme: bool = False


CLIENTS = {
    "transformers": Client("transformers", "compressed-tensors", one_expert_scheme=True),
    "vllm": Client("vLLM", "compressed-tensors", merges=True),
    "llama.cpp": Client("llama.cpp", "gguf"),
}


def known_client(name: str) -> Client:
    """The client of this name; ArgumentError."""
    if name not in CLIENTS:
        close = nearest(name, list(CLIENTS))
        advice = f"did you mean {close}?" if close else f"choose {', '.join(CLIENTS)}"
        raise ArgumentError(f"{name!r} is not a client that is known; {advice}", argument="client")
    return CLIENTS[name]


def catalogue(format: type[FormatLimits]) -> list[QuantScheme]:
    """Every scheme of weights with inputs in 16 bits that a format may hold, small to large."""
    if format.holds_types:
        return [
            gguf_scheme(name) for name, _ in sorted(block_types().items(), key=lambda each: each[1].bits_per_weight)
        ]
    integers = [
        QuantScheme(bits, group, symmetric)
        for bits, groups in GROUPS.items()
        for group, symmetric in product(groups, (True, False))
    ]
    floats = [
        QuantScheme(4, 16, kind="float", scales="two-level"),
        QuantScheme(4, 32, kind="float", scales="power-of-two"),
        QuantScheme(8, None, kind="float"),
    ]
    return [*integers, *floats]


def keys_of(scheme: QuantScheme) -> dict[str, Any]:
    """The keys of a `quantize` section, or of an override, that ask for a scheme with inputs in 16 bits."""
    if scheme.type is not None:
        return {"type": scheme.type}
    group = "channel" if scheme.group_size is None else scheme.group_size
    return {
        "kind": scheme.kind,
        "bits": scheme.bits,
        "group_size": group,
        "symmetric": scheme.symmetric,
        "scales": scheme.scales,
    }


def asking(recipe: Recipe, scheme: QuantScheme) -> Recipe:
    """The recipe with this scheme for all linears that it quantizes, and for a table of embeddings that has a type."""
    section = rounding(recipe)
    others = {name: getattr(section, name) for name in section.model_fields_set - {*SCHEME_KEYS, "mix"}}
    if section.embeddings is not None and scheme.type is not None:
        others["embeddings"] = scheme.type
    return recipe.model_copy(update={"quantize": Quantize(**others, **keys_of(scheme))})


def rounding(recipe: Recipe) -> Quantize:
    """The `quantize` section of a recipe that is known to have one."""
    assert recipe.quantize is not None, "the recipe quantizes nothing"
    return recipe.quantize


def storages(recipe: Recipe, client: Client, dtype: str, numbers: Sequence[str] = ()) -> list[QuantScheme]:
    """The schemes that this recipe's method, its format and the client can do together with others.

    dtype: of scales where the format has none of its own. numbers: those to choose from, such as int4 and Q6_K; all
    when it is empty, but those whose codes stand for several weights, which take long. ArgumentError for none.
    """
    format = format_type(recipe.export.format)
    known = [_with_scales(scheme, format.scale_dtype or dtype) for scheme in catalogue(format)]
    usable = [s for s in known if loads(format.name, client.word, {s, BESIDE}) and not impossible(asking(recipe, s))]
    _check_numbers(numbers, known, usable, client)
    return [s for s in usable if (s.numbers in numbers if numbers else s.vector == 1)]


def _with_scales(scheme: QuantScheme, dtype: str) -> QuantScheme:
    """The scheme with scales of a dtype; a type decides them itself."""
    return scheme if scheme.type is not None else replace(scheme, scale_dtype=dtype)


def _check_numbers(
    numbers: Sequence[str], known: Sequence[QuantScheme], usable: Sequence[QuantScheme], client: Client
) -> None:
    """ArgumentError for numbers that nothing has, or that the client cannot mix."""
    held, names = sorted({scheme.numbers for scheme in usable}), sorted({scheme.numbers for scheme in known})
    for name in numbers:
        if name not in names:
            close = nearest(name, names)
            advice = f"did you mean {close}?" if close else f"it has {', '.join(names)}"
            raise ArgumentError(f"{name!r} is no kind of numbers in {client.format}; {advice}", argument="numbers")
    if not [scheme for scheme in usable if not numbers or scheme.numbers in numbers]:
        asked = " or ".join(numbers) or "any scheme"
        raise ArgumentError(
            f"{client.word} loads no mixture with {asked} in {client.format}; it loads {', '.join(held) or 'none'}",
            argument="numbers" if numbers else "client",
        )
