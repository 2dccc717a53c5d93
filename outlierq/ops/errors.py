"""Output error of a changed weight, from the hessian of its input; with quantized inputs, from kept rows of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import ActivationScheme
from outlierq.ops.activations import fake_quantize


def output_error(change: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """tr(D H D^T): mean over tokens of the squared change of the output. change: [out, in], hessian: [in, in]."""
    return ((change @ hessian) * change).sum()


@dataclass
class Told:
    """What a quantizer said of its results. errors, power: [out] float64, of every row of `result`."""

    result: QuantTensor | None = None
    errors: torch.Tensor | None = None
    power: torch.Tensor | None = None

    def of(self, result: QuantTensor, rows: slice = slice(None)) -> list[torch.Tensor]:
        """Errors and power of some rows, or nothing where that is not what was told of."""
        if self.result is not result or self.errors is None or self.power is None:
            return []
        return [self.errors[rows], self.power[rows]]


_told: ContextVar[Told | None] = ContextVar("errors", default=None)


def tell(result: QuantTensor, errors: torch.Tensor, power: torch.Tensor) -> None:
    """A quantizer knows the output error and power of every row, [out] float64; whoever listens need not ask."""
    told = _told.get()
    if told is not None:
        told.result, told.errors, told.power = result, errors, power


@contextmanager
def told_errors() -> Iterator[Told]:
    """What is told inside the block, the last of it."""
    told = Told()
    token = _told.set(told)
    try:
        yield told
    finally:
        _told.reset(token)


class RelativeErrors:
    """Adds up what was lost over rows of one weight. output: relative squared error, None without a hessian.

    weight: relative root-mean-square error.
    """

    def __init__(self) -> None:
        self._change = self._power = self._output_change = self._output_power = 0.0
        self._known = False

    def add(
        self,
        rows: torch.Tensor,
        approximation: torch.Tensor,
        hessian: torch.Tensor | None,
        told: Sequence[torch.Tensor] = (),
    ) -> None:
        """Some rows, float32 [rows, in], and what became of them; `approximation` is overwritten.

        told: errors and power of these rows, where they are known (`Told.of`).
        """
        change = approximation.sub_(rows)
        self._change += change.square().sum().item()
        self._power += rows.square().sum().item()
        if hessian is not None:
            self._known = True
            lost, power = told or (output_error(change, hessian), output_error(rows, hessian))
            self._output_change += lost.sum().item()
            self._output_power += power.sum().item()

    @property
    def output(self) -> float | None:
        """Squared error of the output over its power; 0 for an all-zero output."""
        if not self._known:
            return None
        return self._output_change / self._output_power if self._output_power > 0 else 0.0

    @property
    def weight(self) -> float:
        """Root of the squared error of the weight over its power; 0 for an all-zero weight."""
        return (self._change / self._power) ** 0.5 if self._power > 0 else 0.0


def relative_error_of_both(
    w: torch.Tensor,
    approximation: torch.Tensor,
    rows: torch.Tensor,
    counts: torch.Tensor,
    scheme: ActivationScheme,
    input_scale: torch.Tensor | None,
    columns: torch.Tensor | None = None,
) -> float:
    """The same with quantized inputs: sum of ||Q(x) A^T - x W^T||^2 over sum of ||x W^T||^2; 0 for an all-zero output.

    rows: [n, in] inputs x; counts: [n] how many tokens each stands for. input_scale: of a static scheme.
    columns: [k] channels that stay in 16 bits, outside of the scale (`QuantTensor.outlier_columns`).
    """
    expected = rows @ w.T
    power = (expected.square().sum(1) * counts).sum().item()
    inputs = fake_quantize(rows if columns is None else rows.index_fill(1, columns, 0.0), scheme, input_scale)
    if columns is not None:
        inputs[:, columns] = rows[:, columns]
    outputs = inputs @ approximation.T
    return (outputs.sub_(expected).square_().sum(1) * counts).sum().item() / power if power > 0 else 0.0


def diagonal_blocks(hessian: torch.Tensor, columns: int) -> torch.Tensor:
    """The diagonal blocks of `hessian` [in, in] as [groups, columns, columns]; the whole of it is no copy."""
    groups = hessian.shape[0] // columns
    if groups == 1:
        return hessian[None]
    index = torch.arange(groups, device=hessian.device)
    return hessian.view(groups, columns, groups, columns)[index, :, index, :]
