"""What `outlierq fit` promises and what comes of it: predicted beside measured KL, and KL at equal bytes.

    python benchmarks/fit.py MODEL --calibration TEXT --judge TEXT [--other TEXT ...] --name NAME

First, for the bytes of each of some uniform recipes: the KL of that recipe, of the best uniform one that is no larger,
and of the mixture that `fit` finds for the same bytes, on the judge's text and on others. Then random assignments of
schemes to layers: median relative error of the predicted KL, and rank correlation. One calibration serves all, and
each part is written when it is done.
"""

import argparse
import random
import statistics
import tempfile
from pathlib import Path

from record import write_results

import outlierq
from outlierq.core.errors import ArgumentError
from outlierq.load import open_checkpoint
from outlierq.pipeline.fitting.space import predicted, space_of
from outlierq.pipeline.fitting.written import recipe_text
from outlierq.recipe import given

RESULTS = Path(__file__).parent / "results"
UNIFORM = {
    f"{bits}-bit g{group} {'symmetric' if symmetric else 'asymmetric'}": (bits, group, symmetric)
    for bits in (3, 4)
    for group in (32, 64, 128)
    for symmetric in (True, False)
}
MIXES = [(3, 4, 5), (4, 5, 6), (3, 4), (2, 3, 4, 5, 6), (3, 4, 5, 6), (4, 5)]  # bits from which one assignment draws


def ranks(values: list[float]) -> list[float]:
    """The place of each value in order."""
    order = sorted(range(len(values)), key=values.__getitem__)
    places = [0.0] * len(values)
    for place, at in enumerate(order):
        places[at] = float(place)
    return places


def random_assignments(asked: argparse.Namespace, work: Path, stats: Path) -> dict:
    """Predicted and measured KL of random mixtures of integers."""
    checkpoint, base = open_checkpoint(asked.model), given("gptq-w4")
    space = space_of(checkpoint, base, "transformers", ["int2", "int3", "int4", "int5", "int6"])
    prediction = predicted(space, stats)
    draw, rows = random.Random(asked.seed), []
    for number in range(asked.assignments):
        bits = MIXES[number % len(MIXES)]
        held = [sorted((s for s in losses if s), key=str) for losses in prediction.losses]
        chosen = [draw.choice([s for s in schemes if s.bits in bits] or schemes) for schemes in held]
        loss = sum(losses[storage] for losses, storage in zip(prediction.losses, chosen, strict=True))
        recipe = work / "random.yaml"
        recipe.write_text(recipe_text(base, space.layers, chosen, ""))
        rows.append({"predicted": loss, "measured": compressed_kl(asked, recipe, stats, work, asked.judge)[0]})
        print(f"{number}: predicted {loss:.5f}, measured {rows[-1]['measured']:.5f}", flush=True)
    measured, foretold = ([row[name] for row in rows] for name in ("measured", "predicted"))
    return {
        "in_nats": prediction.in_nats,
        "median_relative_error": statistics.median(abs(row["predicted"] / row["measured"] - 1) for row in rows),
        "median_ratio": statistics.median(row["predicted"] / row["measured"] for row in rows),
        "rank_correlation": statistics.correlation(ranks(foretold), ranks(measured)),
        "rows": rows,
    }


def compressed_kl(
    asked: argparse.Namespace, recipe: Path | str, stats: Path, work: Path, *texts: str, settings: dict | None = None
) -> list[float]:
    """Compress by a recipe and measure the KL on some texts."""
    with tempfile.TemporaryDirectory(dir=work) as place:
        out = Path(place) / "out"
        outlierq.quantize(asked.model, recipe, out=out, stats=stats, settings=settings, device="cpu")
        return [
            outlierq.evaluate(
                out, asked.model, text=text, windows=asked.windows, window_length=asked.window_length, device="cpu"
            ).kl
            for text in texts
        ]


def uniform(asked: argparse.Namespace, work: Path, stats: Path) -> dict[str, dict]:
    """Bytes and KL of every uniform recipe."""
    rows = {}
    for name, (bits, group, symmetric) in UNIFORM.items():
        if asked.only not in name:
            continue
        settings = {"quantize.bits": bits, "quantize.group_size": group, "quantize.symmetric": symmetric}
        size = outlierq.plan(asked.model, "gptq-w4", settings=settings).output_bytes
        kls = compressed_kl(asked, "gptq-w4", stats, work, asked.judge, *asked.other, settings=settings)
        rows[name] = {"bits": bits, "bytes": size, "kl": kls}
        print(name, size, kls, flush=True)
    return rows


def at_equal_bytes(asked: argparse.Namespace, work: Path, stats: Path) -> dict:
    """The mixture of `fit` beside the best uniform recipe of no more bytes, for each number of bits."""
    plain, rows = uniform(asked, work, stats), []
    for bits in sorted({row["bits"] for row in plain.values()}):
        for name, row in plain.items():
            if row["bits"] != bits:
                continue
            rivals = [other for other in plain.values() if other["bytes"] <= row["bytes"]]
            best = min(rivals, key=lambda other: other["kl"][0])
            for client in asked.client:
                try:
                    fitted = outlierq.fit(asked.model, stats=stats, size=row["bytes"], client=client, device="cpu")
                except ArgumentError as error:  # a client without numbers of so few bits
                    rows.append({"bytes_of": name, "bytes": row["bytes"], "client": client, "refused": error.what})
                    continue
                recipe = work / "fitted.yaml"
                recipe.write_text(fitted.text)
                kls = compressed_kl(asked, recipe, stats, work, asked.judge, *asked.other)
                rows.append(
                    {
                        "bytes_of": name, "bytes": row["bytes"], "client": client,
                        "fitted_bytes": fitted.plan.output_bytes, "predicted": fitted.loss, "kl": kls,
                        "best_uniform_kl": best["kl"],
                        "ratio": [ours / theirs for ours, theirs in zip(kls, best["kl"], strict=True)],
                    }
                )  # fmt: skip
                print(rows[-1], flush=True)
    return {"uniform": plain, "fitted": rows}


def conditions_of(asked: argparse.Namespace) -> dict:
    """What was asked for, texts by their names."""
    conditions = {name: value for name, value in vars(asked).items() if name not in ("model", "stats")}
    texts = {name: Path(conditions[name]).name for name in ("calibration", "judge")}
    conditions |= texts | {"other": [Path(text).name for text in asked.other]}
    return conditions


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
    parser.add_argument("--assignments", type=int, default=30)
    parser.add_argument("--client", action="append", help="that fit is asked for [transformers]")
    parser.add_argument(
        "--only", default="", help="uniform recipes whose name holds this: g64, 3-bit; a real model's time"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stats", help="a folder of statistics with sensitivities, to keep or to take again")
    asked = parser.parse_args()
    asked.client = asked.client or ["transformers"]
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        stats = Path(asked.stats) if asked.stats else work / "stats"
        outlierq.calibrate(
            asked.model, out=stats, text=[asked.calibration], samples=asked.samples,
            sequence_length=asked.sequence_length, sensitivity=True, device="cpu",
        )  # fmt: skip
        result = {}
        for name, part in (("equal_bytes", at_equal_bytes), ("assignments", random_assignments)):
            result[name] = part(asked, work, stats)
            write_results(RESULTS / f"fit-{asked.name}.json", {"conditions": conditions_of(asked), **result})


if __name__ == "__main__":
    main()
