"""Weights and inputs in 4-bit floats: what each recipe loses, beside plain rounding to the same grids.

    python benchmarks/fp4.py MODEL --calibration TEXT --judge TEXT [--other TEXT ...] --name NAME \\
        [--llmcompressor-python PYTHON]

Plain rounding takes the scale that just holds each block, and for inputs the unit of the largest value of the
calibration: what llm-compressor's `QuantizationModifier(scheme="NVFP4")` and `"MXFP4"` do. Plain GPTQ is the peer's,
too: columns by falling diagonal, scales that just hold each block, every token counted once. With the Python of its
environment llm-compressor runs itself, on the same tokens, and its files are judged as ours are: rounding of inputs is
held against compressed-tensors bit for bit (tests/test_block_inputs.py). `--stressed` adds the same function with six
channels 64 times as large at the input of attention and MLP of every block (scripts/stress_model.py).
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml
from measure import measure
from record import versions, write_results

import outlierq
from outlierq.calibrate.text.windows import token_windows
from outlierq.load import load_tokenizer, open_checkpoint
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.quantize import quantize
from outlierq.recipe import Calibration, load
from outlierq.testing.stress import stressed

RESULTS = Path(__file__).parent / "results"
GRIDS: dict[str, dict[str, Any]] = {
    "nvfp4": {"kind": "float", "bits": 4, "group_size": 16, "scales": "two-level"},
    "mxfp4": {"kind": "float", "bits": 4, "group_size": 32, "scales": "power-of-two"},
}
INPUTS = {
    "nvfp4": {"kind": "float", "bits": 4, "per": "group", "scales": "two-level", "dynamic": False},
    "mxfp4": {"kind": "float", "bits": 4, "per": "group", "scales": "power-of-two"},
}
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn", "scale_search": "minmax"},
    "plain gptq": {"method": "gptq", "scale_search": "minmax", "refine_passes": 0},
    "gptq": {"method": "gptq", "refine_passes": 1},
}
SINK_WEIGHT = {"rtn": 1, "plain gptq": 1, "gptq": 16}
W4A4 = ("nvfp4-w4a4", "auto-nvfp4", "best-nvfp4", "mxfp4-w4a4", "auto-mxfp4", "best-mxfp4")
SHIPPED = (*W4A4, "mxfp4-w4a8", "mxfp8", "w4afp8")
ROTATED = {"transform": "[{method: rotate, residual: true, values: true}]"}
STRESSED, CHANNELS, FACTOR = "stressed ", 6, 64.0
PEER = "llm-compressor "
PEERS = {
    f"{PEER}nvfp4 rtn": ("--scheme", "NVFP4", "--method", "rtn"),
    f"{PEER}nvfp4 gptq": ("--scheme", "NVFP4", "--method", "gptq"),
    f"{PEER}mxfp4 rtn": ("--scheme", "MXFP4", "--method", "rtn"),
    f"{PEER}mxfp4 gptq": ("--scheme", "MXFP4", "--method", "gptq"),
}
# name -> (run, beside, the most that the ratio of their KL may be)
CLAIMS = {
    "NVFP4 W4A16 against plain rounding": ("nvfp4 gptq w4a16", "nvfp4 rtn w4a16", 0.6),
    "MXFP4 W4A16 against plain rounding": ("mxfp4 gptq w4a16", "mxfp4 rtn w4a16", 0.6),
}
for _recipe in W4A4:
    _kind = "nvfp4" if "nvfp4" in _recipe else "mxfp4"
    _most = 0.75 if _recipe.startswith("auto") else 0.5
    CLAIMS |= {
        f"{_recipe} against plain rounding": (_recipe, f"{_kind} rtn w4a4", _most),
        f"{_recipe} against plain GPTQ": (_recipe, f"{_kind} plain gptq w4a4", 0.7),
        f"{_recipe} against llm-compressor's rounding": (_recipe, f"{PEER}{_kind} rtn", _most),
        f"{_recipe} against llm-compressor's GPTQ": (_recipe, f"{PEER}{_kind} gptq", 0.7),
        f"{_recipe} rotated, on the stress model, against {_recipe}": (f"{STRESSED}{_recipe} rotated", _recipe, 1.25),
    }


def made_recipes(folder: Path) -> dict[str, str]:
    """Recipes by name: each grid by each method, with inputs rounded or not, and those that are shipped."""
    recipes = {}
    for grid, storage in GRIDS.items():
        for method, rounding in METHODS.items():
            for inputs in ("w4a4", "w4a16"):
                name = f"{grid} {method} {inputs}"
                quantize = {**rounding, **storage} | ({"activations": INPUTS[grid]} if inputs == "w4a4" else {})
                text = {"calibration": {"sink_weight": SINK_WEIGHT[method]}, "quantize": quantize}
                recipes[name] = str(folder / f"{name.replace(' ', '-')}.yaml")
                Path(recipes[name]).write_text(yaml.safe_dump(text, sort_keys=False))
    return recipes | {name: name for name in SHIPPED}


def stressed_runs(recipes: dict[str, str]) -> dict[str, str]:
    """On the stress model: plain rounding, and our recipes with and without a rotation before them."""
    plain = {f"{STRESSED}{grid} rtn w4a4": recipes[f"{grid} rtn w4a4"] for grid in GRIDS}
    return plain | {f"{STRESSED}{name}{how}": name for name in ("nvfp4-w4a4", "mxfp4-w4a4") for how in ("", " rotated")}


def made(asked: argparse.Namespace, name: str, recipe: str, out: Path) -> dict[str, Any]:
    """Compress by a recipe of ours. What the report counts."""
    settings = ROTATED if name.endswith(" rotated") else {}
    if load(recipe).calibration is not None:
        settings = settings | {
            "calibration.text": asked.calibration,
            "calibration.samples": asked.samples,
            "calibration.sequence_length": asked.sequence_length,
        }
    source = asked.stress_model if name.startswith(STRESSED) else asked.model
    report = outlierq.quantize(source, recipe, out=out, settings=settings, device="cpu")
    bits = [row.bits for row in report.rows]
    return {"bytes": report.output_bytes, "linears_in_8_bits": bits.count(8), "linears_rounded": len(bits)}


def made_by_peer(asked: argparse.Namespace, words: tuple[str, ...], out: Path) -> dict[str, Any]:
    """Compress by llm-compressor in a process of its own, on the windows that our recipes are given. Its cost."""
    tokenizer, tokens = load_tokenizer(open_checkpoint(asked.model)), out.with_name("tokens.json")
    sizes = {"samples": asked.samples, "sequence_length": asked.sequence_length, "seed": Calibration().seed}
    tokens.write_text(json.dumps(token_windows(tokenizer, asked.calibration, **sizes).ids.tolist()) + "\n")
    source = shutil.copytree(asked.model, out.with_name("source"))
    tokenizer.save_pretrained(source)  # it may lack what reads the original file
    script = str(Path(__file__).parent / "peers" / "llmcompressor_run.py")
    command = [asked.llmcompressor_python, script, str(source), str(tokens), str(out), *words]
    cost = measure(command, out.with_name("peer.log"), {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    for file in [*out.glob("tokenizer*"), *out.glob("special_tokens*")]:
        file.unlink()
    for file in Path(asked.model).glob("*token*"):
        shutil.copy(file, out)
    return {"cpu_seconds": cost["cpu_seconds"]}


def run(asked: argparse.Namespace, name: str, recipe: str, work: Path) -> dict[str, Any]:
    """Compress and measure. kl: on the judge's text, then on the others."""
    with tempfile.TemporaryDirectory(dir=work) as place:
        out = Path(place) / "out"
        facts = made_by_peer(asked, PEERS[name], out) if name in PEERS else made(asked, name, recipe, out)
        kls = [
            outlierq.evaluate(
                out, asked.model, text=text, windows=asked.windows, window_length=asked.window_length, device="cpu"
            ).kl
            for text in (asked.judge, *asked.other)
        ]
    print(f"{name}: KL {', '.join(f'{kl:.4f}' for kl in kls)}", flush=True)
    return {"kl": kls, **facts}


def stress(model: str, out: Path) -> str:
    """Write the stress model of a model."""
    checkpoint = stressed(open_checkpoint(model), CHANNELS, FACTOR)
    quantize(make_plan(checkpoint, load("dense")), out)
    return str(out)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, help="text to calibrate on")
    parser.add_argument("--judge", required=True, help="text to measure on")
    parser.add_argument("--other", action="append", default=[], help="text of another kind to measure on, too")
    parser.add_argument("--name", required=True, help="of the result")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--only", action="append", help="runs to make anew; other rows of the result stay [all]")
    parser.add_argument("--llmcompressor-python", help="Python of the environment with llm-compressor")
    parser.add_argument("--stressed", action="store_true", help="the stress model, too")
    asked = parser.parse_args()
    result = RESULTS / f"fp4-{asked.name}.json"
    before = json.loads(result.read_text())["runs"] if asked.only and result.exists() else {}
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        recipes = made_recipes(work)
        recipes |= stressed_runs(recipes) if asked.stressed else {}
        recipes |= dict.fromkeys(PEERS, "") if asked.llmcompressor_python else {}
        asked.stress_model = stress(asked.model, work / "stressed") if asked.stressed else None
        recipes = {name: recipe for name, recipe in recipes.items() if not asked.only or name in asked.only}
        rows = dict(before)
        for name, recipe in recipes.items():
            rows[name] = run(asked, name, recipe, work)
            write_results(result, {"conditions": conditions(asked), "runs": rows, "claims": claims(rows)})
    for what, claim in claims(rows).items():
        print(f"{what}: {claim['ratio']:.2f} (at most {claim['at_most']})")


def claims(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The ratio of every claim whose two runs are there, and the most that it may be."""
    return {
        what: {"ratio": rows[ours]["kl"][0] / rows[theirs]["kl"][0], "at_most": most}
        for what, (ours, theirs, most) in CLAIMS.items()
        if ours in rows and theirs in rows
    }


def conditions(asked: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on, without paths."""
    programs = ("model", "only", "llmcompressor_python", "stressed", "stress_model")
    said = {key: value for key, value in vars(asked).items() if key not in programs}
    if asked.llmcompressor_python:
        said["peer"] = versions(asked.llmcompressor_python)
    said |= {key: Path(said[key]).name for key in ("calibration", "judge")}
    return said | {"other": [Path(text).name for text in asked.other]}


if __name__ == "__main__":
    main()
