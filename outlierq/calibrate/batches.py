"""One block on one batch of text, to be run again and again with other weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.func import functional_call

from outlierq.calibrate.folds import tensor_parameters

if TYPE_CHECKING:
    from outlierq.calibrate.runner import BlockRunner, HiddenStates, Returned
    from outlierq.core.model import Block


@dataclass(frozen=True)
class Batch:
    """Block `index` on batch `number` of a shard. module: the block with weights of its own.

    inputs: hidden states [sequences, tokens, H] that the block reads; outputs: those that the original one has given.
    """

    runner: BlockRunner
    module: torch.nn.Module
    index: int
    number: int
    inputs: HiddenStates
    outputs: HiddenStates

    def run(self, block: Block, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Hidden states of the block with some of its tensors replaced, each in its stored shape, gradients flowing."""
        parameters = tensor_parameters(self.module, block)
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        dtype = self.runner.dtype
        values = {names[id(parameters[name])]: tensor.to(dtype) for name, tensor in tensors.items()}
        output = self.runner.forward(_With(self.module, values), self.index, self.number, self.inputs[self.number])
        self.inputs.done_with(self.number)
        return output

    def asked(self) -> torch.Tensor:
        """Hidden states that the original block gives."""
        outputs = self.outputs[self.number].to(self.runner.device)
        self.outputs.done_with(self.number)
        return outputs


class _With(torch.nn.Module):
    """A module with other values in the place of some of its parameters."""

    def __init__(self, module: torch.nn.Module, values: Mapping[str, torch.Tensor]):
        super().__init__()
        self.module, self.values = module, dict(values)

    def forward(self, *args: object, **keywords: object) -> Returned:
        """What the module returns with them."""
        returned: Returned = functional_call(self.module, self.values, args, keywords)
        return returned
