"""Models that run their blocks several times for each token: seen by running one without weights, blocks left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from outlierq.core.forward import StopForward, several_rounds, stopping_at_head
from outlierq.load.model.decoder import block_list
from outlierq.load.model.skeleton import config_errors, leave_empty, release

if TYPE_CHECKING:
    import torch

    from outlierq.core.model import StudiedModel

Returned: TypeAlias = "torch.Tensor | tuple[torch.Tensor, None]"
MOST_CALLS = 1000  # a stub's outputs may be none that a loop ends by


def refuse_rounds(model: StudiedModel) -> None:
    """SourceError where the model runs a block more than once in a forward: statistics would be of one round only.

    A model that does not run without its weights is not judged; calibration looks again.
    """
    if model.checkpoint.studied() is not None:
        return  # no class runs it
    name, count = most_called(model.skeleton)
    if count > 1:
        raise several_rounds(model.skeleton, name, count)


def most_called(skeleton: Any) -> tuple[str, int]:
    """The block that a forward of the model calls most often, and how often; 0 when it does not run without weights.

    The skeleton's parameters are on the meta device again afterwards.
    """
    import torch

    list_name, blocks = block_list(skeleton)
    dtype = next((p.dtype for p in skeleton.parameters() if p.is_floating_point()), torch.bfloat16)
    leave_empty(skeleton, dtype, "cpu", skip=list(blocks))
    calls: Counter[str] = Counter()
    try:
        for wrap in (lambda hidden: hidden, lambda hidden: (hidden, None)):  # blocks return one or the other
            with torch.no_grad(), _counted(list_name, blocks, wrap, calls):
                _run(skeleton)
            if calls.total() >= len(blocks):
                break
    finally:
        release(skeleton)
    return calls.most_common(1)[0] if calls else ("", 0)


def _run(skeleton: Any) -> None:
    """One forward of two tokens, as far as it gets; torch would copy a head that takes no memory to multiply by it."""
    import torch

    try:
        with stopping_at_head(skeleton):
            skeleton(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
    except (StopForward, *config_errors(), ImportError, AssertionError):  # what a class cannot do without weights
        return


@contextmanager
def _counted(
    list_name: str, blocks: torch.nn.ModuleList, wrap: Callable[[Any], Returned], calls: Counter[str]
) -> Iterator[None]:
    """Inside, blocks hand the hidden states on as they are, and each call is counted anew."""
    calls.clear()

    def stub(name: str, *args: Any, **kwargs: Any) -> Returned:
        calls[name] += 1
        if calls[name] > MOST_CALLS:
            raise StopForward
        return wrap(args[0] if args else next(iter(kwargs.values())))

    for index, block in enumerate(blocks):
        block.forward = partial(stub, f"{list_name}.{index}")
    try:
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
