"""What one block of a Llama costs, stage by stage, at several widths: the measured part of docs/scaling.md.

A random model is compressed with few blocks and with more; the difference is what a block costs, without the start and
the end of a run. Beside the seconds stand the operations that the formulas of docs/scaling.md count, so that the last
column, billions of them per second, says whether the formulas hold: it should not change much with the width.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from random_llama import write_random_llama
from record import write_results

WIDTHS = {1024: 2816, 2048: 5632, 4096: 14336}  # hidden size: intermediate size
BLOCKS = {1024: (1, 5), 2048: (1, 3), 4096: (1, 2)}
HEAD, SHARE = 64, 4  # width of a head, query heads for each of keys


def config_of(hidden: int, blocks: int, vocabulary: int) -> dict:
    """A Llama of this width."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": WIDTHS[hidden],
        "num_hidden_layers": blocks,
        "num_attention_heads": hidden // HEAD,
        "num_key_value_heads": hidden // HEAD // SHARE,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
        "vocab_size": vocabulary,
    }


def operations(hidden: int, tokens: int, products: float = 4) -> dict[str, float]:
    """Multiplications and additions of a block by stage, as docs/scaling.md counts them.

    products: of a weight with half of a matrix: the sweep, the power of the output, and for one pass of refinement two.
    """
    inner, keys = WIDTHS[hidden], hidden // SHARE
    weights = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner
    inputs = 3 * hidden**2 + inner**2  # squared widths of the inputs: q/k/v, o, gate/up, down
    rows = {
        "q/k/v": (hidden + 2 * keys, hidden),
        "o": (hidden, hidden),
        "up": (2 * inner, hidden),
        "down": (hidden, inner),
    }
    return {
        "calibrate": 2 * weights * tokens + 2 * inputs * tokens,
        "quantize": products * sum(out * width**2 for out, width in rows.values()) + (3 * hidden**3 + inner**3) / 3,
        "weights": weights,
    }


def run(command: str, source: Path, out: Path, recipe: str, samples: int) -> dict[str, float]:
    """Seconds of one run by stage."""
    settings = [] if recipe.startswith("rtn") else ["--set", f"calibration.samples={samples}"]
    done = subprocess.run(
        [command, "quantize", str(source), "--recipe", recipe, "-o", str(out), "--json", "--quiet", *settings],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    report = json.loads(done.stdout)
    return {**report["seconds"], "peak_bytes": report["peak_bytes"]}


def main() -> None:
    """Every width: few blocks, more blocks, the difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder with a tokenizer")
    parser.add_argument("--recipe", default="gptq-w4")
    parser.add_argument("--samples", type=int, default=32, help="windows of 512 tokens (default: 32)")
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--outlierq", default=str(Path(sys.executable).with_name("outlierq")))
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    vocabulary = json.loads((arguments.tokenizer / "config.json").read_text())["vocab_size"]
    rows = []
    for hidden in arguments.widths:
        found = {}
        for blocks in BLOCKS[hidden]:
            with TemporaryDirectory() as folder:
                source, out = Path(folder, "source"), Path(folder, "out")
                write_random_llama(source, config_of(hidden, blocks, vocabulary), arguments.tokenizer)
                found[blocks] = run(arguments.outlierq, source, out, arguments.recipe, arguments.samples)
        few, more = BLOCKS[hidden]
        counted = operations(hidden, arguments.samples * 512)
        seconds = {stage: (found[more][stage] - found[few][stage]) / (more - few) for stage in found[few]}
        peak = seconds.pop("peak_bytes")
        rate = {
            stage: counted[stage] / seconds[stage] / 1e9 for stage in ("calibrate", "quantize") if seconds[stage] > 0
        }
        rows.append(
            {
                "hidden": hidden,
                "weights_of_a_block": counted["weights"],
                "seconds_of_a_block": seconds,
                "billion_operations_per_second": rate,
                "peak_bytes": found[more]["peak_bytes"],
                "peak_bytes_of_a_block_more": peak,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    sections = {
        "recipe": arguments.recipe,
        "tokens": arguments.samples * 512,
        "load": os.getloadavg()[0],
        "widths": rows,
    }
    write_results(arguments.output, sections)


if __name__ == "__main__":
    main()
