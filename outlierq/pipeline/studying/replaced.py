"""A copy of a model whose weights are approximated, and its inputs rounded, while the original stays beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from outlierq.core.approximation import Approximation
from outlierq.core.errors import SourceError
from outlierq.core.model import LinearSite, from_matrix
from outlierq.core.scheme import ActivationScheme

if TYPE_CHECKING:
    import torch


def copied(model: torch.nn.Module) -> torch.nn.Module:
    """A copy to change."""
    return copy.deepcopy(model)


def replace(model: torch.nn.Module, made: Mapping[LinearSite, Approximation], inputs: ActivationScheme | None) -> None:
    """Put approximated weights [out, in] in the place of those of a model.

    inputs: how the input of every one of them is rounded in a forward; a branch reads it as it was. SourceError for a
    linear that has no module of its own.
    """
    for site, each in made.items():
        module = model.get_submodule(site.module)
        weight: torch.Tensor | None = getattr(module, "weight", None)
        if weight is None or weight.shape != from_matrix(site, each.weight).shape:
            raise SourceError(f"{site.module} has no weight of its own, so it cannot be studied apart")
        weight.data.copy_(from_matrix(site, each.weight))
        if each.branch is not None or inputs is not None:
            vars(module)["forward"] = _beside(module.forward, each, inputs)


def _beside(
    forward: Callable[[torch.Tensor], torch.Tensor], made: Approximation, inputs: ActivationScheme | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward on rounded inputs, with the branch of the original ones added."""
    from outlierq.ops.activations import fake_quantize

    def both(x: torch.Tensor) -> torch.Tensor:
        output = forward(x if inputs is None else fake_quantize(x, inputs))
        if made.branch is None:
            return output
        down, up = made.branch
        return output + (x @ down.T.to(x.dtype)) @ up.T.to(x.dtype)

    return both
