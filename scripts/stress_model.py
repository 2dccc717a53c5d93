"""Write the stress model of MODEL to OUT: the same function, with outlier channels at known places.

`python scripts/stress_model.py MODEL OUT --channels 6 --factor 60`. With `--factor 64` (a power of two) the function
is the same to the bit; with another factor the readers' columns are rounded once more to the model's 16 bits.
"""

import argparse
from pathlib import Path

from outlierq.load import open_checkpoint
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.quantize import quantize
from outlierq.recipe import load
from outlierq.testing.stress import stressed


def main() -> None:
    """Read, rewrite, write a Hugging Face folder, and say which channels carry the outliers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="Hugging Face folder, GGUF file or Hub id")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--channels", type=int, nargs="+", default=[6], help="how many to draw, or their numbers")
    parser.add_argument("--factor", type=float, default=60.0, help="how much larger they become (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    arguments = parser.parse_args()
    channels = arguments.channels[0] if len(arguments.channels) == 1 else arguments.channels
    checkpoint = stressed(open_checkpoint(arguments.model), channels, arguments.factor, seed=arguments.seed)
    quantize(make_plan(checkpoint, load("dense")), arguments.out)
    print(f"channels: {' '.join(map(str, checkpoint.channels))}")
    print(f"factor: {arguments.factor:g}, inputs of {sum(len(g.sites) for g in checkpoint.groups)} linears")


if __name__ == "__main__":
    main()
