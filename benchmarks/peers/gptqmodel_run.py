"""Quantize MODEL with GPTQModel: 4-bit weights, groups of 64. Run by the Python of GPTQModel's environment.

All settings but the scheme and the calibration tokens are the peer's defaults: GPTQ with group-aware activation order
and damping 0.05, AWQ in its gemm format, one sample per batch.
"""

import argparse
import json
from pathlib import Path

from gptqmodel import AWQConfig, GPTQConfig, GPTQModel

GROUP_SIZE = 64
CONFIGS = {"gptq": GPTQConfig, "awq": AWQConfig}


def calibration_set(tokens: Path) -> list[dict]:
    """The shared token windows in the form that `quantize` takes as already tokenized."""
    return [{"input_ids": w, "attention_mask": [1] * len(w)} for w in json.loads(tokens.read_text())]


def main() -> None:
    """`gptqmodel_run.py MODEL TOKENS OUT --method gptq [--asymmetric]`"""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument("tokens", type=Path, help="JSON file of calibration windows")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--method", choices=sorted(CONFIGS), required=True)
    parser.add_argument("--asymmetric", action="store_true")
    arguments = parser.parse_args()
    config = CONFIGS[arguments.method](bits=4, group_size=GROUP_SIZE, sym=not arguments.asymmetric)
    model = GPTQModel.load(arguments.model, config)
    model.quantize(calibration_set(arguments.tokens))
    model.save(arguments.out)


if __name__ == "__main__":
    main()
