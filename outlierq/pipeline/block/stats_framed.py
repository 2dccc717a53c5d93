"""Statistics of a Hugging Face model for a GGUF file of it: matched by gguf's names, proved by bytes of weights.

A hessian is of a linear's input, and llama.cpp's converter changes the order of rows, the outputs, at most. So the
statistics fit as they are, once it is proved that both files hold the same weights: of each tensor that statistics were
made of they keep a digest, and some order of the file's rows in some 16 or 32 bits must give that very digest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from outlierq.core.errors import OutlierqError, StatsError
from outlierq.core.model import Checkpoint, InputGroup, LinearSite, Structure
from outlierq.core.stats import InputStats
from outlierq.export.gguf.names import expert_of, gguf_name
from outlierq.export.writer import as_bytes
from outlierq.pipeline.block.stats import StatsFromFile

if TYPE_CHECKING:
    import torch

HINT = (
    "write the Hugging Face model into the frame of this file instead: outlierq quantize MODEL --like FILE.gguf --stats"
)
UNKNOWN = "the statistics have none of its input in the form that the file has it"


class StatsForFrame(StatsFromFile):
    """Statistics of an earlier `outlierq calibrate` of the Hugging Face model. StatsError where a weight is another."""

    def __init__(self, folder: Path, checkpoint: Checkpoint, structure: Structure, needs: frozenset[str]):
        assert checkpoint.frame is not None, "a file under its own names has a frame"
        self._architecture = checkpoint.frame.architecture
        super().__init__(folder, checkpoint, structure, needs)

    def check(self, checkpoint: Checkpoint) -> None:
        """Every linear that has statistics is the one that they were made of."""
        heads = self._heads(checkpoint)
        for block in self.structure.blocks:
            for group in self.reader.block(block.index)[0]:
                for theirs, site in self._pairs(group, block.index):
                    if self.reader.made_of.get(theirs.weight, "") not in _digests(checkpoint.read(site.weight), heads):
                        raise StatsError(
                            f"tensor {site.weight} of {checkpoint.source} is not {theirs.weight}, of which the "
                            "statistics were made",
                            hint=HINT,
                        )

    def block(self, index: int) -> tuple[list[InputGroup], Mapping[str, InputStats]]:
        """Groups of the sites of the file; those without statistics of theirs are groups of their own."""
        groups, stats = self.reader.block(index)
        found = []
        for group in groups:
            sites = tuple(site for _, site in self._pairs(group, index))
            if sites and group.name in stats:
                found.append(replace(group, sites=sites, fold=None, fold_note="", parts=(), routed=False))
        known = {site for group in found for site in group.sites}
        rest = [site for site in self.structure.blocks[index].sites if site not in known]
        alone = [InputGroup(site.module, (site,), fold_note=UNKNOWN, routed=True) for site in rest]
        return [*found, *alone], {group.name: stats[group.name] for group in found}

    def _pairs(self, group: InputGroup, index: int) -> Iterator[tuple[LinearSite, LinearSite]]:
        """(site of the statistics, site of the file) of those that are one matrix in both."""
        now = {site.weight: site for site in self.structure.blocks[index].sites}
        for site in group.sites:
            try:
                name = gguf_name(site.weight, self._architecture)
            except OutlierqError:
                continue
            if name in now and expert_of(site.weight) is None:
                yield site, now[name]

    def _heads(self, checkpoint: Checkpoint) -> tuple[int, ...]:
        """Over how many heads rows may be reordered."""
        numbers = (checkpoint.config.get(key) for key in ("num_attention_heads", "num_key_value_heads"))
        return tuple(number for number in numbers if isinstance(number, int) and number)


def _digests(weight: torch.Tensor, heads: tuple[int, ...]) -> Iterator[str]:
    """XXH3-128 of the bytes of a weight [out, in] in every order of rows and dtype that the model may have it in."""
    import torch
    import xxhash

    orders = [weight]
    for count in heads:
        if not len(weight) % (2 * count):
            orders.append(weight.view(count, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape))
    for order in orders:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            yield xxhash.xxh3_128_hexdigest(as_bytes(order.to(dtype)))
