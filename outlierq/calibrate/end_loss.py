"""KL(original || changed) on a text and its gradient, with one block of one of the two models in memory at a time.

The original runs once, and the outputs of its last block are kept. A gradient takes the changed model's blocks twice,
as `calibrate/sensitivity.py` does: forward, keeping the inputs of every block for the few batches of one step, then
backward from the last one. The logits are made for a few positions at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

from outlierq.core.errors import NumbersError, OutlierqError, SourceError, during, lacks_memory

if TYPE_CHECKING:
    import torch

    from outlierq.calibrate.runner import BlockRunner, HiddenStates

HEAD_TOKENS = 256  # that go through the output heads together: logits are as wide as the vocabulary

Progress = Callable[[int, float], None]
States = dict[int, "torch.Tensor"]


class EndLoss:
    """Of windows of text, [sequences, tokens], in batches as the runners have them; to be used as a context.

    original, changed: their runners, of the same batch size. learning: is set while parts that `changed` is given
    weights for have to take part in a gradient. take: is given the name of such a part, and the part with gradients.
    """

    def __init__(
        self,
        original: BlockRunner,
        changed: BlockRunner,
        ids: torch.Tensor,
        take: Callable[[str, torch.nn.Module], None],
    ):
        self.original, self.changed, self.ids, self.take = original, changed, ids, take
        self.learning = False
        self._stack = ExitStack()

    def __enter__(self) -> EndLoss:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, told: Progress) -> int:
        """Run the original, and the changed model up to its first block; gives the number of batches.

        told: is given the number of a block, and the part of the text that it has seen. SourceError for models whose
        blocks hand on more than hidden states.
        """
        finals = self.original.start(self.ids, whole=True)
        if self.original.hands_more:
            raise SourceError(
                f"{type(self.original.model).__name__} hands more than hidden states from block to block, so no "
                "gradient goes through one block at a time",
                hint="recipes that round well to begin with (best-w4) need no gradient of the whole model",
            )
        for index, block in enumerate(self.original.structure.blocks):
            with _weights(self.original, block.name) as module:
                self.original.run(module, index, finals, progress=partial(told, index))
        self.inputs: HiddenStates = self.changed.start(self.ids)
        self._asked = self._stack.enter_context(self.original.tail(self.ids, finals))
        return len(self.inputs)

    def value(self, batches: Sequence[int]) -> float:
        """Mean KL in nats per token of some batches."""
        import torch

        with torch.no_grad():
            states = {batch: self.inputs[batch] for batch in batches}
            for index, block in enumerate(self.changed.structure.blocks):
                with _weights(self.changed, block.name) as module:
                    states = self._forward(module, index, states)
        return self._head(states)[0]

    def gradient(self, batches: Sequence[int]) -> float:
        """The same; `take` is given the gradients of every part. NumbersError when one cannot be had."""
        self.learning = True
        try:
            return self._gradient(batches)
        finally:
            self.learning = False

    def _gradient(self, batches: Sequence[int]) -> float:
        import torch

        blocks = self.changed.structure.blocks
        states: States = {batch: self.inputs[batch] for batch in batches}
        before: list[States] = []
        for index, block in enumerate(blocks):
            before.append(states)
            with torch.no_grad(), _weights(self.changed, block.name) as module:
                states = self._forward(module, index, states)
        loss, gradients = self._head(states)
        for block in reversed(blocks):
            with during("tune", block.name), _weights(self.changed, block.name) as module:
                gradients = self._backward(module, block.index, before.pop(), gradients)
                self.take(block.name, module)
        return loss

    def _forward(self, module: torch.nn.Module, index: int, states: Mapping[int, torch.Tensor]) -> States:
        """Outputs of block `index` by batch, [sequences, tokens, H] as the inputs are."""
        return {batch: self.changed.forward(module, index, batch, each) for batch, each in states.items()}

    def _backward(
        self, module: torch.nn.Module, index: int, states: Mapping[int, torch.Tensor], gradients: States
    ) -> States:
        """The gradients by the inputs of block `index` [sequences, tokens, H]; its parameters keep their own."""
        import torch

        by_input: States = {}
        for batch, each in states.items():
            leaf = each.detach().to(self.changed.device, copy=True).requires_grad_()
            with _differentiating(), torch.enable_grad():
                output = self.changed.forward(module, index, batch, leaf)
                output.backward(gradients.pop(batch).to(output))
            assert leaf.grad is not None, "a block depends on its input"
            by_input[batch] = leaf.grad
        return by_input

    def _head(self, states: States) -> tuple[float, States]:
        """The mean KL of outputs of the last block [sequences, tokens, H]; while learning, also its gradient by them.

        What follows the blocks gives its own gradients to `take` then.
        """
        import torch

        total, tokens = 0.0, sum(len(self._windows(batch)) * self.ids.shape[1] for batch in states)
        gradients: States = {}
        with self.changed.tail(self.ids, self.inputs) as logits_at:
            for batch, each in states.items():
                leaf = each.detach().to(self.changed.device, copy=True).requires_grad_(self.learning)
                for places in self._places(batch).split(HEAD_TOKENS):
                    asked = self._asked(batch, places).float().log_softmax(-1)
                    logits = logits_at(batch, places, leaf)
                    with torch.no_grad():
                        given = logits.detach().float().log_softmax(-1)
                        likely = asked.exp()
                        total += float((likely * (asked - given).masked_fill_(asked.isneginf(), 0.0)).sum().double())
                    if self.learning:
                        with _differentiating():
                            logits.backward(((given.exp() - likely) / tokens).to(logits))
                if leaf.grad is not None:
                    gradients[batch] = leaf.grad
            if self.learning:
                self.take("", self.changed.model)
        return total / tokens, gradients

    def _windows(self, batch: int) -> torch.Tensor:
        """The tokens of a batch, [sequences, tokens]."""
        size = self.changed.batch_size
        return self.ids[batch * size : (batch + 1) * size]

    def _places(self, batch: int) -> torch.Tensor:
        """[n, 2]: sequence in the batch and position, of every token."""
        import torch

        sequences, tokens = self._windows(batch).shape
        return torch.cartesian_prod(torch.arange(sequences), torch.arange(tokens))


@contextmanager
def _weights(runner: BlockRunner, name: str) -> Iterator[torch.nn.Module]:
    """Inside, a block has its weights."""
    runner.weights.materialise(name)
    try:
        yield runner.model.get_submodule(name)
    finally:
        runner.weights.release(name)


@contextmanager
def _differentiating() -> Iterator[None]:
    """What fails inside, where the same ran without gradients, as a NumbersError; a lack of memory passes."""
    try:
        yield
    except (RuntimeError, OutlierqError) as error:
        if lacks_memory(error):
            raise
        raise NumbersError(f"the model cannot be differentiated ({str(error).splitlines()[0]})") from error
