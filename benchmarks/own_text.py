"""Text of a model's own, sampled from what it predicts, for models that are judged on what they were trained on.

    python benchmarks/own_text.py MODEL -o babyllama-own-seed-1.txt --seed 1

A figure on such text is that of models in their own field; equal seeds give equal text.
"""

import argparse
from pathlib import Path

from outlierq.load import load_tokenizer, open_checkpoint
from outlierq.pipeline.asked.resources import USUAL
from outlierq.pipeline.text.own import Writer


def main() -> None:
    """Sample and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--windows", type=int, default=160)
    parser.add_argument("--window-length", type=int, default=240)
    asked = parser.parse_args()
    checkpoint = open_checkpoint(asked.model)
    tokenizer = load_tokenizer(checkpoint)
    ids = Writer(checkpoint, tokenizer, asked.seed, USUAL)(asked.windows, asked.window_length)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    asked.output.write_text("\n".join(texts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
