"""`outlierq bench`: how fast this machine multiplies packed weights, beside the 16-bit product and the roofline.

Every figure is the smallest of several rounds, and in a round all candidates take turns, so that a busy machine or a
changing clock hits all of them. Weights rotate through copies, because a model's next layer is never in the cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import ArgumentError
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import ActivationScheme, QuantScheme
from outlierq.pipeline.asked.events import Event, Listener, silent

if TYPE_CHECKING:
    import torch

KINDS = {
    "w4": QuantScheme(4, 128),
    "w8": QuantScheme(8, None),
    "w8a8": QuantScheme(8, None, activations=ActivationScheme()),
}
Clock = Callable[[], float]
TOKENS = (1, 4, 16, 64, 256)
SHAPES = ((4096, 4096),)
ROTATION_BYTES = 64 << 20  # the copies of a weight together hold at least so much
MOST_COPIES = 64  # of small weights
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
    bfloat16 by torch and then multiplied. roofline_seconds: the least that `Ceilings` allows.
    """

    kind: str
    shape: tuple[int, int]
    tokens: int
    nbytes: int
    seconds: float
    dense_seconds: float
    decode_seconds: float
    roofline_seconds: float

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
    """What this machine does. machine: its name and settings."""

    machine: str
    ceilings: Ceilings
    timings: tuple[Timing, ...]

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        rows = [timing.to_dict() for timing in self.timings]
        return {"machine": self.machine, "ceilings": vars(self.ceilings), "timings": rows}


def bench(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    tokens: Sequence[int] = TOKENS,
    kinds: Sequence[str] = tuple(KINDS),
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
    if "w4" in kinds and any(columns % 128 for _, columns in shapes):
        raise ArgumentError("w4 has groups of 128 inputs; OUTxIN needs a multiple of 128", argument="shape")
    ceilings, timings = measure(shapes, tokens, kinds, device=device, rounds=rounds, listen=listen)
    return Benchmark(machine(device), ceilings, tuple(timings))


def measure(
    shapes: Iterable[tuple[int, int]] = SHAPES,
    tokens: Sequence[int] = TOKENS,
    kinds: Sequence[str] = tuple(KINDS),
    *,
    device: str = "cpu",
    rounds: int = 7,
    clock: Clock = time.perf_counter,
    listen: Listener = silent,
) -> tuple[Ceilings, list[Timing]]:
    """Ceilings, and a timing for every kind, shape and number of tokens.

    clock: seconds. On one thread, `time.process_time` leaves out what other processes take of a busy machine.
    """
    import torch

    ceilings = measure_ceilings(device, rounds, clock)
    shapes = list(shapes)
    timings, total = [], len(shapes) * len(kinds) * len(tokens)
    for shape in shapes:
        dense = _copies(partial(_dense_layer, shape, device))
        for kind in kinds:
            layers = _copies(partial(random_layer, shape, KINDS[kind], device))
            codes = _decoding(shape, KINDS[kind], device)
            for count in tokens:
                x = torch.randn(count, shape[1], device=device).bfloat16()
                turns = {"packed": _turns(layers, x), "dense": _turns(dense, x)}
                seconds = interleaved_minima({**turns, "decode": partial(codes, x)}, rounds, device, clock)
                nbytes = sum(b.nbytes for b in layers[0].buffers()) + x.nbytes + count * shape[0] * 2
                bound = ceilings.seconds(nbytes, 2 * count * shape[0] * shape[1], kind == "w8a8")
                times = (seconds["packed"], seconds["dense"], seconds["decode"])
                timings.append(Timing(kind, shape, count, nbytes, *times, bound))
                listen(Event("bench", len(timings), total))
    return ceilings, timings


def interleaved_minima(
    calls: Mapping[str, Callable[[], Any]], rounds: int, device: str, clock: Clock = time.perf_counter
) -> dict[str, float]:
    """Seconds of each call: the least of `rounds` (and one before, which warms up), taking turns."""
    import torch

    best = dict.fromkeys(calls, float("inf"))
    wait: Callable[[], Any] = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    with torch.inference_mode():
        for number in range(rounds + 1):
            for name, call in calls.items():
                wait()
                start = clock()
                call()
                wait()
                if number:
                    best[name] = min(best[name], clock() - start)
    return best


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
    seconds = interleaved_minima(calls, rounds, device, clock)
    bandwidth = max(2 * PROBE_BYTES / seconds["copy"], PROBE_BYTES / seconds["sum"])
    return Ceilings(bandwidth, *(2 * PROBE_SIZE**3 / seconds[name] for name in ("16-bit", "int8")))


def random_layer(shape: tuple[int, int], scheme: QuantScheme, device: str) -> torch.nn.Module:
    """A `QuantLinear` with random codes and scales."""
    import torch

    from outlierq.runtime import QuantLinear

    codes = torch.randint(int(scheme.code_min), int(scheme.code_max) + 1, shape, dtype=torch.int8)
    scale = torch.rand(scheme.scale_shape(*shape)).add_(0.5).mul_(0.01).bfloat16()
    return QuantLinear(QuantTensor(codes, scale, None, scheme), device=device)


def _decoding(shape: tuple[int, int], scheme: QuantScheme, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The baseline: codes times scales as one bfloat16 matrix, then the product."""
    import torch

    codes = torch.randint(int(scheme.code_min), int(scheme.code_max) + 1, shape, dtype=torch.int8, device=device)
    scale = torch.rand(scheme.scale_shape(*shape), device=device).bfloat16()[..., None]

    def decode(x: torch.Tensor) -> torch.Tensor:
        weight = codes.to(x.dtype).view(shape[0], scale.shape[1], -1).mul_(scale).view(shape)
        return torch.nn.functional.linear(x, weight)

    return decode


def _dense_layer(shape: tuple[int, int], device: str) -> torch.nn.Module:
    """The rival: a bfloat16 linear."""
    import torch

    return torch.nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16, device=device)


def _copies(make: Callable[[], torch.nn.Module]) -> list[torch.nn.Module]:
    """As many layers as rotation takes; packed tensors of oneDNN cannot be copied, so each is made anew."""
    layer = make()
    held = sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))
    return [layer, *(make() for _ in range(min(MOST_COPIES, -(-ROTATION_BYTES // held)) - 1))]


def _turns(layers: list[torch.nn.Module], x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A call that takes the next copy every time."""
    upcoming = cycle(layers)
    return lambda: next(upcoming)(x)


def machine(device: str) -> str:
    """The processor and the threads torch uses, or the GPU; and why the CUDA kernels rest."""
    import torch

    from outlierq.kernels.launch import unavailable

    if device.startswith("cuda"):
        missing = unavailable()
        return torch.cuda.get_device_name(device) + (f" ({missing})" if missing else "")
    threads = torch.get_num_threads()
    return f"CPU, {torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' if threads > 1 else ''}"
