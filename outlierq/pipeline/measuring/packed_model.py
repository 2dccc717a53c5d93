"""A compressed checkpoint as a model that computes with its packed weights: `load` reads, `runtime` multiplies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from outlierq.core.errors import SourceError
from outlierq.core.notes import note

if TYPE_CHECKING:
    import torch

    from outlierq.core.model import Checkpoint


def load_packed_model(checkpoint: Checkpoint, *, dtype: str = "bfloat16", device: str = "cpu") -> torch.nn.Module:
    """The model with a `QuantLinear` for every compressed linear; all other tensors as `load_model` gives them.

    Dense weights of packed linears never exist. A linear whose format has no codes in groups of columns (activation
    order, LLM.int8()) stays what `load_model` makes of it, with a note.
    """
    import torch

    from outlierq.load import build_skeleton, checkpoint_names, load_tensors_into, unpacked
    from outlierq.runtime import QuantLinear

    plain = unpacked(checkpoint)
    model = build_skeleton(plain)
    names = checkpoint_names(plain, model)
    torch_dtype = getattr(torch, dtype)
    packed: dict[str, QuantLinear] = {}
    for module in _compressed_linears(plain, model, names):
        try:
            weight = plain.quantized(names[f"{module}.weight"])
        except SourceError as error:
            note(f"{module} is not packed: {error.what}")
            continue
        bias = plain.read(names[f"{module}.bias"]) if f"{module}.bias" in names else None
        packed[module] = QuantLinear(weight, bias, dtype=torch_dtype, device=device)
    load_tensors_into(model, plain, names, skip=packed, dtype=dtype, device=device)
    plain.install(model, names)  # hooks of packed linears go with the modules that are replaced now
    for module, layer in packed.items():
        model.set_submodule(module, layer)
    return model


def runtime_summary(model: torch.nn.Module) -> list[str]:
    """How the packed linears of a model compute, and why the CUDA kernels are not used where they are not."""
    from outlierq.kernels.launch import unavailable
    from outlierq.runtime import summary

    ways = summary(model)
    if not ways:
        return ["the checkpoint holds no packed weight that can be multiplied; the dense model was measured"]
    missing = unavailable()
    return ways if missing is None else [*ways, missing]


def _compressed_linears(plain: Checkpoint, model: torch.nn.Module, names: dict[str, str]) -> list[str]:
    """Names of the linear modules whose weight is stored compressed."""
    import torch

    linears = (name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear))
    return [name for name in linears if names.get(f"{name}.weight") in plain.linears]
