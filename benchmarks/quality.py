"""Compare 4-bit checkpoints of outlierq, llm-compressor and GPTQModel: same model, tokens, scheme and evaluation.

KL against the original on WikiText-2 test decides; perplexity and top-1 agreement are reported beside it.
"""

import argparse
import json
from dataclasses import asdict

import protocol
from decode import load_dense
from record import write_results
from runs import OURS, PEERS, RUNS, SCHEME, Run, Setup, add_arguments, execute, keeps, select, setup_from
from torch import Tensor, nn

GPTQ_LIMIT, AWQ_LIMIT, BEST_LIMIT = 0.75, 0.85, 0.55


def evaluate(run: Run, setup: Setup, reference: nn.Module, test: Tensor) -> dict:
    """Compare the checkpoint of `run` with the original, or return the figures that `--reuse` keeps."""
    kept = setup.outputs / f"{run.name}.{len(test)}-windows.json"
    if keeps(run, setup) and kept.exists():
        return json.loads(kept.read_text())
    quality = asdict(protocol.compare(reference, load_dense(setup.outputs / run.name), test))
    kept.write_text(json.dumps(quality, indent=2) + "\n")
    return quality


def bounds(kl: dict[str, float]) -> list[dict]:
    """Every bound whose figures are there: our KL as a fraction of theirs, and whether it is low enough."""
    found = []
    for symmetry in ("sym", "asym"):
        theirs = [f"{tool}-gptq-{symmetry}" for tool in PEERS]
        found.append(bound(f"GPTQ, {symmetry}", kl, [f"{OURS}-gptq-{symmetry}"], theirs, GPTQ_LIMIT))
        theirs = [f"llmcompressor-{method}-{symmetry}" for method in ("awq", "awq-both")]
        found.append(bound(f"AWQ, {symmetry}", kl, [f"{OURS}-awq-{symmetry}"], theirs, AWQ_LIMIT))
    ours = [name for name in RUNS if RUNS[name].tool == OURS]
    theirs = [name for name in RUNS if RUNS[name].tool in PEERS]
    found.append(bound("best recipe", kl, ours, theirs, BEST_LIMIT))
    return [entry for entry in found if entry]


def bound(title: str, kl: dict[str, float], ours: list[str], theirs: list[str], limit: float) -> dict | None:
    """Compare the best of `ours` with the best of `theirs`; None if one side was not run."""
    ours, theirs = ([name for name in names if name in kl] for names in (ours, theirs))
    if not ours or not theirs:
        return None
    best, rival = min(ours, key=kl.get), min(theirs, key=kl.get)
    ratio = kl[best] / kl[rival]
    return {"bound": title, "ours": best, "theirs": rival, "ratio": ratio, "limit": limit, "met": ratio <= limit}


def main() -> None:
    """Run, evaluate, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--windows", type=int, default=64, help="test windows of 512 tokens; 0: all (default: 64)")
    arguments = parser.parse_args()
    with setup_from(arguments) as setup:
        test = protocol.test_windows(setup.model, setup.data_dir, arguments.windows)
        reference = load_dense(setup.model)
        results = {}
        for run in select(arguments.only, setup, default=list(RUNS)):
            cost = execute(run, setup)
            results[run.name] = {**evaluate(run, setup, reference, test), "cost": cost}
            print("{}: KL {kl:.4f}, perplexity {perplexity:.2f}".format(run.name, **results[run.name]), flush=True)
        sections = {
            "protocol": {
                "scheme": SCHEME,
                **protocol.describe_calibration(setup.tokens),
                "evaluation": f"KL(original || quantized) of {len(test)} windows of {protocol.TEST_TEXT}, float32",
            },
            "bounds": bounds({name: result["kl"] for name, result in results.items()}),
            "runs": results,
        }
    write_results(arguments.output, sections)


if __name__ == "__main__":
    main()
