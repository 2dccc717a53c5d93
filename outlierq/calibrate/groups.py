"""Which sites of a block read the same input tensor: seen in a traced forward, not listed by architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from outlierq.calibrate.experts import with_parts
from outlierq.calibrate.trace import RunOnce, trace_block
from outlierq.core.model import InputGroup, LinearSite

if TYPE_CHECKING:
    import torch

    from outlierq.core.model import Block

NOT_RUN = "the model does not run its block for the calibration text"
# A module whose weight is used past its forward (`dt_proj` of Mamba), or that another block calls.
NOT_CALLED = "this site was not called in the traced forward; nothing is known of its input"


def find_groups(block_module: torch.nn.Module, block: Block, run_once: RunOnce) -> list[InputGroup]:
    """Sites that read the same data form one group; groups are in the order of the sites in the block.

    run_once: see `trace.RunOnce`. A site that was not called is a group of its own, and its `fold_note` says so.
    """
    trace = trace_block(block_module, block, run_once)
    members: dict[object, list[LinearSite]] = {}
    for site in block.sites:
        members.setdefault(trace.inputs.get(site.module, site.module), []).append(site)
    groups = []
    for sites in members.values():
        if sites[0].module in trace.inputs:
            groups.append(with_parts(InputGroup(sites[0].module, tuple(sites))))
        else:
            groups.append(InputGroup(sites[0].module, tuple(sites), fold_note=NOT_CALLED, routed=True))
    return groups


def unseen_groups(block: Block) -> list[InputGroup]:
    """Each site of a block that does not run, by itself: no tokens reach it, as if it were that of an idle expert."""
    return [InputGroup(site.module, (site,), fold_note=NOT_RUN, routed=True) for site in block.sites]
