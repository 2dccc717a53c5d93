"""Compare LLM.int8() of bitsandbytes with the original. Run by the Python of an environment with bitsandbytes.

MODEL is the original in bf16; what is compared with it is MODEL itself loaded with `load_in_8bit`, or the LLM.int8()
checkpoint given by --candidate. Windows, KL and perplexity are those of protocol.py. All settings are the peer's
defaults (threshold 6.0, head in 16 bits); layers that are not quantized run in --dtype.
"""

import argparse
import json
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
import protocol

PROMPT = "The most famous lighthouse of the ancient world stood"


def load(model: str, dtype: str, quantize: bool) -> torch.nn.Module:
    """The model, with its linears rounded by bitsandbytes when asked to."""
    # No argument at all for a folder that says itself that it is quantized: None would switch that off.
    config = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)} if quantize else {}
    return AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), **config).eval()


def greedy(model: torch.nn.Module, folder: str, count: int = 24) -> list[int]:
    """The first tokens after the prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    return model.generate(ids, max_new_tokens=count, do_sample=False)[0, ids.shape[1] :].tolist()


def main() -> None:
    """`bitsandbytes_int8.py MODEL --data-dir DIR [--candidate FOLDER] [--windows N] [--dtype float32]`"""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="Hugging Face folder of the original")
    parser.add_argument("--candidate", help="an LLM.int8() folder; default: the original, rounded by bitsandbytes")
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with the WikiText-2 raw texts")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    arguments = parser.parse_args()
    windows = protocol.test_windows(Path(arguments.model), arguments.data_dir, arguments.windows)
    reference = load(arguments.model, "float32", quantize=False)
    candidate = load(arguments.candidate or arguments.model, arguments.dtype, quantize=arguments.candidate is None)
    result = {
        "candidate": arguments.candidate or f"{arguments.model}, load_in_8bit",
        "dtype": arguments.dtype,
        "versions": {name: version(name) for name in ("bitsandbytes", "transformers", "torch")},
        **asdict(protocol.compare(reference, candidate, windows, batch=1)),
        "greedy": greedy(candidate, arguments.model),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
