"""Time the CUDA kernels on this machine's GPU beside torch's 16-bit and int8 products, and against the bytes they move.

Every figure is the median of 50 replays of a CUDA graph with 20 calls, each call on another copy of the weight, so that
no weight is in the second-level cache; each is taken twice, and both are written. `eager_us`: one call without a graph.
Bounds are multiples of the time that the same bytes take in a copy (measured first), plus a fixed cost of a launch.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from record import write_results

from outlierq.kernels import launch, layout
from outlierq.kernels.layout import PackedWeight
from outlierq.ops.twins.quant_rows import SplitOperands

CALLS, REPLAYS, EAGER_CALLS = 20, 50, 200
DEVICE, DTYPE = "cuda", torch.bfloat16
COPIED_BYTES, SQUARE = 2**30, 8192  # of the ceilings
LAYERS = {  # outputs, inputs
    "8B o": (4096, 4096), "8B qkv": (6144, 4096), "8B up": (14336, 4096), "8B down": (4096, 14336),
    "70B o": (8192, 8192), "70B up": (28672, 8192),
}  # fmt: skip
FEW = 28 * 2**20  # bytes of a packed weight from which the fixed cost of a launch matters little
OUTLIER_SHARE = 0.005


def graph_us(calls: list[Callable[[], object]]) -> list[float]:
    """Microseconds of one call inside a graph, measured twice."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS):
            calls[i % len(calls)]()
    found = []
    for _ in range(2):
        times = []
        for _ in range(REPLAYS):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000 / CALLS)
        found.append(round(statistics.median(times), 3))
    return found


def eager_us(call: Callable[[], object]) -> float:
    """Microseconds of one call of many in a row, without a graph."""
    call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(EAGER_CALLS):
        call()
    torch.cuda.synchronize()
    return round((time.perf_counter() - begin) * 1e6 / EAGER_CALLS, 2)


def copies(size: int) -> int:
    """How many weights of `size` bytes are needed to be sure that none is cached: twice the cache, at most 20."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(CALLS, -(-2 * cache // size) + 1))


def ceilings() -> dict:
    """Copy bandwidth, 16-bit and int8 matrix products, and what a launch costs."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy = graph_us([lambda: target.copy_(source)])
    a, b = (torch.randn(SQUARE, SQUARE, device=DEVICE, dtype=DTYPE) for _ in range(2))
    wide = graph_us([lambda: a @ b])
    p, q = (torch.randint(-127, 128, (SQUARE, SQUARE), dtype=torch.int8, device=DEVICE) for _ in range(2))
    narrow = graph_us([lambda: torch._int_mm(p, q.T)])
    tiny = torch.randn(1, 64, device=DEVICE, dtype=DTYPE)
    return {
        "copy_bytes_per_us": 2 * source.numel() / min(copy),
        "bf16_flop_per_us": 2 * SQUARE**3 / min(wide),
        "int8_op_per_us": 2 * SQUARE**3 / min(narrow),
        "launch_graph_us": graph_us([lambda: launch.fwht(tiny)]),
        "launch_eager_us": eager_us(lambda: launch.fwht(tiny)),
    }


def packed_weights(outputs: int, inputs: int, bits: int = 4, group: int = 128) -> list[PackedWeight]:
    """Enough random weights of one shape."""
    count = copies(outputs * inputs * bits // 8)
    low = -(1 << (bits - 1))
    scale = torch.rand(outputs, inputs // group, device=DEVICE) * 0.02 + 0.01
    found = []
    for _ in range(count):
        codes = torch.randint(low, -low, (outputs, inputs), device=DEVICE, dtype=torch.int8)
        found.append(layout.pack(codes, scale, bits=bits, group_size=group, dtype=DTYPE))
    return found


def dense_weights(outputs: int, inputs: int) -> list[torch.Tensor]:
    """Enough 16-bit weights of one shape."""
    return [torch.randn(outputs, inputs, device=DEVICE, dtype=DTYPE) for _ in range(copies(2 * outputs * inputs))]


def w4a16(tokens: int, weight: PackedWeight, x: torch.Tensor) -> torch.Tensor:
    """The kernel that is meant for so many tokens."""
    if tokens <= 8:
        return launch.w4a16_gemv(x, weight)
    return launch.w4a16_gemm(x, weight) if tokens <= 128 else torch.nn.functional.linear(x, launch.dequant(weight))


def measure_packed(bandwidth: float) -> list[dict]:
    """4-bit products at every layer and number of tokens, beside the 16-bit product."""
    rows = []
    for name, (outputs, inputs) in LAYERS.items():
        weights, dense = packed_weights(outputs, inputs), dense_weights(outputs, inputs)
        size = sum(t.numel() * t.element_size() for t in (weights[0].words, weights[0].scale))
        for tokens in (1, 4, 8, 16, 32, 64, 128, 256, 2048):
            x = torch.randn(tokens, inputs, device=DEVICE, dtype=DTYPE)
            ours = graph_us([lambda w=w, x=x: w4a16(x.shape[0], w, x) for w in weights])
            torchs = graph_us([lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in dense])
            rows.append({
                "kernel": "w4a16", "layer": name, "tokens": tokens, "us": ours, "bf16_us": torchs,
                "eager_us": eager_us(lambda x=x, w=weights[0]: w4a16(x.shape[0], w, x)),
                "copy_us": (size + 2 * tokens * (inputs + outputs)) / bandwidth, "packed_bytes": size,
                "speedup": min(torchs) / min(ours),
            })  # fmt: skip
        del weights, dense
    return rows


def measure_int8(bandwidth: float) -> list[dict]:
    """Row quantization and the int8 product with and without outliers, beside torch's int8 product and its scaling."""
    rows = []
    for name in ("8B o", "8B up"):
        outputs, inputs = LAYERS[name]
        pitch = max(16, int(OUTLIER_SHARE * inputs) // 16 * 16)
        count = copies(outputs * inputs)
        codes = [torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device=DEVICE) for _ in range(count)]
        scale = torch.rand(outputs, device=DEVICE)
        kept = torch.randn(outputs, pitch, device=DEVICE, dtype=DTYPE)
        columns = torch.arange(pitch, device=DEVICE, dtype=torch.int32) * (inputs // pitch)
        for tokens in (1, 16, 32, 64, 256, 2048):
            xs = [torch.randn(tokens, inputs, device=DEVICE, dtype=DTYPE) for _ in range(copies(2 * tokens * inputs))]
            low, scale_x, outliers = launch.quant_rows(xs[0], columns, pitch)
            given = (low, scale_x, scale, outliers, kept)
            rows.append({
                "kernel": "w8a8_outlier", "layer": name, "tokens": tokens,
                "quant_rows_us": graph_us([lambda x=x, c=columns, p=pitch: launch.quant_rows(x, c, p) for x in xs]),
                "quant_rows_copy_us": 3 * tokens * inputs / bandwidth,
                "us": graph_us([lambda c=c, g=given: with_outliers(c, *g) for c in codes]),
                "without_outliers_us": graph_us([lambda c=c, g=given: without_outliers(c, *g) for c in codes]),
                "eager_us": eager_us(lambda x=xs[0], w=(codes[0], columns, pitch, scale, kept): whole_linear(x, *w)),
                **torch_int8(bandwidth, codes, low, scale_x, scale),
            })  # fmt: skip
    return rows


def with_outliers(codes, low, scale_x, scale, outliers, kept) -> torch.Tensor:
    return launch.w8a8_outlier(SplitOperands(low, scale_x, codes, scale, outliers, kept), dtype=DTYPE)


def without_outliers(codes, low, scale_x, scale, outliers, kept) -> torch.Tensor:
    return launch.w8a8_outlier(SplitOperands(low, scale_x, codes, scale), dtype=DTYPE)


def whole_linear(x, codes, columns, pitch, scale, kept) -> torch.Tensor:
    low, scale_x, outliers = launch.quant_rows(x, columns, pitch)
    return with_outliers(codes, low, scale_x, scale, outliers, kept)


def torch_int8(bandwidth: float, codes: list[torch.Tensor], low, scale_x, scale) -> dict:
    """cuBLASLt's product by `_int_mm`, alone and with the scaling that it leaves to others; more than 16 tokens only.

    int_mm_scaled_us: scaled by torch, in two passes. int_mm_and_pass_us: what one pass over the int32 sums would take
    at the speed of a copy, which nothing can beat.
    """
    tokens, outputs = low.shape[0], codes[0].shape[0]
    if tokens <= 16:
        return {}

    def scaled(c: torch.Tensor) -> torch.Tensor:
        y = torch.empty(tokens, outputs, device=low.device, dtype=DTYPE)
        return torch.mul(torch._int_mm(low, c.T) * scale, scale_x[:, None], out=y)

    alone = graph_us([lambda c=c: torch._int_mm(low, c.T) for c in codes])
    return {
        "int_mm_us": alone,
        "int_mm_and_pass_us": min(alone) + (4 + 2) * tokens * outputs / bandwidth,
        "int_mm_scaled_us": graph_us([lambda c=c: scaled(c) for c in codes]),
    }


def measure_bitsandbytes() -> list[dict]:
    """LLM.int8() of bitsandbytes, eager, because it reads the outliers on the host."""
    import bitsandbytes as bnb

    rows = []
    for name in ("8B o", "8B up"):
        outputs, inputs = LAYERS[name]
        layer = bnb.nn.Linear8bitLt(inputs, outputs, bias=False, has_fp16_weights=False, threshold=6.0).cuda()
        for tokens in (1, 16, 32, 2048):
            x = torch.randn(tokens, inputs, device=DEVICE, dtype=torch.float16)
            x[:, :: int(1 / OUTLIER_SHARE)] *= 20
            rows.append({"layer": name, "tokens": tokens, "eager_us": eager_us(lambda x=x, m=layer: m(x))})
    return rows


def peer_missing() -> str:
    """Why bitsandbytes cannot be measured beside us; empty when it can."""
    try:
        installed = version("bitsandbytes")
    except PackageNotFoundError:
        return "bitsandbytes is not installed: its bounds are not measured"
    recent = tuple(map(int, installed.split(".")[:2])) >= (0, 50)
    return "" if recent else f"bitsandbytes {installed} is older than the 0.50 that the bounds are about"


def bounds(packed: list[dict], int8: list[dict], peers: list[dict]) -> list[dict]:
    """Every bound with the figure that it is about, and whether it holds."""
    found = []

    def bound(what: str, row: dict, figure: float, limit: float, at_most: bool = True) -> None:
        held = figure <= limit if at_most else figure >= limit
        where = {"layer": row["layer"], "tokens": row["tokens"]}
        found.append({"bound": what, **where, "figure": round(figure, 3), "limit": round(limit, 3), "held": held})

    one = {row["layer"]: row for row in packed if row["tokens"] == 1}
    for row in packed:
        us, tokens = min(row["us"]), row["tokens"]
        if tokens == 1 and row["packed_bytes"] >= FEW:
            bound("one token: 1.35 x copy + 3 us", row, us, 1.35 * row["copy_us"] + 3)
        if tokens == 1 and row["layer"] == "8B o":
            bound("one token, 4096 x 4096: 7 us", row, us, 7.0)
        if tokens == 16:
            bound("16 tokens: 1.25 x one token", row, us, 1.25 * min(one[row["layer"]]["us"]))
            bound("16 tokens: 2.2 x bf16", row, row["speedup"], 2.2, at_most=False)
        if tokens == 64:
            bound("64 tokens: 1.5 x bf16", row, row["speedup"], 1.5, at_most=False)
        if tokens >= 256:
            bound("many tokens: 1.25 x the time of bf16", row, us, 1.25 * min(row["bf16_us"]))
    for row in int8:
        bound("quant_rows: 1.3 x copy + 3 us", row, min(row["quant_rows_us"]), 1.3 * row["quant_rows_copy_us"] + 3)
        bound("outliers: 10 % on top", row, min(row["us"]), 1.1 * min(row["without_outliers_us"]))
        if row["tokens"] == 2048:
            bound("int8: not slower than _int_mm and one pass", row, min(row["us"]), row["int_mm_and_pass_us"])
    ours = {(row["layer"], row["tokens"]): row["eager_us"] for row in int8}
    for row in peers:
        ratio, times = row["eager_us"] / ours[row["layer"], row["tokens"]], 3.0 if row["tokens"] <= 32 else 1.5
        bound(f"int8 with outliers: {times} x bitsandbytes", row, ratio, times, at_most=False)
    return found


def main() -> int:
    """Measure and write; 1 when there is no GPU or a bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "gpu_kernels.json")
    output = parser.parse_args().output
    if (why := launch.unavailable()) is not None:
        print(f"nothing measured: {why}", file=sys.stderr)
        return 1
    limits = ceilings()
    packed = measure_packed(limits["copy_bytes_per_us"])
    int8 = measure_int8(limits["copy_bytes_per_us"])
    missing = peer_missing()
    peers = [] if missing else measure_bitsandbytes()
    checked = bounds(packed, int8, peers)
    device = {"name": torch.cuda.get_device_name(0), "cuda": torch.version.cuda}
    sections = {"device": device, "ceilings": limits, "w4a16": packed, "w8a8": int8, "bounds": checked}
    write_results(output, {**sections, "bitsandbytes": peers or missing})
    for row in checked:
        print("ok  " if row["held"] else "MISS", row)
    if missing:
        print("MISS", missing)
    return 0 if all(row["held"] for row in checked) and not missing else 1


if __name__ == "__main__":
    sys.exit(main())
