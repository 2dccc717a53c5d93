"""Runs inside vLLM's environment: `python resolve_vllm.py JOB.json OUT.json`: what it takes each stored module for.

JOB: `folders`, of compressed-tensors checkpoints. OUT: by folder a list of [module, what vLLM's resolver says, what the
file holds] for every module where the two differ, and how many were asked. Nothing is loaded and nothing runs: names
are mapped as the model class says, merged layers are asked for as the class merges them.
"""

import json
import re
import sys
from pathlib import Path

from absent import stand_in

CODES = ("weight_scale", "weight_packed")
EXPERT = re.compile(r"\.experts\.\d+\.")


def main() -> None:
    from vllm.model_executor.models.registry import ModelRegistry  # noqa: F401, before transformers could find it

    stand_in()
    with open(sys.argv[1]) as file:
        job = json.load(file)
    with open(sys.argv[2], "w") as file:
        json.dump({folder: answer(Path(folder)) for folder in job["folders"]}, file)


def answer(folder: Path) -> dict:
    """What differs in one checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    kind = model_class(config["architectures"][0])
    quant = quantization(config, kind)
    held = modules(folder)
    mapper = getattr(kind, "hf_to_vllm_mapper", None)
    wrong = []
    for module, is_packed in held.items():
        name = mapper._map_name(module) if mapper is not None else module
        if name is None:
            continue  # the class does not load it
        says = said(quant, name)
        if says != is_packed:
            wrong.append([module, says, is_packed])
    return {"class": kind.__name__ if kind else None, "modules": len(held), "wrong": wrong}


def model_class(architecture: str):
    """vLLM's own class; None where it has none."""
    from vllm.model_executor.models.registry import ModelRegistry

    try:
        return ModelRegistry.models[architecture].load_model_cls()
    except (KeyError, ImportError, AttributeError):
        return None


def quantization(config: dict, kind):
    """The resolver, with the names of the class."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    quant = CompressedTensorsConfig.from_config(config["quantization_config"])
    mapper = getattr(kind, "hf_to_vllm_mapper", None)
    if mapper is not None:
        quant.apply_vllm_mapper(mapper)
    quant.packed_modules_mapping = dict(getattr(kind, "packed_modules_mapping", {}))
    return quant


def modules(folder: Path) -> dict[str, bool]:
    """Module -> whether its weight is stored as codes, of every matrix that a linear may have."""
    from safetensors import safe_open

    held: dict[str, bool] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                module, _, leaf = name.rpartition(".")
                if leaf in CODES:
                    held[module] = True
                elif leaf == "weight" and len(file.get_slice(name).get_shape()) == 2 and not is_table(module):
                    held.setdefault(module, False)
    return held


def is_table(module: str) -> bool:
    """Whether a matrix is an embedding, which no resolver is asked for, by its name."""
    leaf = module.rpartition(".")[2] if "embedding" not in module else "embed"
    return any(part in leaf for part in ("embed", "wte", "wpe", "norm"))


def said(quant, name: str):
    """Whether vLLM takes a module for quantized; its refusal in words where it refuses."""

    class Linear:
        """What stands in for the layer: only its name is asked."""

    layers = {name}
    parent, _, leaf = name.rpartition(".")
    if not EXPERT.search(name):
        merged = (whole for whole, parts in quant.packed_modules_mapping.items() if leaf in parts and whole != leaf)
        layers |= {f"{parent}.{whole}" for whole in merged}
    try:
        answers = {quant.get_scheme_dict(Linear(), layer) is not None for layer in layers}
    except ValueError as error:
        return str(error)
    return answers.pop() if len(answers) == 1 else "merged and alone it is not the same"


if __name__ == "__main__":
    main()
