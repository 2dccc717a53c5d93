"""Compare what quantizing costs: CPU seconds and peak memory of whole processes; test that depth costs no memory."""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import protocol
from measure import measure
from random_llama import write_random_llama
from record import write_results
from runs import (
    OURS,
    PEERS,
    RECIPES,
    RUNS,
    SCHEME,
    Setup,
    add_arguments,
    cost_file,
    execute,
    quantize,
    select,
    setup_from,
)

CPU_LIMIT, PEAK_LIMIT, DEPTH_LIMIT = 0.5, 0.75, 1.1
DEPTH_FACTORS = (1, 4, 16)
COMPARED = [name for name in RUNS if RUNS[name].method in ("gptq", "awq")]


def bounds(costs: dict[str, dict]) -> list[dict]:
    """Our cost as a fraction of the cheapest peer's, for each method and symmetry that both sides ran."""
    found = []
    for method in ("gptq", "awq"):
        for symmetric in (True, False):
            runs = [RUNS[name] for name in costs]
            names = [run.name for run in runs if (run.method, run.symmetric) == (method, symmetric)]
            peers = [name for name in names if RUNS[name].tool in PEERS]
            ours = [name for name in names if RUNS[name].tool == OURS]
            if peers and ours:
                found.append(bound(costs, ours[0], peers, "cpu_seconds", CPU_LIMIT))
                found.append(bound(costs, ours[0], peers, "peak_bytes", PEAK_LIMIT))
    return found


def bound(costs: dict[str, dict], ours: str, peers: list[str], figure: str, limit: float) -> dict:
    """One figure of our run against the lowest of the peers'."""
    rival = min(peers, key=lambda name: costs[name][figure])
    ratio = costs[ours][figure] / costs[rival][figure]
    return {"bound": figure, "ours": ours, "theirs": rival, "ratio": ratio, "limit": limit, "met": ratio <= limit}


def depth_test(setup: Setup, recipe: str, samples: int, few: int | None) -> dict:
    """Our peak memory on random-weight Llamas of the model's shape with `few` blocks and DEPTH_FACTORS times as many.

    few: None for as many as the model has.
    """
    config = json.loads((setup.model / "config.json").read_text())
    few = few or config["num_hidden_layers"]
    costs = {
        factor * few: random_cost(setup, recipe, {**config, "num_hidden_layers": factor * few}, samples)
        for factor in DEPTH_FACTORS
    }
    peaks = [cost["peak_bytes"] for cost in costs.values()]
    ratio = max(peaks) / min(peaks)
    return {
        "recipe": recipe,
        "samples": samples,
        "blocks": costs,
        "ratio": ratio,
        "limit": DEPTH_LIMIT,
        "met": ratio < DEPTH_LIMIT,
    }


def random_cost(setup: Setup, recipe: str, config: dict, samples: int) -> dict:
    """What `recipe` costs on a random-weight model."""
    log = setup.outputs / f"random-{config['num_hidden_layers']}-blocks-{recipe}.log"
    with TemporaryDirectory(dir=setup.outputs) as folder:
        source, out = Path(folder, "source"), Path(folder, "out")
        write_random_llama(source, config, tokenizer_from=setup.model)
        arguments = quantize(recipe, True, source, setup.data_dir)
        arguments += ["--set", f"calibration.samples={samples}"]
        return measure([setup.programs[OURS], *arguments, "-o", str(out)], log, setup.environment)


def main() -> None:
    """Measure, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--skip-depth", action="store_true", help="leave out the test with more blocks")
    parser.add_argument("--depth-samples", type=int, default=32, help="calibration samples of that test (default: 32)")
    parser.add_argument("--depth-blocks", type=int, help="blocks of its smallest model (default: those of --model)")
    parser.add_argument("--only-depth", action="store_true", help="do only the test with more blocks")
    parser.add_argument("--depth-recipes", nargs="+", default=["gptq"], help="methods of that test (default: gptq)")
    parser.add_argument("--keep-ours", action="store_true", help="--reuse keeps our own finished runs, too")
    arguments = parser.parse_args()
    with setup_from(arguments) as setup:
        costs = {}
        for run in [] if arguments.only_depth else select(arguments.only, setup, default=COMPARED):
            kept = cost_file(run, setup)
            keep = arguments.keep_ours and arguments.reuse and kept.exists()
            costs[run.name] = json.loads(kept.read_text()) if keep else execute(run, setup)
            print(f"{run.name}: {costs[run.name]['cpu_seconds']:.0f} CPU seconds", flush=True)
        methods = [] if arguments.skip_depth else arguments.depth_recipes
        depth = [
            depth_test(setup, RECIPES[method], arguments.depth_samples, arguments.depth_blocks) for method in methods
        ]
        sections = {
            "protocol": {"scheme": SCHEME, **protocol.describe_calibration(setup.tokens), "threads": setup.threads},
            "bounds": bounds(costs),
            "depth": depth,
            "runs": costs,
        }
    write_results(arguments.output, sections)


if __name__ == "__main__":
    main()
