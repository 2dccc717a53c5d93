"""What large models need in time, memory, disk and network, on paper: prints the tables of docs/scaling.md.

Operations and bytes are counted from the shapes of a model. How fast this machine does them is measured
(results/block_cost.json); how fast a GPU does them is assumed, in `ASSUMED`, and nothing here was run on one.
"""

import json
from dataclasses import dataclass
from pathlib import Path

MEASURED = Path(__file__).parent / "results" / "block_cost.json"
TOKENS = 128 * 2048  # of a calibration

# Rates of one GPU of the H100 class and of what is around it, per second. Not measured.
ASSUMED = {
    "matrix products in bf16, operations": 400e12,  # of 989: the share that calibration reaches on our CPU (42 %)
    "solving in float32, operations": 3.3e12,  # of 67: likewise (5 %); columns follow one another
    "reading from the disk, bytes": 3e9,
    "writing to the disk, bytes": 2e9,
    "between machines, bytes": 12e9,  # 100 Gbit Ethernet
    "between GPUs of a machine, bytes": 200e9,
}
# Rates of two server cores with AMX, per second: measured at a width of 2,048 (block_cost.json), solving with today's
# solver (docs/scaling.md: 5.6 seconds of a thread for 4,096 x 4,096). The disk is assumed.
CPU = {
    "matrix products in bf16, operations": 973e9,
    "solving in float32, operations": 2 * 5 * 4096**3 / 5.6,
    "reading from the disk, bytes": 1e9,
    "writing to the disk, bytes": 1e9,
}


@dataclass(frozen=True)
class Shape:
    """One kind of block. inputs: (width, linears' outputs together, copies) of each input; experts are copies.

    seen: the share of the tokens that an input sees; 1 but for experts.
    """

    blocks: int
    inputs: tuple[tuple[int, int, int, float], ...]

    @property
    def weights(self) -> int:
        """Weights of a block."""
        return sum(width * out * copies for width, out, copies, _ in self.inputs)

    @property
    def forward(self) -> float:
        """Operations per token of all matrix products with a weight."""
        return sum(2 * width * out * copies * seen for width, out, copies, seen in self.inputs)

    @property
    def gram(self) -> float:
        """Operations per token of all hessians."""
        return sum(2 * width**2 * copies * seen for width, _, copies, seen in self.inputs)

    @property
    def hessian_bytes(self) -> int:
        """Float32 hessians of a block."""
        return sum(4 * width**2 * copies for width, _, copies, _ in self.inputs)

    @property
    def solve(self) -> float:
        """Operations of GPTQ with one pass of refinement: factor, columns, scales and refinement."""
        return sum((width**3 + 4 * out * width**2) * copies for width, out, copies, _ in self.inputs)

    @property
    def largest_stack(self) -> int:
        """Weights of the largest stack that is solved at once."""
        return max(width * out for width, out, _, _ in self.inputs)


def llama(blocks: int, hidden: int, inner: int, keys: int) -> Shape:
    """A Llama: inputs of q/k/v, of o, of gate and up, of down."""
    inputs = ((hidden, hidden + 2 * keys), (hidden, hidden), (hidden, 2 * inner), (inner, hidden))
    return Shape(blocks, tuple((width, out, 1, 1.0) for width, out in inputs))


# name: (kinds of block, hidden size, vocabulary)
MODELS: dict[str, tuple[tuple[Shape, ...], int, int]] = {
    "8B": ((llama(32, 4096, 14336, 1024),), 4096, 128256),
    # Qwen3-30B-A3B: 128 experts, 8 of them for a token.
    "30B MoE": (
        (
            Shape(
                48,
                (
                    (2048, 4096 + 1024, 1, 1.0),
                    (4096, 2048, 1, 1.0),
                    (2048, 2 * 768, 128, 8 / 128),
                    (768, 2048, 128, 8 / 128),
                ),
            ),
        ),
        2048,
        151936,
    ),
    "70B": ((llama(80, 8192, 28672, 1024),), 8192, 128256),
    "405B": ((llama(126, 16384, 53248, 1024),), 16384, 128256),
    # DeepSeek-V3: low-rank attention, 3 dense blocks, 58 with 256 experts of which 8 see a token, and a shared one.
    "671B MoE": (
        tuple(
            Shape(
                blocks,
                ((7168, 1536 + 576, 1, 1.0), (1536, 24576, 1, 1.0), (512, 32768, 1, 1.0), (16384, 7168, 1, 1.0), *own),
            )
            for blocks, own in (
                (3, ((7168, 2 * 18432, 1, 1.0), (18432, 7168, 1, 1.0))),
                (
                    58,
                    (
                        (7168, 2 * 2048, 1, 1.0),
                        (2048, 7168, 1, 1.0),
                        (7168, 2 * 2048, 256, 8 / 256),
                        (2048, 7168, 256, 8 / 256),
                    ),
                ),
            )
        ),
        7168,
        129280,
    ),
}
MACHINES = {"2 CPU cores": (1, 1), "1 GPU": (1, 1), "8 GPUs": (1, 8), "4 x 8 GPUs": (4, 8)}


def seconds(kinds: tuple[Shape, ...], machines: int, gpus: int, rates: dict[str, float] = ASSUMED) -> dict[str, float]:
    """Seconds of a gptq-w4 run by what they go to. Blocks follow one another; ranks share a block's text and sites."""
    ranks = machines * gpus
    found = dict.fromkeys(("read", "forward", "hessians", "network", "solve", "write"), 0.0)
    for kind in kinds:
        products = rates["matrix products in bf16, operations"] * ranks
        found["forward"] += kind.blocks * kind.forward * TOKENS / products
        found["hessians"] += kind.blocks * kind.gram * TOKENS / products
        # The sites of a block are dealt out whole: the largest input is the least that a rank can have.
        largest = max(width**3 + 4 * out * width**2 for width, out, _, _ in kind.inputs)
        share = max(kind.solve / ranks, largest)
        found["solve"] += kind.blocks * share / rates["solving in float32, operations"]
        # Every machine reads every weight; the lead writes all.
        found["read"] += kind.blocks * 2 * kind.weights / rates["reading from the disk, bytes"]
        found["write"] += kind.blocks * kind.weights * 0.53 / rates["writing to the disk, bytes"]
        if ranks > 1:
            rate = rates["between machines, bytes"] if machines > 1 else rates["between GPUs of a machine, bytes"]
            # A rank sends the hessians that it does not own, then its codes and scales go to the lead.
            found["network"] += kind.blocks * (kind.hessian_bytes * (ranks - 1) / ranks + 1.1 * kind.weights) / rate
    return found


def needs(name: str) -> dict[str, float]:
    """Bytes that do not depend on the number of GPUs."""
    kinds, hidden, vocabulary = MODELS[name]
    weights = sum(kind.blocks * kind.weights for kind in kinds)
    ends = 2 * vocabulary * hidden
    largest = max(kinds, key=lambda kind: kind.weights)
    return {
        "weights": weights + ends,
        "source": 2 * (weights + ends),
        "output": 0.53 * weights + 2 * ends,
        "hidden states": 2 * 2 * TOKENS * hidden,
        "block": 2 * largest.weights,
        "hessians": largest.hessian_bytes,
        "stack": 4 * 11 * max(kind.largest_stack for kind in kinds),
    }


def main() -> None:
    """Print the tables in Markdown."""
    print(
        "| model | weights | source | output | hidden states | one block | its hessians | solving its largest stack |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in MODELS:
        found = needs(name)
        columns = " | ".join(f"{found[key] / 1e9:,.1f} GB" for key in list(found)[1:])
        print(f"| {name} | {found['weights'] / 1e9:,.0f} B | {columns} |")
    print("\n| model | machines | read | forward | hessians | network | solve | write | in all, one after another |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, (kinds, _, _) in MODELS.items():
        for label, (machines, gpus) in MACHINES.items():
            found = seconds(kinds, machines, gpus, CPU if "CPU" in label else ASSUMED)
            columns = " | ".join(f"{value / 60:,.1f}" for value in found.values())
            print(f"| {name} | {label} | {columns} | **{sum(found.values()) / 60:,.0f} min** |")
    if MEASURED.exists():
        print("\n10^9 operations per second in the last two columns.\n")
        print("| hidden size | weights of a block | calibrate | quantize | export | calibrate | quantize |")
        print("|---|---|---|---|---|---|---|")
        for row in json.loads(MEASURED.read_text())["widths"]:
            spent, rate = row["seconds_of_a_block"], row["billion_operations_per_second"]
            columns = " | ".join(f"{spent[stage]:.1f} s" for stage in ("calibrate", "quantize", "export"))
            rates = " | ".join(f"{rate[stage]:.0f}" for stage in ("calibrate", "quantize"))
            print(f"| {row['hidden']} | {row['weights_of_a_block'] / 1e6:.0f} M | {columns} | {rates} |")


if __name__ == "__main__":
    main()
