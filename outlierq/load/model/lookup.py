"""The input embedding without its table: the rows of the tokens at hand are read from the file when they are needed.

The tables of a large vocabulary, one to go in and one to come out, are often the largest tensors of a model. What runs
only up to the first block needs a few thousand rows of the first, and nothing of the second.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from outlierq.core.model import Checkpoint


def tables(model: torch.nn.Module, checkpoint: Checkpoint, names: Mapping[str, str]) -> dict[str, str]:
    """Module name -> tensor, of the embeddings that can do without: in and out; none when rows cannot be read alone,
    or the input embedding has parts of its own (a norm), which need their weights.
    """
    import torch

    inside = model.get_input_embeddings()
    if not checkpoint.reads_rows or not isinstance(inside, torch.nn.Embedding) or [*inside.children()]:
        return {}
    ends = [inside, model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None]
    slots = {name: f"{name}.weight" for name, part in model.named_modules() if any(part is end for end in ends)}
    return {name: names[slot] for name, slot in slots.items() if slot in names}


@contextmanager
def looking_up(
    model: torch.nn.Module, checkpoint: Checkpoint, names: Mapping[str, str], dtype: torch.dtype, device: str
) -> Iterator[tuple[str, ...]]:
    """Inside, the input embedding needs no weights; gives the names of the modules that are not to be filled.

    The output head, if there is one, has none at all inside. Nothing changes where rows cannot be read alone.
    """
    import torch

    from outlierq.load.model.skeleton import leave_empty

    ends = tables(model, checkpoint, names)
    inside = model.get_input_embeddings()
    tensor = next((ends[name] for name in ends if model.get_submodule(name) is inside), None)
    if tensor is None:
        yield ()
        return
    before, padding = inside.weight, inside.padding_idx

    def rows(part: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        ids, place = args[0].unique(return_inverse=True)
        table = checkpoint.read_some_rows(tensor, ids.tolist()).to(device=device, dtype=dtype)
        part.weight = torch.nn.Parameter(table, requires_grad=False)
        return place, *args[1:]

    handle = inside.register_forward_pre_hook(rows)
    inside.padding_idx = None  # it would be looked for among the few rows
    leave_empty(inside, dtype, device)  # models send the tokens to where it is
    try:
        yield tuple(ends)
    finally:
        handle.remove()
        inside.weight, inside.padding_idx = before, padding
