"""`outlierq bench`: how fast this machine multiplies packed weights, beside the 16-bit product and the roofline.

Every figure is the smallest of several rounds, and in a round all candidates take turns, so that a busy machine or a
changing clock hits all of them. Weights rotate through copies, because a model's next layer is never in the cache.
Candidates are all ways in which the CPU could hold and multiply the weight; the one that a model gets was measured when
its first layer of that shape was made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any, TypeVar

from outlierq.core.errors import ArgumentError
from outlierq.core.notes import collecting
from outlierq.core.scheme import ActivationScheme, QuantScheme
from outlierq.pipeline.asked.events import Event, Listener, silent

if TYPE_CHECKING:
    import torch

    from outlierq.runtime import QuantLinear
    from outlierq.runtime.choice import Choice
    from outlierq.runtime.ways import Way

KINDS = {
    "w4": QuantScheme(4, 128),
    "w4-g64": QuantScheme(4, 64),
    "w4-g32": QuantScheme(4, 32),
    "w4-asymmetric": QuantScheme(4, 128, symmetric=False),
    "w8": QuantScheme(8, None),
    "w8a8": QuantScheme(8, None, activations=ActivationScheme()),
    "nvfp4": QuantScheme(4, 16, kind="float", scales="two-level"),
    "mxfp4": QuantScheme(4, 32, kind="float", scales="power-of-two"),
    "mxfp6": QuantScheme(6, 32, kind="float", scales="power-of-two"),
    "mxfp8": QuantScheme(8, 32, kind="float", scales="power-of-two"),
    "fp8": QuantScheme(8, None, kind="float"),
    "fp8-block": QuantScheme(8, None, kind="float", block=(128, 128)),
    "olive": QuantScheme(4, None, kind="outlier-victim"),
}
USUAL = ("w4", "w8", "w8a8")
Clock = Callable[[], float]
Layer = TypeVar("Layer", bound="torch.nn.Module")
TOKENS = (1, 4, 16, 64, 256)
SHAPES = ((4096, 4096),)
ROTATION_BYTES = 64 << 20  # the copies of a weight together hold at least so much
MOST_COPIES = 64  # of small weights
DECODED = ", decoded"  # what the name of a candidate ends with that decodes blocks
FAR_BEHIND = 20.0  # times the fastest: not tried with more tokens
PROBE_BYTES = 64 << 20
PROBE_SIZE = 1024  # rows and columns of the matrices that measure the peak


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do at most, measured now: bytes per second, and operations per second in two formats."""

    bytes_per_second: float
    flops_16bit: float
    ops_int8: float

    def seconds(self, nbytes: int, operations: int, int8: bool) -> float:
        """The roofline: no product that moves so many bytes and does so many operations takes less."""
        return max(nbytes / self.bytes_per_second, operations / (self.ops_int8 if int8 else self.flops_16bit))


@dataclass(frozen=True)
class Timing:
    """One product. shape: (out, in). nbytes: packed weight, input and output. Seconds are minima over the rounds.

    dense_seconds: the same product with a bfloat16 weight. decode_seconds: with the codes (a byte each) decoded to
    bfloat16 by torch and then multiplied. roofline_seconds: the least that `Ceilings` allows. candidates: seconds of
    each way; those that were far behind with fewer tokens are not tried. taken: which of them a model uses.
    """

    kind: str
    shape: tuple[int, int]
    tokens: int
    nbytes: int
    seconds: float
    dense_seconds: float
    decode_seconds: float
    roofline_seconds: float
    taken: str = ""
    candidates: dict[str, float] = field(default_factory=dict)

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.tokens * self.shape[0] * self.shape[1]

    def to_dict(self) -> dict[str, Any]:
        """Fields and ratios."""
        ratios = {
            "over_16bit": self.dense_seconds / self.seconds,
            "over_decoding": self.decode_seconds / self.seconds,
            "of_roofline": self.roofline_seconds / self.seconds,
        }
        return asdict(self) | {name: round(value, 3) for name, value in ratios.items()}


@dataclass(frozen=True)
class Benchmark:
    """What this machine does. machine: its name and settings. kernels: what runs behind the compiled ways.
    unfit: by kind, why ways do not hold its weights. notes: what fell back, or was measured anew.
    """

    machine: str
    ceilings: Ceilings
    timings: tuple[Timing, ...]
    kernels: dict[str, str] = field(default_factory=dict)
    unfit: dict[str, dict[str, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        rows = [timing.to_dict() for timing in self.timings]
        return {**asdict(self), "timings": rows}


def bench(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    tokens: Sequence[int] = TOKENS,
    kinds: Sequence[str] = USUAL,
    *,
    rounds: int = 7,
    device: str = "cpu",
    listen: Listener = silent,
) -> Benchmark:
    """Measure, after a look at what is asked; ArgumentError for a kind or a shape that has no product."""
    for name in kinds:
        if name not in KINDS:
            raise ArgumentError(f"{name!r}; choose {', '.join(KINDS)}", argument="kind")
    if any(number % 32 for shape in shapes for number in shape):
        raise ArgumentError("both numbers must be multiples of 32", argument="shape")
    for name in kinds:
        width = KINDS[name].columns_per_group(1)
        if any(columns % width for _, columns in shapes):
            raise ArgumentError(
                f"{name} has groups of {width} inputs; OUTxIN needs a multiple of {width}", argument="shape"
            )
    with collecting() as notes:
        ceilings, timings = measure(shapes, tokens, kinds, device=device, rounds=rounds, listen=listen)
    if device.startswith("cuda"):
        return Benchmark(machine(device), ceilings, tuple(timings))
    unfit = {name: _unfit(KINDS[name], shapes[0]) for name in kinds}
    return Benchmark(machine(device), ceilings, tuple(timings), _kernels(), unfit, tuple(notes))


def measure(
    shapes: Iterable[tuple[int, int]] = SHAPES,
    tokens: Sequence[int] = TOKENS,
    kinds: Sequence[str] = USUAL,
    *,
    device: str = "cpu",
    rounds: int = 7,
    clock: Clock | None = None,
    listen: Listener = silent,
) -> tuple[Ceilings, list[Timing]]:
    """Ceilings, and a timing for every kind, shape and number of tokens.

    clock: seconds; by default those of the CPU on one thread, which leave out what other processes take.
    """
    from outlierq.runtime.timing import clock_here

    clock = clock or (time.perf_counter if device.startswith("cuda") else clock_here())
    ceilings = measure_ceilings(device, rounds, clock)
    shapes = list(shapes)
    timings: list[Timing] = []
    for shape in shapes:
        dense = _copies(partial(_dense_layer, shape, device))
        for kind in kinds:
            for timing in _timings_of(kind, shape, tokens, dense, ceilings, partial(_least, device, rounds, clock)):
                timings.append(timing)
                listen(Event("bench", len(timings), len(shapes) * len(kinds) * len(tokens)))
    return ceilings, timings


def _timings_of(
    kind: str,
    shape: tuple[int, int],
    tokens: Sequence[int],
    dense: list[torch.nn.Module],
    ceilings: Ceilings,
    least: Callable[[Mapping[str, Callable[[], Any]]], dict[str, float]],
) -> Iterator[Timing]:
    """A row for every number of tokens. least: seconds of calls."""
    import torch

    device = str(next(dense[0].parameters()).device)
    layers = {name: _copies(make) for name, make in _makers(shape, KINDS[kind], device).items()}
    taken = next(iter(layers.values()))[0]
    codes = _decoding(shape, KINDS[kind], device)
    hopeless: set[str] = set()
    for count in sorted(tokens):
        x = torch.randn(count, shape[1], device=device).bfloat16()
        ways = {name: call for name, call in _calls(layers, x).items() if name not in hopeless}
        seconds = least({**ways, "bfloat16": _turns(dense, x), "decoding": partial(codes, x)})
        nbytes = sum(b.nbytes for b in taken.buffers()) + x.nbytes + count * shape[0] * 2
        bound = ceilings.seconds(nbytes, 2 * count * shape[0] * shape[1], kind == "w8a8")
        candidates = {name: seconds[name] for name in ways}
        hopeless |= {name for name in ways if seconds[name] > FAR_BEHIND * min(seconds.values())}
        used = _used(taken, count)
        hopeless.discard(used)
        times = (seconds[used], seconds["bfloat16"], seconds["decoding"])
        yield Timing(kind, shape, count, nbytes, *times, bound, used, candidates)


def _makers(shape: tuple[int, int], scheme: QuantScheme, device: str) -> dict[str, Callable[[], QuantLinear]]:
    """By way, how a layer is made; the way that a model gets comes first."""
    from outlierq.runtime.choice import Choice
    from outlierq.runtime.cpu import ALWAYS

    if device.startswith("cuda"):
        return {"kernels": partial(random_layer, shape, scheme, device)}
    taken = random_layer(shape, scheme, device).choice
    assert taken is not None, "every kind has a way"
    choices = [taken] + [Choice(way.name, ALWAYS, {}) for way in _ways(scheme, shape) if way.name != taken.way]
    return {choice.way: partial(random_layer, shape, scheme, device, choice) for choice in choices}


def _calls(layers: Mapping[str, list[QuantLinear]], x: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """By the name of each candidate: a way on the codes, and decoding them where it can."""
    from outlierq.runtime.cpu import ALWAYS

    calls = {}
    for name, copies in layers.items():
        calls[name] = _turns_of(copies, x, ALWAYS)
        if x.device.type == "cpu" and not copies[0].opaque:
            calls[name + DECODED] = _turns_of(copies, x, 0)
    return calls


def _used(layer: QuantLinear, tokens: int) -> str:
    """Which of the candidates a layer is with so many tokens."""
    from outlierq.runtime.cpu import is_direct

    if layer.choice is None:
        return "kernels"
    return layer.choice.way + ("" if layer.opaque or is_direct(layer.choice.direct, tokens) else DECODED)


def _ways(scheme: QuantScheme, shape: tuple[int, int]) -> list[Way]:
    """Those that hold a weight of this kind on the CPU."""
    import torch

    from outlierq.runtime.choice import random_weight
    from outlierq.runtime.ways import ways_for

    return ways_for(random_weight(scheme, shape), torch.bfloat16, scheme.activations is not None)


def _unfit(scheme: QuantScheme, shape: tuple[int, int]) -> dict[str, str]:
    """By way, why it does not hold such a weight."""
    import torch

    from outlierq.runtime.choice import random_weight
    from outlierq.runtime.ways import WAYS

    weight = random_weight(scheme, shape)
    missing = {w.name: w.missing(weight, torch.bfloat16) for w in WAYS if w.int8_inputs == bool(scheme.activations)}
    return {name: reason for name, reason in missing.items() if reason is not None}


def _kernels() -> dict[str, str]:
    """The kernels behind the compiled ways."""
    import torch

    from outlierq.ops.compiled import products

    found = {"compiled": products.float_kernel(torch.bfloat16), "compiled int8": products.int8_kernel()}
    return {name: kernel for name, kernel in found.items() if kernel is not None}


def _least(device: str, rounds: int, clock: Clock, calls: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Seconds of calls that take turns: `runtime.timing`."""
    import torch

    from outlierq.runtime.timing import least_seconds

    wait: Callable[[], Any] = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    return least_seconds(calls, rounds, clock, wait)


def measure_ceilings(device: str, rounds: int, clock: Clock = time.perf_counter) -> Ceilings:
    """Memory: copying or summing a large tensor, whichever is faster. Peaks: large square products."""
    import torch

    from outlierq.ops.twins.int8_split import int8_product

    numbers = torch.ones(PROBE_BYTES // 4, device=device)
    target = torch.empty_like(numbers)
    square = torch.randn(PROBE_SIZE, PROBE_SIZE, device=device).bfloat16()
    codes = torch.ones(PROBE_SIZE, PROBE_SIZE, dtype=torch.int8, device=device)
    calls = {
        "copy": lambda: target.copy_(numbers),
        "sum": lambda: numbers.sum(),
        "16-bit": lambda: torch.nn.functional.linear(square, square),
        "int8": lambda: int8_product(codes, codes),
    }
    seconds = _least(device, rounds, clock, calls)
    bandwidth = max(2 * PROBE_BYTES / seconds["copy"], PROBE_BYTES / seconds["sum"])
    return Ceilings(bandwidth, *(2 * PROBE_SIZE**3 / seconds[name] for name in ("16-bit", "int8")))


def random_layer(shape: tuple[int, int], scheme: QuantScheme, device: str, choice: Choice | None = None) -> QuantLinear:
    """A layer with random codes and scales. choice: the way on the CPU, if not the fastest."""
    from outlierq.runtime import QuantLinear
    from outlierq.runtime.choice import random_weight

    return QuantLinear(random_weight(scheme, shape), device=device, choice=choice)


def _decoding(shape: tuple[int, int], scheme: QuantScheme, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The baseline: codes times scales as one bfloat16 matrix, then the product."""
    import torch

    from outlierq.runtime.choice import random_weight

    codes = random_weight(scheme, shape).codes.to(device)
    scale = torch.rand(shape[0], scheme.groups(shape[1]), device=device).bfloat16()[..., None]

    def decode(x: torch.Tensor) -> torch.Tensor:
        weight = codes.to(x.dtype).view(shape[0], scale.shape[1], -1).mul_(scale).view(shape)
        return torch.nn.functional.linear(x, weight)

    return decode


def _dense_layer(shape: tuple[int, int], device: str) -> torch.nn.Module:
    """The rival: a bfloat16 linear."""
    import torch

    return torch.nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16, device=device)


def _copies(make: Callable[[], Layer]) -> list[Layer]:
    """As many layers as rotation takes; packed tensors of oneDNN cannot be copied, so each is made anew."""
    layer = make()
    held = sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))
    return [layer, *(make() for _ in range(min(MOST_COPIES, -(-ROTATION_BYTES // held)) - 1))]


def _turns(layers: Sequence[torch.nn.Module], x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A call that takes the next copy every time."""
    upcoming = cycle(layers)
    return lambda: next(upcoming)(x)


def _turns_of(layers: list[QuantLinear], x: torch.Tensor, direct: int) -> Callable[[], torch.Tensor]:
    """The same with layers that decode or do not."""
    upcoming = cycle(layers)

    def call() -> torch.Tensor:
        layer = next(upcoming)
        layer.direct = direct
        y: torch.Tensor = layer(x)
        return y

    return call


def machine(device: str) -> str:
    """The processor and the threads torch uses, or the GPU; and why the CUDA kernels rest."""
    import torch

    from outlierq.kernels.launch import unavailable

    if device.startswith("cuda"):
        missing = unavailable()
        return torch.cuda.get_device_name(device) + (f" ({missing})" if missing else "")
    threads = torch.get_num_threads()
    return f"CPU, {torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' if threads > 1 else ''}"
