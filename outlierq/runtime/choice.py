"""Which way is the fastest for a weight of this shape on this machine: measured once, and kept.

What instruction sets promise is not enough: oneDNN falls back to reference code where it misses AMX, and torch's own
products depend on how it was built. So every way is timed, with random codes of the layer's width, at few and at many
tokens. Choices are kept in the cache folder under the machine that they were measured on; any other machine, torch or
compiled part measures anew, and says so.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from outlierq.core.errors import OutlierqError
from outlierq.core.machine.cache_folder import cache_folder
from outlierq.core.machine.untrusted import json_object
from outlierq.core.notes import note
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.ops.compiled import products
from outlierq.ops.compiled.products import Packed
from outlierq.ops.compiled.rounding import library_path
from outlierq.ops.grid import USUAL_UNIT, nearest_code
from outlierq.ops.outlier_victim import nearest_pairs
from outlierq.runtime import cpu
from outlierq.runtime.timing import NEVER, clock_here, least_seconds
from outlierq.runtime.ways import WAYS, Way, kind_of_codes, ways_for

MOST_ROWS = 1024  # of a measured weight: all ways take time by the row
ROUNDS = 5
FAR_BEHIND = 20.0  # times the fastest: such a way is not tried with more tokens
FILE = "products.json"


@dataclass(frozen=True)
class Choice:
    """way: the name of the fastest. direct: see `cpu`. seconds: by way, (on the codes, decoded) for all cpu.TOKENS."""

    way: str
    direct: int
    seconds: dict[str, list[tuple[float, float]]]


def choose(weight: QuantTensor, dtype: torch.dtype, int8_inputs: bool) -> Choice:
    """The kept choice for weights like this, or one that is measured now."""
    ways = ways_for(weight, dtype, int8_inputs)
    key = _key(weight, dtype, int8_inputs)
    if key not in _kept() or _kept()[key].way not in {way.name for way in ways}:
        _kept()[key] = fastest(measure(ways, weight.scheme, weight.shape, dtype))
        _keep()
    return _kept()[key]


def fastest(seconds: dict[str, list[tuple[float, float]]]) -> Choice:
    """The way that over all numbers of tokens is nearest to the best one."""
    best = {name: [min(pair) for pair in row] for name, row in seconds.items()}
    least = [min(row) for row in zip(*best.values(), strict=True)]
    name = min(best, key=lambda n: sum(own / other for own, other in zip(best[n], least, strict=True)))
    return Choice(name, sum((on_codes <= decoded) << i for i, (on_codes, decoded) in enumerate(seconds[name])), seconds)


def measure(
    ways: list[Way], scheme: QuantScheme, shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of every way, as in `Choice`; infinite where it does not decode, or was hopeless."""
    weight = random_weight(scheme, (min(shape[0], MOST_ROWS), shape[1]))
    held = {way.name: way.hold(weight) for way in ways}
    seconds: dict[str, list[tuple[float, float]]] = {way.name: [] for way in ways}
    hopeless: set[tuple[str, bool]] = set()
    for tokens in cpu.TOKENS:
        x = torch.randn(tokens, shape[1], dtype=torch.float32).to(dtype)
        calls = {
            (way.name, direct): partial(multiply, way, held[way.name], weight, x, direct)
            for way in ways
            for direct in ((True, False) if way.decodes else (True,))
            if (way.name, direct) not in hopeless
        }
        times = least_seconds(calls, ROUNDS, clock_here())
        for name, row in seconds.items():
            row.append((times.get((name, True), NEVER), times.get((name, False), NEVER)))
        hopeless |= {call for call, taken in times.items() if taken > FAR_BEHIND * min(times.values())}
    return seconds


def multiply(
    way: Way, held: Mapping[str, torch.Tensor | None], weight: QuantTensor, x: torch.Tensor, direct: bool
) -> torch.Tensor:
    """One product of a held weight."""
    words, scale, rows = held["words"], held["scale"], weight.shape[0]
    assert words is not None and scale is not None, f"{way.name} holds no weight"
    if way.int8_inputs:
        return cpu.int8_linear(x, words, scale, None, None, None, True, words.is_mkldnn, direct)
    packed = Packed(words, scale, held["zero_point"], kind_of_codes(weight), held.get("super_scale"))
    return cpu.packed_linear(x, packed, rows, direct)


def random_weight(scheme: QuantScheme, shape: tuple[int, int]) -> QuantTensor:
    """Random codes and scales of a scheme."""
    if scheme.kind == "float":
        return _random_floats(scheme, shape)
    codes = torch.randint(int(scheme.code_min), int(scheme.code_max) + 1, shape)
    if scheme.kind == "outlier-victim":
        codes = nearest_pairs(torch.randn(shape).mul_(3))
    scale = torch.rand(scheme.scale_shape(*shape)).add_(0.5).mul_(0.01).to(getattr(torch, scheme.scale_dtype))
    if scheme.symmetric:
        return QuantTensor(codes.to(torch.int8), scale, None, scheme)
    zero = torch.randint(0, 1 << scheme.bits, scale.shape).to(torch.uint8)
    return QuantTensor(codes.to(torch.uint8), scale, zero, scheme)


def _random_floats(scheme: QuantScheme, shape: tuple[int, int]) -> QuantTensor:
    """Random codes and scales, as `random_weight`, of floats."""
    width = scheme.scale_shape(*shape)
    codes = nearest_code(torch.randn(shape).mul_(scheme.code_max / 4), None, scheme).to(torch.float8_e4m3fn)
    if scheme.scales == "power-of-two":
        return QuantTensor(codes, torch.randint(118, 122, width).to(torch.uint8), None, scheme)
    scale = torch.rand(width).add_(0.5)
    if scheme.scales == "two-level":
        unit = torch.tensor([USUAL_UNIT])
        return QuantTensor(codes, scale.to(torch.float8_e4m3fn), None, scheme, super_scale=unit)
    return QuantTensor(codes, scale.mul_(0.01).to(getattr(torch, scheme.scale_dtype)), None, scheme)


def _key(weight: QuantTensor, dtype: torch.dtype, int8_inputs: bool) -> str:
    """What a choice depends on beside the machine."""
    inputs = "int8" if int8_inputs else str(dtype).removeprefix("torch.")
    rows, columns = min(weight.shape[0], MOST_ROWS), weight.shape[1]
    width = weight.scheme.columns_per_group(columns)
    zero = "" if weight.zero_point is None else " with zero points"
    threads = torch.get_num_threads()
    return f"{inputs} times {weight.scheme.numbers} of {width}{zero}, {rows} x {columns}, {threads} threads"


@cache
def machine() -> dict[str, str]:
    """What choices are measured on: the processor and what it can, torch, our compiled part."""
    import xxhash

    path = library_path()
    text = _read("/proc/cpuinfo").split("\n\n")[0]
    fields = dict(line.split("\t", 1) for line in text.splitlines() if "\t" in line)
    named = {key.strip(): value.strip(" \t:") for key, value in fields.items()}
    able = named.get("flags") or named.get("Features") or platform.processor()
    return {
        "processor": named.get("model name") or platform.machine(),
        "able": xxhash.xxh3_64(able.encode()).hexdigest(),
        "torch": f"{torch.__version__} {torch.backends.cpu.get_cpu_capability()}",
        "compiled": "" if path is None else xxhash.xxh3_64(Path(path).read_bytes()).hexdigest(),
        "kernels": f"{products.float_kernel(torch.bfloat16)}, {products.int8_kernel()}",
    }


@cache
def _kept() -> dict[str, Choice]:
    """Choices of this machine by key, as the cache folder has them."""
    text = _read(cache_folder() / FILE)
    try:
        content = json_object(text, FILE) if text else {}
        choices = {key: _choice(value) for key, value in dict(content.get("choices") or {}).items()}
    except (OutlierqError, TypeError, ValueError, KeyError) as error:
        note(f"kept choices of products are not read ({error}); they are measured anew")
        return {}
    if choices and content.get("machine") != machine():
        before = (content.get("machine") or {}).get("processor")
        note(f"products were measured on another machine or torch ({before}) and are measured anew")
        return {}
    return choices


def _choice(value: Any) -> Choice:
    """A choice as it was kept; TypeError, ValueError or KeyError for anything else."""
    way, direct = str(value["way"]), int(value["direct"])
    if way not in {known.name for known in WAYS} or not 0 <= direct <= cpu.ALWAYS:
        raise ValueError(f"{way} with {direct} is no choice")
    return Choice(way, direct, {name: [(a, b) for a, b in row] for name, row in value["seconds"].items()})


def _keep() -> None:
    """Write all choices; a folder that cannot be written to costs a measurement each time, and a note."""
    choices = {key: vars(choice) for key, choice in _kept().items()}
    path = cache_folder() / FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f"{path.name}.{time.monotonic_ns()}")
        fresh.write_text(json.dumps({"machine": machine(), "choices": choices}, indent=1))
        fresh.replace(path)
    except OSError as error:
        note(f"choices of products are not kept: {error}")


def _read(path: Path | str) -> str:
    """A text file, empty where there is none to read."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
