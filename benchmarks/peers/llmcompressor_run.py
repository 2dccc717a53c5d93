"""Quantize MODEL with llm-compressor. Run by the Python of llm-compressor's environment.

Weights in groups (4 bits, 64 columns unless asked otherwise), or w8a8: the recipe of its documentation for int8 weights
and activations (SmoothQuant of strength 0.8, then GPTQ); or a scheme of its own by name, inputs included.

All settings but the scheme and the calibration tokens are the peer's defaults: GPTQ with static activation order and
damping 0.01, AWQ with duo scaling and 20 grid points, the sequential pipeline, one sample per batch.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache


def scheme(symmetric: bool, bits: int, group_size: int, preset: str | None) -> dict:
    """The settings that every quantizing modifier takes: inputs in 16 bits, all linear layers but the head.

    preset: a scheme of the peer's by name in the place of all that.
    """
    if preset is not None:
        return {"targets": ["Linear"], "scheme": preset, "ignore": ["lm_head"]}
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": group_size, "symmetric": symmetric}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}


def modifiers(method: str, groups: dict) -> list:
    """The recipe of `method`; awq-both is the setting of the peer's own AWQ example. groups: what `scheme` takes."""
    if method == "w8a8":
        return [
            SmoothQuantModifier(smoothing_strength=0.8),
            GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"]),
        ]
    if method == "gptq":
        return [GPTQModifier(**scheme(**groups))]
    if method == "awq":
        return [AWQModifier(), QuantizationModifier(**scheme(**groups))]
    if method == "awq-both":
        return [AWQModifier(duo_scaling="both"), QuantizationModifier(**scheme(**groups))]
    return [QuantizationModifier(**scheme(**groups))]


def skip_pinning() -> None:
    """AWQ pins its cache for copies to an accelerator, and `pin_memory` raises where there is none."""
    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda self, batch_index, input_names=None: None


def calibration_set(tokens: Path) -> Dataset:
    """The shared token windows in the form that `oneshot` takes as already tokenized."""
    windows = json.loads(tokens.read_text())
    return Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(window) for window in windows]})


def main() -> None:
    """`llmcompressor_run.py MODEL TOKENS OUT --method gptq [--asymmetric] [--bits 4] [--group-size 64]`"""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument("tokens", type=Path, help="JSON file of calibration windows")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--method", choices=["gptq", "awq", "awq-both", "rtn", "w8a8"], required=True)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--scheme", choices=["NVFP4", "MXFP4"], help="a scheme of the peer's, inputs included")
    arguments = parser.parse_args()
    groups = {"symmetric": not arguments.asymmetric, "bits": arguments.bits, "group_size": arguments.group_size}
    groups["preset"] = arguments.scheme
    skip_pinning()
    data = calibration_set(arguments.tokens)
    oneshot(
        model=arguments.model,
        recipe=modifiers(arguments.method, groups),
        dataset=None if arguments.method == "rtn" and arguments.scheme is None else data,
        num_calibration_samples=len(data),
        max_seq_length=len(data[0]["input_ids"]),
        shuffle_calibration_samples=False,
        output_dir=arguments.out,
    )


if __name__ == "__main__":
    main()
