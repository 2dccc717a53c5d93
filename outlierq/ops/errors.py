"""Output error of a changed weight, from the hessian of its input alone."""

from __future__ import annotations

import torch


def output_error(change: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """tr(D H D^T): mean over tokens of the squared change of the output. change: [out, in], hessian: [in, in]."""
    return ((change @ hessian) * change).sum()


def relative_output_error(w: torch.Tensor, approximation: torch.Tensor, hessian: torch.Tensor) -> float:
    """Output error of `approximation` divided by the mean squared output of `w`; 0 for an all-zero output."""
    power = output_error(w, hessian).item()
    return output_error(approximation - w, hessian).item() / power if power > 0 else 0.0


def relative_weight_error(w: torch.Tensor, approximation: torch.Tensor) -> float:
    """Squared Frobenius norm of the change divided by that of the weight."""
    power = w.square().sum().item()
    return (approximation - w).square().sum().item() / power if power > 0 else 0.0


def diagonal_blocks(hessian: torch.Tensor, columns: int) -> torch.Tensor:
    """The diagonal blocks of `hessian` [in, in] as [groups, columns, columns]."""
    groups = hessian.shape[0] // columns
    index = torch.arange(groups, device=hessian.device)
    return hessian.view(groups, columns, groups, columns)[index, :, index, :]
