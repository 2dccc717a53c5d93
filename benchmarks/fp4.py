"""Weights and inputs in 4-bit floats: what each recipe loses, beside plain rounding to the same grids.

    python benchmarks/fp4.py MODEL --calibration TEXT --judge TEXT [--other TEXT ...] --name NAME

Plain rounding takes the scale that just holds each block, and for inputs the unit of the largest value of the
calibration: what llm-compressor's `QuantizationModifier(scheme="NVFP4")` and `"MXFP4"` do. It is done by outlierq, not
by running the peer: rounding of inputs is held against compressed-tensors bit for bit (tests/test_block_inputs.py), and
of NVFP4 weights the unit differs (1024 here, 2688 / max|w| there), which moves E4M3 scales by less than their last bit.
Plain GPTQ is the peer's, too: columns by falling diagonal, scales that just hold each block, every token counted once.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import yaml
from record import write_results

import outlierq
from outlierq.recipe import load

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
SHIPPED = ("nvfp4-w4a4", "auto-nvfp4", "mxfp4-w4a4", "auto-mxfp4", "mxfp4-w4a8", "mxfp8", "w4afp8")
CLAIMS = {  # name -> (run, beside, the most that the ratio of their KL may be)
    "NVFP4 W4A4 against plain rounding": ("nvfp4-w4a4", "nvfp4 rtn w4a4", 0.5),
    "NVFP4 W4A4 against plain GPTQ": ("nvfp4-w4a4", "nvfp4 plain gptq w4a4", 0.7),
    "MXFP4 W4A4 against plain rounding": ("mxfp4-w4a4", "mxfp4 rtn w4a4", 0.5),
    "auto-nvfp4 against plain rounding": ("auto-nvfp4", "nvfp4 rtn w4a4", 0.75),
    "auto-mxfp4 against plain rounding": ("auto-mxfp4", "mxfp4 rtn w4a4", 0.75),
    "NVFP4 W4A16 against plain rounding": ("nvfp4 gptq w4a16", "nvfp4 rtn w4a16", 0.6),
    "MXFP4 W4A16 against plain rounding": ("mxfp4 gptq w4a16", "mxfp4 rtn w4a16", 0.6),
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


def run(asked: argparse.Namespace, name: str, recipe: str, work: Path) -> dict[str, Any]:
    """Compress and measure. kl: on the judge's text, then on the others."""
    settings = {}
    if load(recipe).calibration is not None:
        settings = {
            "calibration.text": asked.calibration,
            "calibration.samples": asked.samples,
            "calibration.sequence_length": asked.sequence_length,
        }
    with tempfile.TemporaryDirectory(dir=work) as place:
        out = Path(place) / "out"
        report = outlierq.quantize(asked.model, recipe, out=out, settings=settings, device="cpu")
        kls = [
            outlierq.evaluate(
                out, asked.model, text=text, windows=asked.windows, window_length=asked.window_length, device="cpu"
            ).kl
            for text in (asked.judge, *asked.other)
        ]
    bits = [row.bits for row in report.rows]
    print(f"{name}: KL {', '.join(f'{kl:.4f}' for kl in kls)}", flush=True)
    return {"kl": kls, "bytes": report.output_bytes, "linears_in_8_bits": bits.count(8), "linears_rounded": len(bits)}


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
    asked = parser.parse_args()
    result = RESULTS / f"fp4-{asked.name}.json"
    before = json.loads(result.read_text())["runs"] if asked.only and result.exists() else {}
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        recipes = {n: recipe for n, recipe in made_recipes(work).items() if not asked.only or n in asked.only}
        rows = before | {name: run(asked, name, recipe, work) for name, recipe in recipes.items()}
    claims = {
        what: {"ratio": rows[ours]["kl"][0] / rows[theirs]["kl"][0], "at_most": most}
        for what, (ours, theirs, most) in CLAIMS.items()
        if ours in rows and theirs in rows
    }
    for what, claim in claims.items():
        print(f"{what}: {claim['ratio']:.2f} (at most {claim['at_most']})")
    conditions = {key: value for key, value in vars(asked).items() if key not in ("model", "only")}
    conditions |= {key: Path(conditions[key]).name for key in ("calibration", "judge")}
    conditions["other"] = [Path(text).name for text in asked.other]
    write_results(result, {"conditions": conditions, "runs": rows, "claims": claims})


if __name__ == "__main__":
    main()
