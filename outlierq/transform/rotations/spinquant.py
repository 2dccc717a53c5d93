"""SpinQuant: rotations that learn against the rounding of inputs. Liu et al. 2024, arXiv:2405.16406.

Random rotations differ by much; those that minimise the loss of the rounded model (Eq. 2) are found on the orthogonal
matrices by Cayley's transform (Eq. 4, 5). Here the loss is the divergence from the original model, which needs no
labels, and weights stay as they are while rotations learn (as the paper does before GPTQ). R1 and R2 are made, which
merge into weights; R3 and R4 would have to turn inputs at run time.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt

from outlierq.registry import turner
from outlierq.transform.rotations.learning import Pace, learn
from outlierq.transform.rotations.turnable import Turnable, Turns, hadamard_turn


@turner("spinquant", paper="arXiv:2405.16406")
def spinquant(
    model: Turnable,
    *,
    residual: bool = True,
    values: bool = True,
    steps: Annotated[int, Ge(0)] = 60,
    step_size: Annotated[float, Gt(0)] = 0.03,
    seed: int = 0,
) -> Turns:
    """Rotate by matrices that learn, from random Hadamard matrices; the model computes the same.

    residual: R1, one matrix for the whole model. values: R2, a matrix for each key-value head. steps: each on
    some 2,000 tokens of the calibration text. step_size: the largest step, of the entries of the skew matrix. seed: of
    the random signs and the order of batches. Turns: orthogonal, in the shapes of
    `model.start`. What is worse on held-out text than not to turn, or than the start, is not taken.
    """
    names = model.rotations(residual=residual, values=values)
    start = {name: hadamard_turn(model, name, seed) for name in names}
    return learn(model, {"random signs": start}, Pace(steps, step_size, seed=seed))
