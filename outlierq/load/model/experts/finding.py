"""Which modules of a model hold the experts of a mixture in fused tensors, and how: declared by the class, or tried."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from outlierq.load.model.experts.layout import DOWN, Layout
from outlierq.load.model.experts.proof import proved_layout

if TYPE_CHECKING:
    import torch


def layout_of(part: torch.nn.Module) -> Layout | None:
    """The layout of a module that holds weights of all experts and nothing else; None for any other module."""
    if not hasattr(part, "is_concatenated"):
        return proved_layout(part)
    layout = Layout(**{name: getattr(part, name, value) for name, value in vars(Layout()).items()})
    own = {name for name, parameter in part._parameters.items() if parameter is not None}
    if own != set(layout.slots) or part._parameters[DOWN].dim() != 3:
        return None
    has_norm = hasattr(part, "post_expert_norm")
    return layout if has_norm == layout.has_post_expert_norm else None


def fused_modules(model: torch.nn.Module) -> dict[str, Layout]:
    """Every module of the model that holds its experts in fused tensors, by name."""
    known: dict[Any, Layout | None] = {}
    layouts = {}
    for name, part in model.named_modules():
        shapes = {slot: tuple(parameter.shape) for slot, parameter in part._parameters.items() if parameter is not None}
        if not any(len(shape) == 3 for shape in shapes.values()):
            continue
        key = type(part), tuple(shapes.items())
        known[key] = known[key] if key in known else layout_of(part)
        if known[key] is not None:
            layouts[name] = known[key]
    return layouts
