"""Keys and values in fewer bits: what each cache of a server costs a model, before and after the exact transforms.

    python benchmarks/kv_cache.py MODEL --calibration TEXT --judge TEXT --name NAME

The transforms change no function: channels of keys over the root of their size as calibration saw it (`even_keys`),
values turned head by head (`rotate`). Caches are those of `--kv-cache-dtype`: a scale for each token and head, which a
server makes itself, and FP8 with one calibrated scale for each tensor (`kv-fp8`).
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from record import write_results

import outlierq

RESULTS = Path(__file__).parent / "results"
CACHES = ("fp8", "int8", "int4", "nvfp4")
VALUES = {"method": "rotate", "residual": False}


def transforms(stats: Path) -> dict[str, list[dict[str, Any]]]:
    """Steps of the recipe by name."""
    keys = {"method": "even_keys", "stats_folder": str(stats)}
    return {"keys even": [keys], "values turned": [VALUES], "both": [VALUES, keys]}


def figures(asked: argparse.Namespace, model: str, work: Path) -> dict[str, Any]:
    """KL of a model through every cache, and the flag that follows."""
    sizes = {"windows": asked.windows, "window_length": asked.window_length, "device": "cpu"}
    study = outlierq.study_caches(model, only=CACHES, text=asked.judge, **sizes)
    scaled = work / f"kv-fp8-of-{Path(model).name}"
    outlierq.quantize(model, "kv-fp8", out=scaled, settings=settings(asked), device="cpu")
    kl = {row.name: row.kl for row in study.rows}
    kl["fp8, a scale per tensor"] = outlierq.evaluate(scaled, model, text=asked.judge, **sizes).kl
    return {"kl": kl, "advice": study.advice}


def settings(asked: argparse.Namespace) -> dict[str, Any]:
    """Of the calibration, for recipes that have one."""
    return {
        "calibration.text": asked.calibration,
        "calibration.samples": asked.samples,
        "calibration.sequence_length": asked.window_length,
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, help="text that sizes of keys and scales come from")
    parser.add_argument("--judge", required=True, help="text to measure on")
    parser.add_argument("--name", required=True, help="of the result")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window-length", type=int, default=256)
    parser.add_argument("--only", action="append", help="a state of the model: plain, keys even, values turned, both")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        text = {"text": asked.calibration, "samples": asked.samples, "sequence_length": asked.window_length}
        outlierq.calibrate(asked.model, out=work / "stats", device="cpu", **text)
        rows = {}
        for name, steps in ({"plain": []} | transforms(work / "stats")).items():
            if asked.only and name not in asked.only:
                continue
            model = asked.model
            if steps:
                model = str(work / name.replace(" ", "-"))
                outlierq.quantize(asked.model, "dense", out=model, settings={"transform": steps}, device="cpu")
            rows[name] = figures(asked, model, work)
            print(name, {cache: f"{kl:.5f}" for cache, kl in rows[name]["kl"].items()}, flush=True)
    conditions = {key: value for key, value in vars(asked).items() if key not in ("model", "only")}
    conditions |= {key: Path(conditions[key]).name for key in ("calibration", "judge")}
    write_results(RESULTS / f"kv_cache-{asked.name}.json", {"conditions": conditions, "models": rows})


if __name__ == "__main__":
    main()
