"""outlierq compresses LLM checkpoints: one command, a smaller checkpoint that serving stacks load, loss measured."""

__version__ = "0.1.0"
