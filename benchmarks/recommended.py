"""What each recipe that `outlierq recommend` names costs on one small model: the figures in data/recommended.json.

    python benchmarks/recommended.py MODEL --calibration TEXT --judge TEXT --name NAME

Recipes of GGUF files are measured by gguf.py, in llama.cpp.
"""

import argparse
import json
import tempfile
from pathlib import Path

from record import write_results

import outlierq

FACTS = Path(outlierq.__file__).parent / "data" / "recommended.json"
RESULTS = Path(__file__).parent / "results" / "recommended.json"


def main() -> None:
    """Sweep over the recipes and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--judge", required=True, help="text that no calibration has seen")
    parser.add_argument("--name", required=True, help="of the model, in the results")
    parser.add_argument("--length", type=int, default=240, help="tokens of a window")
    asked = parser.parse_args()
    names = [name for name in json.loads(FACTS.read_text())["recipes"] if not name.startswith("gguf-")]
    settings = {"calibration.text": asked.calibration, "calibration.sequence_length": asked.length}
    with tempfile.TemporaryDirectory() as work:
        swept = outlierq.sweep(
            asked.model,
            names,
            out=Path(work) / "runs",
            settings=settings,
            text=asked.judge,
            windows=24,
            window_length=asked.length,
            device="cpu",
            told=lambda row: print(row.name, row.kl, row.fault, flush=True),
        )
    conditions = {"model": asked.name, "calibration": Path(asked.calibration).name, "judge": Path(asked.judge).name}
    conditions |= {"windows": 24, "window_length": asked.length}
    write_results(RESULTS, {"conditions": conditions, "kl": {row.name: row.kl for row in swept.rows}})


if __name__ == "__main__":
    main()
