"""One traced forward of a block: which data feeds which linear site, and which norm wrote it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import SourceError

if TYPE_CHECKING:
    import torch

    from outlierq.core.model import Block

Key = tuple[Any, ...]  # of the data of a tensor: see `data_key`
# Runs the module it is given on one small input, in the module's own dtype, and returns the output hidden states.
RunOnce = Callable[["torch.nn.Module"], "torch.Tensor"]


@dataclass
class Trace:
    """What one forward of a block showed.

    output: what the block returned. inputs: site module name -> key of the data it read, in the order of the calls.
    written: name of a module with a 1-D weight, relative to the block -> key of the data it returned.
    """

    output: torch.Tensor | None = None
    inputs: dict[str, Key] = field(default_factory=dict)
    written: dict[str, Key] = field(default_factory=dict)
    _alive: list[torch.Tensor] = field(default_factory=list)

    def key(self, tensor: torch.Tensor) -> Key:
        """The key of the data of a tensor of any shape. It is kept: a freed address could be given to another one."""
        self._alive.append(tensor)
        return data_key(tensor)


def data_key(tensor: torch.Tensor) -> Key:
    """Equal for two tensors of any shape that show the same data row by row, also as views of another shape.

    A tensor that was written to in between has another key (autograd counts the writes).
    """
    version = 0 if tensor.is_inference() else tensor._version
    layout = tensor.numel() if tensor.is_contiguous() else (tuple(tensor.shape), tensor.stride())
    storage = tensor.untyped_storage().data_ptr()
    return str(tensor.device), storage, tensor.storage_offset(), version, tensor.shape[-1], layout


def submodule(module: torch.nn.Module, name: str) -> torch.nn.Module:
    """The part of `module` whose full name in the model is `name`; SourceError when there is none.

    module: the block or the whole model. The longest ending of the name that leads somewhere is followed.
    """
    parts = name.split(".")
    for start in range(len(parts)):
        try:
            return module.get_submodule(".".join(parts[start:]))
        except AttributeError:
            continue
    raise SourceError(f"{type(module).__name__} has no part {name}")


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The input [..., in] of a linear layer, however it was called."""
    given: torch.Tensor = args[0] if args else next(iter(kwargs.values()))
    return given


def trace_block(module: torch.nn.Module, block: Block, run_once: RunOnce) -> Trace:
    """Run the block once and note the input of every site and the output of everything that looks like a norm."""
    import torch

    trace = Trace()
    with torch.no_grad(), _hooks(module, block, trace):
        trace.output = run_once(module)
    return trace


@contextmanager
def _hooks(module: torch.nn.Module, block: Block, trace: Trace) -> Iterator[None]:
    """Watch the sites and the norms of the block while the context lasts."""
    handles = []
    try:
        for site in block.sites:
            hook = _note_input(trace, site.module)
            handles.append(submodule(module, site.module).register_forward_pre_hook(hook, with_kwargs=True))
        for name, part in module.named_modules():
            if _is_norm_like(part):
                handles.append(part.register_forward_hook(_note_output(trace, name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_norm_like(part: torch.nn.Module) -> bool:
    """A module with a gain per channel, whatever it is called."""
    weight = part._parameters.get("weight")
    return weight is not None and weight.dim() == 1


def _note_input(trace: Trace, site: str) -> Callable[..., None]:
    """A pre-hook that notes the data a site reads; of a site that is called twice, the first."""

    def hook(part: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if site not in trace.inputs:
            trace.inputs[site] = trace.key(first_input(args, kwargs))

    return hook


def _note_output(trace: Trace, name: str) -> Callable[..., None]:
    """A hook that notes the data a norm returned."""

    def hook(part: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        import torch

        if isinstance(output, torch.Tensor):
            trace.written[name] = trace.key(output)

    return hook
