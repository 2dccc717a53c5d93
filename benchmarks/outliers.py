"""Compare remedies for activation outliers on SmolLM2 and on its stress model, with int8 weights and int8 inputs.

The stress model (scripts/stress_model.py) is the same function with six loud channels at the input of attention and MLP
of every block. Plain rounding should lose there; every remedy should come back to what the scheme costs without
outliers. llm-compressor (SmoothQuant, then GPTQ) and bitsandbytes (LLM.int8()) run on the same tokens.
"""

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import protocol
import torch
from measure import measure
from record import versions, write_results
from torch import nn
from transformers import AutoModelForCausalLM

from outlierq.load import load_model, open_checkpoint

SCRIPTS = Path(__file__).parents[1] / "scripts"
PEERS = Path(__file__).parent / "peers"
PLAIN, PEER = "w8a8-rtn", "llmcompressor-w8a8"
RECOVERY_LIMIT, PEER_LIMIT, LOSS = 1.25, 0.9, 2.0

# Name -> (recipe, settings). `w8a8-rtn` is what LLM.int8() rounds, without its split: the plain scheme.
RUNS = {
    PLAIN: ("llm-int8", ("export.format=compressed-tensors",)),
    "smoothquant": ("smoothquant-w8a8", ()),
    "os-plus": ("os-plus-w8a8", ()),
    "auto": ("auto-w8a8", ()),
    "rotate": ("rotate-w8a8", ()),
    "int8-split": ("int8-split", ()),
    "llm-int8": ("llm-int8", ()),
    "w8a8-dynamic": ("w8a8-dynamic", ()),
    "w8a8-static": ("w8a8-static", ()),
    "fp8-dynamic": ("fp8-dynamic", ()),
    "fp8-block": ("fp8-block", ()),
    "mxfp8": ("mxfp8", ()),
    "w4a8": ("w4a8", ()),
    "rotate-w4a8": ("rotate-w4a8", ()),
    "rotate-w4a4": ("rotate-w4a4", ()),
}
REMEDIES = ("smoothquant", "os-plus", "rotate", "int8-split")
# Not int8 throughout, as the peer is: FP8, outlier columns in 16 bits, fewer bits.
OTHER = ("fp8-dynamic", "fp8-block", "mxfp8", "int8-split", "llm-int8", "w4a8", "rotate-w4a8", "rotate-w4a4")
MODELS = ("plain", "stressed")
# These change the model first, so statistics of the original do not fit, or try something out on it.
OWN_CALIBRATION = ("rotate", "int8-split", "rotate-w4a8", "rotate-w4a4")


def make_models(arguments: argparse.Namespace) -> dict[str, Path]:
    """The original, and its stress model, made when it is not there yet."""
    stressed = arguments.reuse / "stressed"
    if not stressed.exists():
        command = [sys.executable, str(SCRIPTS / "stress_model.py"), str(arguments.model), str(stressed)]
        subprocess.run([*command, "--channels", "6", "--factor", "60"], check=True)
    return {"plain": arguments.model, "stressed": stressed}


def calibration(arguments: argparse.Namespace) -> list[str]:
    """The calibration tokens as settings: the first windows of the text, as the peers get them."""
    return [
        f"calibration.text={arguments.data_dir / protocol.CALIBRATION_TEXT}",
        f"calibration.samples={protocol.CALIBRATION_SAMPLES}",
        f"calibration.sequence_length={protocol.SEQUENCE_LENGTH}",
        "calibration.seed=null",
    ]


def statistics(model: Path, folder: Path, arguments: argparse.Namespace) -> Path:
    """One calibration that all recipes of this model share."""
    if not folder.exists():
        options = [word for setting in calibration(arguments) for word in ("--set", setting)]
        command = [arguments.outlierq, "calibrate", str(model), "-o", str(folder), "--recipe", "w8a8-static", *options]
        subprocess.run(command, check=True)
    return folder


def quantize(name: str, model: Path, out: Path, stats: Path, arguments: argparse.Namespace) -> dict:
    """Make one checkpoint of ours and return its cost."""
    recipe, settings = RUNS[name]
    command = [arguments.outlierq, "quantize", str(model), "--recipe", recipe, "-o", str(out)]
    shown = subprocess.run([arguments.outlierq, "recipes", "show", recipe], check=True, capture_output=True, text=True)
    if "\ncalibration:" in shown.stdout:
        command += ["--stats", str(stats)] if name not in OWN_CALIBRATION else []
        settings = (*settings, *calibration(arguments))
    command += [word for setting in settings for word in ("--set", setting)]
    for stale in (out, out.with_name(f"{out.name}.partial")):
        shutil.rmtree(stale, ignore_errors=True)
    return measure(command, out.with_suffix(".log"), {"OMP_NUM_THREADS": str(arguments.threads)})


def load(folder: Path) -> nn.Module:
    """A float32 model that rounds its inputs as its format says: by transformers where it can, else by outlierq."""
    config = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    if config.get("quant_method", "compressed-tensors") == "compressed-tensors":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return load_model(open_checkpoint(str(folder)), dtype="float32")


def ours(arguments: argparse.Namespace, models: dict[str, Path]) -> dict[str, dict]:
    """Every recipe on both models: name/model -> quality and cost."""
    results = {}
    for kind in MODELS:
        for name in RUNS:
            kept = arguments.reuse / f"outlierq-{name}-{kind}.{arguments.windows}-windows.json"
            if f"{name}/{kind}" in arguments.only or not (arguments.only or kept.exists()):
                result = one_of_ours(name, kind, models[kind], arguments)
                kept.write_text(json.dumps(result, indent=2) + "\n")
                print(f"{name}/{kind}: KL {result['kl']:.5f}", flush=True)
            if kept.exists():
                results[f"{name}/{kind}"] = json.loads(kept.read_text())
    return results


def one_of_ours(name: str, kind: str, model: Path, arguments: argparse.Namespace) -> dict:
    """Quality and cost of one recipe on one model."""
    stats = statistics(model, arguments.reuse / f"{kind}-statistics", arguments)
    out = arguments.reuse / f"outlierq-{name}-{kind}"
    cost = quantize(name, model, out, stats, arguments)
    test = protocol.test_windows(arguments.model, arguments.data_dir, arguments.windows)
    return {**asdict(protocol.compare(load(model), load(out), test)), "cost": cost}


def peers(arguments: argparse.Namespace, models: dict[str, Path]) -> dict[str, dict]:
    """llm-compressor's checkpoint (kept when it is there) and bitsandbytes on both models, of those that are given."""
    results = {}
    test = protocol.test_windows(arguments.model, arguments.data_dir, arguments.windows)
    kept = arguments.reuse / PEER
    if arguments.llmcompressor_python and not kept.exists():
        tokens = arguments.reuse / "calibration-tokens.json"
        protocol.write_calibration(arguments.model, arguments.data_dir, tokens)
        script = [str(PEERS / "llmcompressor_run.py"), str(arguments.model), str(tokens), str(kept)]
        measure([arguments.llmcompressor_python, *script, "--method", "w8a8"], kept.with_suffix(".log"))
    if arguments.llmcompressor_python:
        results[PEER] = asdict(protocol.compare(load(arguments.model), load(kept), test))
    for kind in MODELS if arguments.bitsandbytes_python else ():
        script = [str(PEERS / "bitsandbytes_int8.py"), str(models[kind]), "--data-dir", str(arguments.data_dir)]
        command = [arguments.bitsandbytes_python, *script, "--windows", str(arguments.windows)]
        shown = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(shown.stdout)
        results[f"bitsandbytes/{kind}"] = {
            key: found[key] for key in ("kl", "perplexity", "top1_agreement", "versions")
        }
    for name, result in results.items():
        print(f"{name}: KL {result['kl']:.5f}", flush=True)
    return results


def bounds(kl: dict[str, float]) -> list[dict]:
    """What must hold, as ratios of KL; only where both figures are there."""
    base = f"{PLAIN}/plain"
    wanted = [("plain rounding loses on the stress model", f"{PLAIN}/stressed", base, LOSS, "at least")]
    wanted += [(f"{name} recovers", f"{name}/stressed", base, RECOVERY_LIMIT, "at most") for name in REMEDIES]
    candidates = [f"{name}/plain" for name in RUNS if f"{name}/plain" in kl and name not in OTHER]
    if candidates:
        best = min(candidates, key=kl.get)
        wanted.append(("best W8A8 beside llm-compressor", best, PEER, PEER_LIMIT, "at most"))
    wanted.append(("static split beside bitsandbytes", "int8-split/stressed", "bitsandbytes/stressed", 1.0, "at most"))
    found = []
    for title, left, right, limit, sense in wanted:
        if left in kl and right in kl:
            ratio = kl[left] / kl[right]
            met = ratio >= limit if sense == "at least" else ratio <= limit
            entry = {
                "bound": title,
                "of": left,
                "to": right,
                "ratio": ratio,
                sense.replace(" ", "_"): limit,
                "met": met,
            }
            found.append(entry)
    return found


def measured_before(output: Path, section: dict) -> dict:
    """What an earlier output holds, when its texts and models were the same."""
    found = json.loads(output.read_text()) if output.exists() else {"protocol": {}}
    same = all(found["protocol"].get(key) == section[key] for key in ("stress_model", "calibration", "evaluation"))
    return found if same else {}


def main() -> None:
    """Make, evaluate, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with the WikiText-2 raw texts")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder of the original, in bf16")
    parser.add_argument("--outlierq", default=str(Path(sys.executable).with_name("outlierq")), help="our command")
    parser.add_argument("--llmcompressor-python", help="Python of the environment with llm-compressor")
    parser.add_argument("--bitsandbytes-python", help="Python of the environment with bitsandbytes")
    parser.add_argument(
        "--only",
        nargs="+",
        default=(),
        metavar="NAME",
        help="make these anew (os-plus/plain ...), and no others",
    )
    parser.add_argument("--reuse", type=Path, required=True, help="folder for outputs; finished runs there are kept")
    parser.add_argument("--windows", type=int, default=16, help="test windows of 512 tokens (default: 16)")
    parser.add_argument("--threads", type=int, default=2, help="OMP_NUM_THREADS of our runs (default: 2)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    arguments.reuse.mkdir(parents=True, exist_ok=True)
    models = make_models(arguments)
    section = {
        "scheme": "int8 weights per output row, int8 inputs per token; static, FP8 and 4 bits where the name says so",
        "stress_model": "6 channels x 60",
        "calibration": f"{protocol.CALIBRATION_SAMPLES} x {protocol.SEQUENCE_LENGTH} tokens, first of the text",
        "evaluation": f"KL(original || quantized), {arguments.windows} windows of {protocol.TEST_TEXT}, float32",
    }
    before = measured_before(arguments.output, section)
    results = {**before.get("runs", {}), **ours(arguments, models), **peers(arguments, models)}
    kl = {name: result["kl"] for name, result in results.items()}
    sections = {"protocol": section, "bounds": bounds(kl), "runs": results}
    if arguments.llmcompressor_python:
        sections["peer_versions"] = versions(arguments.llmcompressor_python)
    elif "peer_versions" in before:
        sections["peer_versions"] = before["peer_versions"]
    write_results(arguments.output, sections)


if __name__ == "__main__":
    main()
