"""Our recipes beside AutoRound and llm-compressor's GPTQ: KL on one model, with the same tokens and scheme.

    python benchmarks/tune.py MODEL --calibration TEXT --judge TEXT --autoround-python PYTHON \\
        --llmcompressor-python PYTHON -o RESULT.json

Each run is a process of its own, whose CPU seconds are counted; one program judges all results, by KL against the
original on text that no run has seen. `--reuse FOLDER` keeps what was finished there. `--tuned` also tunes every result
of ours end to end afterwards (`outlierq tune`).
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from measure import measure
from record import versions, write_results

import outlierq
from outlierq.calibrate.text.windows import token_windows
from outlierq.load import load_tokenizer, open_checkpoint

LIMITS = {4: 0.85, 3: 0.9, 2: 1.0}  # KL of our best result over AutoRound's, by bits
TUNED = "-tuned"
PEERS = Path(__file__).parent / "peers"


def write_tokens(asked: argparse.Namespace, file: Path) -> None:
    """The first windows of the calibration text, as our recipes cut them."""
    tokenizer = load_tokenizer(open_checkpoint(str(asked.model)))
    sizes = {"samples": asked.samples, "sequence_length": asked.sequence_length, "seed": None}
    file.write_text(json.dumps(token_windows(tokenizer, str(asked.calibration), **sizes).ids.tolist()) + "\n")


def our_command(asked: argparse.Namespace, recipe: str, bits: int, out: Path) -> list[str]:
    """The command line of one of our recipes under the common scheme."""
    settings = {
        "quantize.bits": bits,
        "quantize.group_size": asked.group_size,
        "quantize.symmetric": str(not asked.asymmetric).lower(),
        "calibration.text": asked.calibration,
        "calibration.samples": asked.samples,
        "calibration.sequence_length": asked.sequence_length,
        "calibration.seed": "null",
    }
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return [sys.executable, "-m", "outlierq", "quantize", str(asked.model), "-r", recipe, *words, "-o", str(out)]


def tune_command(asked: argparse.Namespace, compressed: Path, out: Path) -> list[str]:
    """The command line that tunes one of our results on the calibration text."""
    sizes = ["--samples", str(asked.tuned), "--sequence-length", str(asked.sequence_length)]
    sizes += ["--dtype", asked.tune_dtype]
    words = ["tune", str(compressed), "--reference", str(asked.model), "--text", str(asked.calibration), *sizes]
    return [sys.executable, "-m", "outlierq", *words, "-o", str(out)]


def gained(rows: dict[str, dict]) -> dict[str, dict]:
    """Of every result that was tuned, what is left of its KL on each text."""
    pairs = {name: rows[name.removesuffix(TUNED)] for name in rows if name.endswith(TUNED)}
    return {
        name: {text: rows[name]["kl"][text] / kl for text, kl in before["kl"].items()} for name, before in pairs.items()
    }


def peer_commands(asked: argparse.Namespace, bits: int, tokens: Path, work: Path) -> Iterator[tuple[Path, list[str]]]:
    """The results of the peers that are there, and the command line of each."""
    scheme = ["--bits", str(bits), "--group-size", str(asked.group_size)]
    scheme += ["--asymmetric"] if asked.asymmetric else []
    if asked.llmcompressor_python:
        out = work / f"llmcompressor-gptq-{bits}bit"
        program = [asked.llmcompressor_python, str(PEERS / "llmcompressor_run.py"), str(asked.model), str(tokens)]
        yield out, [*program, str(out), *scheme, "--method", "gptq"]
    for iterations in asked.iterations if asked.autoround_python else ():
        out = work / f"autoround-{iterations}-{bits}bit"
        program = [asked.autoround_python, str(PEERS / "autoround_run.py"), str(asked.model), str(tokens)]
        yield out, [*program, str(out), *scheme, "--iterations", str(iterations)]


def run(asked: argparse.Namespace, command: list[str], out: Path) -> dict:
    """Make a checkpoint, or keep the one that is there, and judge it: cost and KL on every text."""
    cost = out.with_suffix(".cost.json")
    if not (asked.reuse and cost.exists()):
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(out.with_name(f"{out.name}.partial"), ignore_errors=True)
        spent = measure(command, out.with_suffix(".log"), {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
        cost.write_text(json.dumps(spent) + "\n")
    sizes = {"windows": asked.windows, "window_length": asked.sequence_length, "device": "cpu"}
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        if (asked.model / name).exists() and not (out / name).exists():
            shutil.copy(asked.model / name, out / name)
    kls = {text.name: outlierq.evaluate(out, asked.model, text=str(text), **sizes).kl for text in asked.judge}
    row = {"kl": kls, "cost": json.loads(cost.read_text())}
    print(out.name, kls, row["cost"]["cpu_seconds"], flush=True)
    return row


def cpu_seconds(rows: dict[str, dict], name: str) -> float:
    """Of a result, with those of what it was tuned from."""
    before = rows[name.removesuffix(TUNED)]["cost"]["cpu_seconds"] if name.endswith(TUNED) else 0.0
    return before + rows[name]["cost"]["cpu_seconds"]


def compared(asked: argparse.Namespace, rows: dict[str, dict], bits: int) -> dict[str, dict]:
    """By peer, our best result beside it on the first text; of AutoRound the limit is for all numbers of iterations."""
    text, end = asked.judge[0].name, f"-{bits}bit"
    ours = [name for name in rows if name.removesuffix(TUNED).removesuffix(end) in asked.recipes and end in name]
    if not ours:
        return {}
    best = min(ours, key=lambda name: rows[name]["kl"][text])
    peers = [name for name in rows if name.endswith(end) and name not in ours]
    return {peer: _beside(rows, best, peer, text, LIMITS[bits]) for peer in peers}


def _beside(rows: dict[str, dict], ours: str, theirs: str, text: str, limit: float) -> dict:
    """KL and CPU seconds of ours over theirs."""
    ratio = rows[ours]["kl"][text] / rows[theirs]["kl"][text]
    cpu = cpu_seconds(rows, ours) / cpu_seconds(rows, theirs)
    return {"ours": ours, "kl_ratio": ratio, "cpu_ratio": cpu, "limit": limit, "met": ratio <= limit and cpu <= 1}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face folder of the original")
    parser.add_argument("--calibration", type=Path, required=True, help="text file that all runs calibrate on")
    parser.add_argument("--judge", type=Path, nargs="+", required=True, help="text files; the first one decides")
    parser.add_argument("--autoround-python", help="Python of the environment with AutoRound; ours alone without it")
    parser.add_argument("--llmcompressor-python", help="Python of the environment with llm-compressor")
    parser.add_argument("--iterations", type=int, nargs="+", default=[200], help="of AutoRound (default: 200)")
    parser.add_argument("--recipes", nargs="*", default=["gptq-w4", "awq-gptq-w4", "best-w4-light", "best-w4"])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2], choices=sorted(LIMITS))
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows (default: 32)")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens of all windows (default: 256)")
    parser.add_argument("--tuned", type=int, default=0, metavar="SAMPLES", help="windows to tune our results on")
    parser.add_argument("--tune-dtype", default="float32", choices=["float32", "bfloat16"], help="in which it runs")
    parser.add_argument("--windows", type=int, default=30, help="windows that judge (default: 30)")
    parser.add_argument("--reuse", type=Path, help="folder for the outputs; what was finished there is kept")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write")
    return parser.parse_args()


def main() -> None:
    """Run, judge, compare, write."""
    asked = arguments()
    with tempfile.TemporaryDirectory() as temporary:
        work = asked.reuse or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        tokens, rows = work / "tokens.json", {}
        write_tokens(asked, tokens)
        for bits in asked.bits:
            for recipe in asked.recipes:
                out = work / f"{recipe}-{bits}bit"
                rows[out.name] = run(asked, our_command(asked, recipe, bits, out), out)
                if asked.tuned:
                    after = out.with_name(f"{out.name}{TUNED}")
                    rows[after.name] = run(asked, tune_command(asked, out, after), after)
            for out, command in peer_commands(asked, bits, tokens, work):
                rows[out.name] = run(asked, command, out)
    conditions = {
        "scheme": f"groups of {asked.group_size}, {'asymmetric' if asked.asymmetric else 'symmetric'}",
        "calibration": f"{asked.samples} x {asked.sequence_length} tokens of {asked.calibration.name}",
        "judge": f"KL(original || quantized) of {asked.windows} windows of {asked.sequence_length} tokens",
        "peers": [versions(program) for program in (asked.autoround_python, asked.llmcompressor_python) if program],
    }
    bounds = {bits: row for bits in asked.bits if (row := compared(asked, rows, bits))}
    write_results(asked.output, {"conditions": conditions, "bounds": bounds, "tuned": gained(rows), "runs": rows})


if __name__ == "__main__":
    main()
