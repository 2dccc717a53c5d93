"""Quantize MODEL with AutoRound and write it dense, rounded. Run by the Python of AutoRound's environment.

All settings but the scheme, the calibration tokens and the number of iterations are the peer's defaults.
"""

import argparse
import json
from pathlib import Path

import torch
from auto_round import AutoRound
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def any_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """AutoRound asks for a tokenizer; it reads none of its own text here, so that any does."""
    words = {str(number): number for number in range(vocabulary)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")), eos_token="2")


def calibration_set(tokens: Path) -> list[dict]:
    """The shared token windows in the form that AutoRound takes as already tokenized."""
    windows = torch.tensor(json.loads(tokens.read_text()))
    return [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in windows]


def main() -> None:
    """`autoround_run.py MODEL TOKENS OUT --bits 4 --group-size 32 --iterations 200 [--asymmetric]`"""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument("tokens", type=Path, help="JSON file of calibration windows")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--iterations", type=int, required=True)
    parser.add_argument("--asymmetric", action="store_true")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
    windows = calibration_set(arguments.tokens)
    scheme = {"bits": arguments.bits, "group_size": arguments.group_size, "sym": not arguments.asymmetric}
    rounding = AutoRound(
        model,
        any_tokenizer(model.config.vocab_size),
        **scheme,
        iters=arguments.iterations,
        dataset=windows,
        nsamples=len(windows),
        seqlen=windows[0]["input_ids"].shape[1],
        device_map="cpu",
    )
    rounded, _ = rounding.quantize()
    weights = {
        f"{name}.weight": part.weight.detach()
        for name, part in rounded.named_modules()
        if isinstance(part, torch.nn.Linear)
    }
    dense = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
    dense.load_state_dict(weights, strict=False)
    dense.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
