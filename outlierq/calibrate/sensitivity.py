"""One backward pass over some text, a block at a time: how much an error of each linear's output costs at the end.

The model runs forward once and the inputs of every block are kept in mapped files. What follows the blocks gives the
gradient of sum_t log p(y_t), y_t drawn from the model itself; then each block, last first, runs again with gradients,
and hands that of its inputs on. One block has weights and a graph at a time, of one batch. The output head is watched
on the way. Of the table of embeddings, of which a token takes one row, the gradient that is left at the end tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from outlierq.calibrate.runner import HiddenStates, Spill
from outlierq.calibrate.trace import submodule
from outlierq.core.errors import NumbersError, during
from outlierq.core.machine.heap import return_freed_memory
from outlierq.core.measured.sensitivity import LinearSensitivity, Sensitivity

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from outlierq.calibrate.runner import BlockRunner
    from outlierq.core.model import Block

HEAD_TOKENS = 256  # that go through the output head together: its logits are as wide as the vocabulary

Tell = Callable[[int, int, str], Any]


def measure_sensitivity(
    runner: BlockRunner, ids: torch.Tensor, hidden: HiddenStates, folder: str | Path, *, seed: int = 0, tell: Tell
) -> Sensitivity:
    """Of every linear in blocks, of the output head and the table of embeddings.

    hidden: what enters the first block, [sequences, tokens, channels]; it is used up. ids: [sequences,
    tokens] of the same text; `runner.start` has read it. folder: for the inputs of all blocks. tell: is told how many
    steps are done, of which block the next one is, and what it does. NumbersError when a gradient is not finite.
    """
    blocks = runner.structure.blocks
    table = _Table.of(runner, ids, hidden)
    kept = [_forward(runner, block, hidden, folder, tell) for block in blocks]
    linears: dict[str, LinearSensitivity] = {}
    gradients = _at_the_end(runner, ids, hidden, seed, linears)
    for done, block in enumerate(reversed(blocks), start=len(blocks)):
        tell(done, block.index, "what an error of its outputs costs")
        with during("calibrate", block.name):
            linears = _backward(runner, block, kept.pop(), gradients) | linears
        return_freed_memory()
    return Sensitivity(ids.numel(), linears if table is None else linears | table.sums(ids, gradients))


@dataclass(frozen=True)
class _Table:
    """The table of embeddings. share: how much of one of its rows is in the hidden state that enters the blocks."""

    name: str
    rows: int
    share: float

    @classmethod
    def of(cls, runner: BlockRunner, ids: torch.Tensor, hidden: HiddenStates) -> _Table | None:
        """None where hidden states are not as wide as its rows, or where it has no table."""
        import torch

        table = cast("PreTrainedModel", runner.model).get_input_embeddings()
        name = next((name for name, part in runner.model.named_modules() if part is table), None)
        if name is None or not isinstance(table, torch.nn.Embedding) or tuple(hidden.values.shape[:2]) != ids.shape:
            return None
        if hidden.values.shape[2:] != table.weight.shape[1:]:
            return None
        both = power = 0.0
        runner.weights.materialise("")
        try:
            for batch, asked in enumerate(ids.split(runner.batch_size)):
                rows = table.weight[asked.to(table.weight.device)].float()
                both += (hidden[batch].to(rows) * rows).sum().item()
                power += rows.square().sum().item()
        finally:
            runner.weights.release("")
        return cls(name, len(table.weight), both / power) if power > 0 else None

    def sums(self, ids: torch.Tensor, gradients: HiddenStates) -> dict[str, LinearSensitivity]:
        """gradients: by what enters the blocks. A row errs alike wherever its token is, so they add up in a text."""
        import torch

        outputs, inputs = gradients.values.new_zeros(()).double(), torch.zeros(self.rows, dtype=torch.float64)
        for number, text in enumerate(ids):
            tokens, places = text.unique(return_inverse=True)
            by_place = gradients.values[number].double().cpu() * self.share
            squares = by_place.new_zeros(len(tokens), by_place.shape[1]).index_add_(0, places, by_place).square_()
            outputs = outputs + squares.sum(0)
            inputs[tokens] += squares.mean(1)
        return {self.name: LinearSensitivity(outputs, inputs)}


def _forward(runner: BlockRunner, block: Block, hidden: HiddenStates, folder: str | Path, tell: Tell) -> HiddenStates:
    """Run a block, so that `hidden` holds its outputs; its inputs, as they were."""
    tell(block.index, block.index, "its inputs, to come back to")
    kept = HiddenStates(
        tuple(hidden.values.shape),
        hidden.values.dtype,
        hidden.batch_size,
        spill=Spill(folder, 0),
        sequence_axis=hidden.sequence_axis,
    )
    for batch in range(len(hidden)):
        kept.write(batch, hidden[batch])
        kept.done_with(batch)
    with _weights(runner, block) as module:
        runner.run(module, block.index, hidden)
    return kept


@contextmanager
def _weights(runner: BlockRunner, block: Block) -> Iterator[torch.nn.Module]:
    """Inside, the block has its weights."""
    runner.weights.materialise(block.name)
    try:
        yield runner.model.get_submodule(block.name)
    finally:
        runner.weights.release(block.name)


def _at_the_end(
    runner: BlockRunner, ids: torch.Tensor, hidden: HiddenStates, seed: int, sums: dict[str, LinearSensitivity]
) -> HiddenStates:
    """The gradient by the outputs of the last block, in the place of `hidden`, which holds these.

    sums: gets what the output head adds.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    head = cast("PreTrainedModel", runner.model).get_output_embeddings()
    heads = {name: part for name, part in runner.model.named_modules() if part is head}
    with runner.tail(ids, hidden) as logits_at, _watching(heads, sums):
        for batch in range(len(hidden)):
            states = hidden[batch].to(runner.device, runner.dtype, copy=True).requires_grad_()
            count = len(ids[batch * runner.batch_size : (batch + 1) * runner.batch_size])
            for places in torch.cartesian_prod(torch.arange(count), torch.arange(ids.shape[1])).split(HEAD_TOKENS):
                scores = logits_at(batch, places, states).float().log_softmax(-1)
                drawn = torch.multinomial(scores.detach().exp().cpu(), 1, generator=generator)
                scores.gather(1, drawn.to(scores.device)).sum().backward()
            assert states.grad is not None, "the head depends on the hidden states"
            hidden.write(batch, states.grad)
            hidden.done_with(batch)
    return hidden


def _backward(
    runner: BlockRunner, block: Block, inputs: HiddenStates, gradients: HiddenStates
) -> dict[str, LinearSensitivity]:
    """The sums of a block's linears; `gradients` then are by the inputs of the block."""
    import torch

    sums: dict[str, LinearSensitivity] = {}
    with _weights(runner, block) as module, _watching(_linears(module, block), sums):
        for batch in range(len(inputs)):
            states = inputs[batch].to(runner.device, runner.dtype, copy=True).requires_grad_()
            with torch.enable_grad():
                output = runner.forward(module, block.index, batch, states)
            output.backward(gradients[batch].to(output))
            if states.grad is None or not states.grad.isfinite().all():
                raise NumbersError(f"the gradient by the inputs of {block.name} is not finite in batch {batch}")
            gradients.write(batch, states.grad)
            gradients.done_with(batch)
            inputs.done_with(batch)
    return {site.module: sums[site.module] for site in block.sites if site.module in sums}


def _linears(module: torch.nn.Module, block: Block) -> dict[str, torch.nn.Module]:
    """Those of a block, by name."""
    return {site.module: submodule(module, site.module) for site in block.sites}


@contextmanager
def _watching(linears: Mapping[str, torch.nn.Module], sums: dict[str, LinearSensitivity]) -> Iterator[None]:
    """Inside, `sums` gets what every linear adds when gradients reach its output."""
    import torch

    def watch(name: str) -> Callable[..., None]:
        def on_output(part: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.requires_grad and output.numel():  # a router gives more
                read = args[0].detach()
                output.register_hook(lambda gradient: _add(sums, name, read, gradient))

        return on_output

    handles = [part.register_forward_hook(watch(name)) for name, part in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add(sums: dict[str, LinearSensitivity], name: str, read: torch.Tensor, gradient: torch.Tensor) -> None:
    """What some tokens add. read: [..., in], gradient: [..., out] of the same tokens."""
    squares = gradient.reshape(-1, gradient.shape[-1]).float().square()  # [tokens, out]
    tokens = read.reshape(-1, read.shape[-1]).float().square()  # [tokens, in]
    outputs, inputs = squares.sum(0).double().cpu(), (squares.mean(1) @ tokens).double().cpu()
    added = LinearSensitivity(outputs, inputs, _alike(read, gradient) if gradient.ndim == 3 else None)
    sums[name] = sums[name] + added if name in sums else added


def _alike(read: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """See `LinearSensitivity.alike`. read: [sequences, tokens, in], gradient: [sequences, tokens, out]."""
    import torch

    found = gradient.new_zeros(2, dtype=torch.float64)
    for g, x in zip(gradient.float(), read.float(), strict=True):
        pairs = (g @ g.T) * (x @ x.T)  # [tokens, tokens], whose sum is that of the squares of g^T x
        found += torch.stack([pairs.sum(), pairs.trace()])
    return found.cpu()
