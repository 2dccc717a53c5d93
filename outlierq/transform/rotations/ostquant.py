"""OSTQuant: pairs of a rotation and scales that learn together. Hu et al. 2025, arXiv:2501.13987.

A rotation alone cannot fill the cube that a quantizer spans where channels differ in what they carry: with scales
beside it, x -> x R / s, it can (QSUR, Eq. 2 to 5). Pairs stand where they cancel: behind norms (x R / s: the gain of
the norm becomes 1 / s), on the values of attention (x / s R), and between linears that feed each other, such as up and
down, scales alone. All learn against the divergence of the rounded model from the original; the paper's KL-Top takes
the 1,000 likeliest tokens of it to save memory, here logits are made for a few positions at a time, and all count. They
start from WOMI, the eigenvectors of the weights that read each input and a Hadamard matrix, or from random signs where
that is better. R3, R4 and scales of queries and keys are not made.
"""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge, Gt

from outlierq.registry import turner
from outlierq.transform.rotations.klt import eigenvectors
from outlierq.transform.rotations.learning import Pace, learn
from outlierq.transform.rotations.turnable import RESIDUAL, SCALE, Turnable, Turns, hadamard_turn, kind_of


@turner("ostquant", paper="arXiv:2501.13987")
def ostquant(
    model: Turnable,
    *,
    residual: bool = True,
    values: bool = True,
    scales: bool = True,
    steps: Annotated[int, Ge(0)] = 60,
    step_size: Annotated[float, Gt(0)] = 0.03,
    seed: int = 0,
) -> Turns:
    """Rotate and scale by pairs that learn, from the eigenvectors of the weights; the model computes the same.

    residual: one matrix for the whole model. values: a matrix for each key-value head. scales: of every input that has
    something to fold them into. steps: each on some 2,000 tokens of the calibration text. step_size: the largest step,
    of the entries of the skew matrix; that of the logarithm of scales is a third. seed: of the random signs and the
    order of batches. Turns: in the shapes of `model.start`. What is worse on held-out text
    than not to turn, or than the start, is not taken.
    """
    names = model.rotations(residual=residual, values=values)
    plain = {name: each for name, each in model.start.items() if scales and kind_of(name) == SCALE}
    signs: dict[str, torch.Tensor] = plain | {name: hadamard_turn(model, name, seed) for name in names}
    starts = {"random signs": signs, "the weights' eigenvectors": {**signs, **womi(model, names, seed)}}
    return learn(model, starts, Pace(steps, step_size, step_size / 3, seed))


def womi(model: Turnable, names: list[str], seed: int) -> Turns:
    """Rotations after which every channel of the weights has the same energy, of those names, in their shapes.

    Not of a stream whose mean they would mix, as LayerNorm takes it out.
    """
    apt = [name for name in names if not (model.keeps_mean and kind_of(name) == RESIDUAL)]
    return {name: eigenvectors(model.weights(name)) @ hadamard_turn(model, name, seed) for name in apt}
