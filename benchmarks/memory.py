"""Is the plan's bound on memory an upper bound, and is a ceiling kept? Measured on random models of several shapes.

Each shape is run without a ceiling and under the smallest one that `plan` accepts, then under the system's own limit on
private memory (RLIMIT_DATA) of the same size.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from measure import measure
from random_llama import write_random_llama
from record import write_results

MIB = 1 << 20
# hidden, inner, heads, key-value heads, blocks, recipe, text: what needs most is a hessian, a stack, a batch in turn.
SHAPES = {
    "plain": (576, 1536, 9, 3, 4, "gptq-w4", {}),
    "wide": (1024, 4096, 16, 4, 2, "gptq-w4", {}),
    "square": (2048, 2048, 16, 16, 2, "gptq-w4", {}),
    "awq": (1024, 2816, 16, 4, 2, "awq-gptq-w4", {}),
    "long": (512, 1024, 8, 8, 2, "gptq-w4", {"samples": 64, "sequence_length": 1024, "batch_size": 8}),
    "sequential": (768, 2048, 12, 4, 3, "gptq-w4", {"mode": "sequential"}),
    "rotated": (1024, 2816, 16, 4, 2, "rotate-w4a8", {}),
    "rotated, square": (2048, 2048, 16, 16, 2, "rotate-w8a8", {}),
    "data-free": (2048, 5632, 16, 4, 4, "rtn-w4", None),
    "32 experts": (512, 256, 8, 4, 2, "gptq-w4", {}),
    "128 experts": (512, 256, 8, 4, 2, "gptq-w4", {}),
    "128 experts, data-free": (512, 256, 8, 4, 2, "rtn-w4", None),
}
TEXT = {"samples": 16, "sequence_length": 256, "batch_size": 4}


def config(name: str, hidden: int, inner: int, heads: int, shared: int, blocks: int, like: dict) -> dict:
    """A Llama of this shape, with the vocabulary of the model whose tokenizer is used; a Qwen3-MoE where the name of
    the shape has experts, 8 of them for a token.
    """
    shape = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "num_hidden_layers": blocks,
        "head_dim": hidden // heads,
    }
    if "experts" in name:
        moe = {"num_experts": int(name.split()[0]), "num_experts_per_tok": 8, "moe_intermediate_size": inner}
        shape |= {**moe, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "norm_topk_prob": True}
    return {**like, **shape}


def limited(command: list[str], ceiling: int) -> list[str]:
    """The command under a limit of the system."""
    return ["prlimit", f"--data={ceiling}", *command]


def measured(name: str, model: Path, outlierq: str, threads: int, folder: Path) -> dict:
    """What `plan` says of one shape, and what its runs took."""
    *shape, recipe, text = SHAPES[name]
    source, out = folder / name, folder / f"{name}-out"
    write_random_llama(
        source, config(name, *shape, json.loads((model / "config.json").read_text())), tokenizer_from=model
    )
    settings = {} if text is None else {f"calibration.{key}": value for key, value in {**TEXT, **text}.items()}
    asked = [str(source), "--recipe", recipe, *(word for k, v in settings.items() for word in ("--set", f"{k}={v}"))]
    planned = json.loads(subprocess.run([outlierq, "plan", *asked, "--json"], check=True, capture_output=True).stdout)
    smallest = smallest_ceiling([outlierq, "plan", *asked])
    environment = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [outlierq, "quantize", *asked, "-o"]
    free = measure([*command, str(out)], folder / f"{name}.log", environment)
    bounded = limited([*command, f"{out}-bounded", "--max-memory", f"{smallest}MiB"], smallest * MIB)
    kept = measure(bounded, folder / f"{name}-bounded.log", environment)
    return {
        "recipe": recipe,
        "planned_bytes": planned["estimated_peak_bytes"],
        "peak_bytes": free["peak_bytes"],
        "planned_over_measured": planned["estimated_peak_bytes"] / free["peak_bytes"],
        "ceiling_bytes": smallest * MIB,
        "peak_bytes_below_ceiling": kept["peak_bytes"],
        "seconds_without_ceiling": free["wall_seconds"],
        "seconds_with_ceiling": kept["wall_seconds"],
        "met": free["peak_bytes"] <= planned["estimated_peak_bytes"] and kept["peak_bytes"] <= smallest * MIB,
    }


def smallest_ceiling(plan: list[str]) -> int:
    """MiB of the least ceiling that `plan` accepts: it names it when it refuses."""
    refused = subprocess.run([*plan, "--max-memory", "1MiB"], capture_output=True, text=True)
    return int(refused.stderr.rpartition("give --max-memory ")[2].partition("MiB")[0])


def main() -> None:
    """Measure every shape and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder, for its config and tokenizer")
    parser.add_argument("--outlierq", default=str(Path(sys.executable).with_name("outlierq")), help="our command")
    parser.add_argument("--only", nargs="+", choices=SHAPES, default=list(SHAPES), help="do only these shapes")
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS of every run (default: 1)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    assert hasattr(resource, "RLIMIT_DATA"), "the limit is one of Linux"
    found = {}
    with TemporaryDirectory(dir=arguments.output.parent) as folder:
        for name in arguments.only:
            found[name] = measured(name, arguments.model, arguments.outlierq, arguments.threads, Path(folder))
            print(name, json.dumps(found[name]), flush=True)
    write_results(arguments.output, {"threads": arguments.threads, "shapes": found})


if __name__ == "__main__":
    main()
