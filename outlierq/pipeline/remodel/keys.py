"""Which linears write the keys and the queries of a block, and which channels of them may share a scale.

Found by trying, on random weights: keys are divided by random numbers and queries multiplied, in every way in which
rotary embeddings pair channels; a block that then gives what it gave is one that allows it. Nothing is listed by
architecture. A norm behind the linears, or a linear that writes both, leaves no way.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import permutations
from typing import TYPE_CHECKING

import torch

from outlierq.calibrate.experts import routing
from outlierq.calibrate.stored.stats_file import StatsReader
from outlierq.calibrate.trace import trace_block
from outlierq.core.errors import StatsError
from outlierq.core.model import Block, Checkpoint, LinearSite, StudiedModel, largest
from outlierq.core.move import UNCHANGED
from outlierq.load import study
from outlierq.pipeline.remodel.anatomy import (
    MIN_CONTROL,
    Bench,
    Kind,
    Moved,
    Weights,
    kind_of,
    random_weights,
    relative_error,
)
from outlierq.pipeline.remodel.rewritten import RewrittenCheckpoint
from outlierq.transform.even_keys import KeyPath, Keys
from outlierq.transform.rotate import Change, Rewrite

if TYPE_CHECKING:
    from outlierq.transform.rotate import Read

SPREAD = 1.0  # of the logarithms of the random numbers, in base 2


def find_keys(checkpoint: Checkpoint, stats: str | None = None) -> Keys:
    """The paths of all blocks; of those that look alike, one is examined. stats: a folder of `outlierq calibrate`.

    StatsError for statistics of another model.
    """
    model = study(checkpoint)
    search = _Search(model)
    known: dict[Kind, tuple[Block, KeyPath | None]] = {}
    paths: list[KeyPath] = []
    without = ""
    for block in model.structure.blocks:
        kind = kind_of(search.bench.model, block)
        if kind not in known:
            known[kind] = block, search.examine(block)
        like, path = known[kind]
        if path is None:
            without = f"no two linears of {block.name} write queries and keys that meet with nothing but RoPE between"
            continue
        moved = Moved(search.noise.names, like, block)
        gain = None if path.gain is None else moved.tensors[path.gain]
        key, query = moved.sites[path.key], moved.sites[path.query]
        paths.append(replace(path, block=block.index, key=key, query=query, gain=gain))
    return Keys(tuple(_sized(checkpoint, paths, stats) if stats else paths), without)


def _sized(checkpoint: Checkpoint, paths: list[KeyPath], stats: str) -> Iterator[KeyPath]:
    """The paths with what calibration saw of their keys."""
    from outlierq.load import tokenizer_digest

    while isinstance(checkpoint, RewrittenCheckpoint):  # rotations leave keys what they were
        checkpoint = checkpoint.original
    reader = StatsReader(stats)
    reader.check(checkpoint.fingerprint, tokenizer_digest(checkpoint))
    for path in paths:
        seen = reader.block_stats(path.block)
        if seen is None:
            raise StatsError(f"{stats} holds nothing of block {path.block}", hint="calibrate again with this version")
        yield replace(path, sizes=tuple(seen.need("key_abs_max").flatten().tolist()))


class _Search:
    """Tries linears and pairings."""

    def __init__(self, model: StudiedModel):
        self.bench, self.noise = Bench(model), random_weights(model)
        config = self.bench.model.config.get_text_config()
        self.heads = largest(config, "num_attention_heads") or 0
        self.key_heads = largest(config, "num_key_value_heads") or self.heads
        width = self.bench.before(self.noise).shape[-1]
        generator = torch.Generator().manual_seed(1)
        self.hidden = 0.3 + torch.randn((*self.bench.ids.shape, width), generator=generator)

    def examine(self, block: Block) -> KeyPath | None:
        """The path of one block, or None."""
        expected = self.bench.block(self.noise, block.index, self.hidden)
        for path in self._candidates(block):
            key, both = self._stretched(path)
            if relative_error(self._run(block, both), expected) > UNCHANGED:
                continue
            if relative_error(self._run(block, key), expected) > MIN_CONTROL:
                return path
        return None

    def _candidates(self, block: Block) -> Iterator[KeyPath]:
        """Two linears with one input, as wide as heads, in every pairing; scales of one channel alone come first."""
        if not self.heads or self.heads % max(self.key_heads, 1):
            return

        def run(module: torch.nn.Module) -> torch.Tensor:
            with torch.no_grad(), routing(module, "probe"):
                return self.bench.runner.forward(module, block.index, 0, self.hidden)

        with self.bench.filled(self.noise, block.index) as module:
            trace = trace_block(module, block, run)
            norms = {
                written: (f"{block.name}.{name}.weight", _is_offset(module.get_submodule(name)))
                for name, written in trace.written.items()
            }
        for query, key in permutations(block.sites, 2):
            inputs = [trace.inputs.get(site.module) for site in (query, key)]
            size = query.out_features // self.heads
            fits = query.out_features == self.heads * size and key.out_features == self.key_heads * size
            if size < 2 or not fits or inputs[0] is None or inputs[0] != inputs[1]:
                continue
            slot, offset = norms.get(inputs[0], ("", False))
            for places in pairings(size):
                path = self._path(block, query, key, places)
                yield replace(path, gain=self.noise.names.get(slot), offset=offset)

    def _path(self, block: Block, query: LinearSite, key: LinearSite, places: list[int]) -> KeyPath:
        """The path with this number of a scale for each place in a head."""
        size, group = len(places), self.heads // self.key_heads
        scales = max(places) + 1
        shared = tuple(head * scales + place for head in range(self.key_heads) for place in places)
        queries = tuple(head // group * size + place for head in range(self.heads) for place in range(size))
        return KeyPath(block.index, key, query, shared, queries, self.key_heads)

    def _run(self, block: Block, rewrite: Rewrite) -> torch.Tensor:
        """What the block gives with rewritten weights, [sequences, tokens, channels]."""
        weights: Weights = self.noise.rewritten(rewrite)
        return self.bench.block(weights, block.index, self.hidden)

    def _stretched(self, path: KeyPath) -> tuple[Rewrite, Rewrite]:
        """Random scales: of the keys alone, and of both."""
        noise = torch.randn(max(path.shared) + 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        scale = (noise * SPREAD).exp2()[torch.tensor(path.shared)]
        key = _times(path.key, 1 / scale)
        return Rewrite(key), Rewrite(key | _times(path.query, scale[torch.tensor(path.queries)]))


def pairings(size: int) -> Iterator[list[int]]:
    """For heads of `size` channels, the number of the scale of each: all their own; or shared by the two halves of the
    first 1, 1/2 or 1/4 of them, or by neighbours, as rotary embeddings pair them.
    """
    yield list(range(size))
    for rotated in (size, size // 2, size // 4):
        half = rotated // 2
        if half < 1:
            continue
        alone = [half + place for place in range(size - 2 * half)]
        yield [place % half for place in range(2 * half)] + alone
        yield [place // 2 for place in range(2 * half)] + alone


@dataclass(frozen=True)
class _Times:
    """Channels times `scale` [channels]."""

    scale: torch.Tensor
    held: int = 0

    def __call__(self, x: torch.Tensor, read: Read) -> torch.Tensor:
        """x [..., channels] times the scale."""
        return x * self.scale.to(x)


def _is_offset(norm: torch.nn.Module) -> bool:
    """Whether a norm's gain is 1 + weight: with a weight of zeros something comes out."""
    part = copy.deepcopy(norm).float()
    gain = torch.zeros_like(part.get_parameter("weight"))
    part.weight = torch.nn.Parameter(gain, requires_grad=False)
    with torch.no_grad():
        given: torch.Tensor = part(torch.randn(2, len(gain)))
    bias = getattr(part, "bias", None)
    return bool((given - (0 if bias is None else bias)).abs().max() > 0)


def _times(site: LinearSite, scale: torch.Tensor) -> dict[str, Change]:
    """The outputs of a linear, and its bias, times [outputs]."""
    spin = _Times(scale)
    changes = {site.weight: Change(site.weight, site.transposed, by_output=(spin,))}
    if site.bias is not None:
        changes[site.bias] = Change(site.bias, by_output=(spin,), weight=site.weight)
    return changes
