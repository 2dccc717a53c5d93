"""KLT-enhanced rotation: the eigenvectors of what a rotation sees, then a Hadamard matrix. MambaQuant, Xu et al. 2025,
arXiv:2501.13484.

A Hadamard matrix makes channels alike only where they do not depend on each other. With C = K diag(l) K^T (Eq. 6) the
channels of x K do not, and those of x K H all have the variance sum(l) / n (Eq. 8): no channel stands out on average.
C is of the model's inputs here; `rotate, start: weights` has that of the weights that read them.
"""

from __future__ import annotations

import torch

from outlierq.core.errors import RecipeError
from outlierq.core.notes import note
from outlierq.ops.hadamard import largest_order
from outlierq.registry import turner
from outlierq.transform.rotations.turnable import RESIDUAL, Turnable, Turns, hadamard_turn


@turner("klt", paper="arXiv:2501.13484")
def klt(model: Turnable, *, residual: bool = True, values: bool = True, seed: int = 0) -> Turns:
    """Rotate by the eigenvectors of the inputs and a Hadamard matrix; the model computes the same.

    residual: the stream between the blocks, one matrix for the whole model. values: the values of attention, a matrix
    for each key-value head. seed: of the random signs. Turns: orthogonal, in the shapes of `model.start`. RecipeError
    for the stream of a model with LayerNorm, whose mean the eigenvectors would mix, and for a width that no Hadamard
    matrix fits: eigenvectors alone would gather what is large in a few channels.
    """
    names = model.rotations(residual=residual, values=values)
    if model.keeps_mean and RESIDUAL in names:
        raise RecipeError(
            "klt: eigenvectors mix the mean of the stream into other channels, which LayerNorm would not take out",
            hint="set `residual: false` for this model, or use `rotate`",
        )
    for width in sorted({model.start[name].shape[-1] for name in names}):
        _check_width(width)
    return {name: eigenvectors(model.moments(name)) @ hadamard_turn(model, name, seed) for name in names}


def _check_width(width: int) -> None:
    """RecipeError where there is nothing to mix eigenvectors with; a note where they mix in blocks only."""
    block = largest_order(width)
    if block < 4:
        raise RecipeError(
            f"klt: no Hadamard matrix fits {width} channels",
            hint="set `residual: false` or `values: false`, or use `spinquant`, which learns from any start",
        )
    if block < width:
        note(f"channels get the same energy only within each of {width // block} blocks of {block}")


def eigenvectors(moments: torch.Tensor) -> torch.Tensor:
    """Of symmetric matrices [parts, n, n], as columns in the same shape, float64, each with a positive sum.

    The sign is a convention: without one, two machines may give different matrices.
    """
    vectors = torch.linalg.eigh(moments.double())[1]
    signs = torch.where(vectors.sum(-2, keepdim=True) < 0, -1.0, 1.0)
    signed: torch.Tensor = vectors * signs
    return signed
