"""One block on one batch of text, to be run again and again with other weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.func import functional_call

from outlierq.calibrate.folds import tensor_parameters
from outlierq.ops.precision import has_bfloat16

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
        """Hidden states of the block with some of its tensors replaced, each in its stored shape, gradients flowing.

        Linears round their inputs where `inputs` ask for it; gradients pass that as if it were not there.
        In float32: in bfloat16 the rounding of what flows by the block may be as large as the error to be lowered. Only
        the operands of products are in bfloat16, where the model is and the machine multiplies them faster.
        """
        parameters = tensor_parameters(self.module, block)
        replaced = {id(parameters[name]): tensor for name, tensor in tensors.items()}
        held = [*self.module.named_parameters(), *self.module.named_buffers()]
        values = {name: replaced.get(id(each), each) for name, each in held}
        values = {name: each.float() if each.is_floating_point() else each for name, each in values.items()}
        hidden, run = self.inputs[self.number], _With(self.module, values)
        short = torch.autocast(self.runner.device.type, torch.bfloat16, enabled=self._multiplies_halves())
        with short, self.runner.rounding(self.module, self.index, self.inputs):
            output = self.runner.forward(run, self.index, self.number, hidden, torch.float32)
        self.inputs.done_with(self.number)
        return output

    def _multiplies_halves(self) -> bool:
        """Whether products take bfloat16 operands."""
        short = has_bfloat16() if self.runner.device.type == "cpu" else True
        return short and self.runner.dtype == torch.bfloat16

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
