"""Importance matrices of llama.cpp: written from our statistics, and read as statistics that know a diagonal only."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq.calibrate.collect import stored_fields
from outlierq.calibrate.stored.stats_file import StatsReader
from outlierq.core.errors import StatsError
from outlierq.core.model import InputGroup, LinearSite
from outlierq.core.stats import InputStats
from outlierq.export.gguf.architectures import architecture_of
from outlierq.export.gguf.imatrix import write_imatrix
from outlierq.export.gguf.names import expert_of, gguf_name
from outlierq.load.gguf.imatrix import Importance, read_imatrix
from outlierq.pipeline.block.stats import NoStats
from outlierq.pipeline.planning.plan import Plan

if TYPE_CHECKING:
    import torch

HELD = frozenset({"sum_sq"})
IN_BLOCK = re.compile(r"blk\.(\d+)\.")
OTHER = "it is of another model, or llama-imatrix was stopped; make it with this one"
NOTHING_SEEN = "the importance matrix says nothing of its input, which no token reached"


def imatrix_from(folder: Path, config: Mapping[str, Any], out: Path) -> None:
    """Write the statistics in a folder of `calibrate` as an importance matrix, each expert's own among them.

    config: of the model. StatsError when there are none. RecipeError for a model whose tensors have no names in GGUF
    files.
    """
    reader = StatsReader(folder)
    settings = reader.calibration
    matrices: dict[str, dict[int, torch.Tensor]] = {}
    counts: dict[str, dict[int, int]] = {}
    for index in reader.indices:
        groups, stats = reader.block(index)
        for site, known in _known(groups, stats):
            name, place = _name_of(site, config)
            matrices.setdefault(name, {})[place] = known.need("sum_sq")
            counts.setdefault(name, {})[place] = known.tokens
    entries = {name: _stacked(parts, counts[name]) for name, parts in matrices.items()}
    chunks = settings.get("samples", 0), settings.get("sequence_length", 0)
    write_imatrix(out, entries, reader.identity.token_description, chunks=chunks[0], chunk_size=chunks[1])


def _known(groups: list[InputGroup], stats: Mapping[str, InputStats]) -> Iterator[tuple[LinearSite, InputStats]]:
    """Every linear with the statistics of its input; those of an expert are of the tokens that it got."""
    for group in groups:
        apart = {site for part in group.parts for site in part.sites}
        if group.name in stats:
            yield from ((site, stats[group.name]) for site in group.sites if site not in apart)
        yield from _known(list(group.parts), stats)


def _name_of(site: LinearSite, config: Mapping[str, Any]) -> tuple[str, int]:
    """The name of a linear in a GGUF file, and its place in the tensor of all experts, 0 for what is in none."""
    known = architecture_of(config)
    return gguf_name(site.weight, "llama" if known is None else known.name), expert_of(site.weight) or 0


def _stacked(parts: Mapping[int, torch.Tensor], counts: Mapping[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums [matrices, in] and counts [matrices] by place; zeros for an expert that saw no token."""
    import torch

    size = max(parts) + 1
    empty = torch.zeros_like(next(iter(parts.values())))
    sums = torch.stack([parts.get(place, empty) for place in range(size)])
    return sums, torch.tensor([counts.get(place, 0) for place in range(size)], dtype=torch.float32)


class StatsFromImatrix(NoStats):
    """An importance matrix as statistics: the mean square of every input channel, and nothing else.

    StatsError when the recipe reads other fields, or the file is of another model.
    """

    def __init__(self, path: Path, plan: Plan):
        super().__init__(plan.structure)
        needs = plan.recipe.needs
        missing = stored_fields(needs) - HELD
        if missing:
            raise StatsError(
                f"{path.name} holds the mean square of every input channel only, and the recipe needs "
                f"{', '.join(sorted(missing))}",
                hint="calibrate with `outlierq calibrate` and give its folder, or take a recipe with quantize.method "
                "rtn and quantize.scale_search importance (gguf-imatrix-q4_k_m)",
            )
        self.imatrix, self._plan = read_imatrix(path), plan
        self._check_blocks()
        self.remark = f"statistics of {self.imatrix.description}"
        self.identity = {"statistics": {"imatrix": _digest(path)}}

    def _check_blocks(self) -> None:
        """StatsError when the matrix knows of blocks that the model has not."""
        blocks = len(self.structure.blocks)
        for name in self.imatrix.entries:
            number = IN_BLOCK.match(name)
            if number is not None and int(number[1]) >= blocks:
                raise StatsError(f"{self.imatrix.path.name} has {name}, and the model {blocks} blocks", hint=OTHER)

    def block(self, index: int) -> tuple[list[InputGroup], Mapping[str, InputStats]]:
        """One group per linear; without statistics where no token reached it."""
        groups, stats = [], {}
        for site in self.structure.blocks[index].sites:
            known = self._stats(site) if site in self._plan.schemes else None
            groups.append(InputGroup(site.module, (site,), fold_note=NOTHING_SEEN, routed=True))
            if known is not None:
                stats[site.module] = known
        return groups, stats

    def _stats(self, site: LinearSite) -> InputStats | None:
        """What the file knows of a linear's input; None where its sums are all 0. StatsError when it is not in it."""
        own = self._plan.in_own_names
        name, place = (site.weight, None) if own else _name_of(site, self._plan.checkpoint.config)
        entry = self.imatrix.entries.get(name)
        if entry is None:
            raise StatsError(f"{self.imatrix.path.name} has no {name}", hint=OTHER)
        matrices = self._matrices(site, name)
        if entry.sums.shape[1] != site.in_features or len(entry.sums) != matrices:
            held, meant = f"{len(entry.sums)} x {entry.sums.shape[1]}", f"{matrices} x {site.in_features}"
            raise StatsError(f"{self.imatrix.path.name} has {held} channels for {name}, the model {meant}", hint=OTHER)
        sums, tokens = _one_of(entry, place)
        return InputStats(tokens=tokens, sequences=1, sum_sq=sums) if tokens and sums.any() else None

    def _matrices(self, site: LinearSite, name: str) -> int:
        """How many matrices the tensor of a linear holds: one, or those of all experts."""
        if self._plan.in_own_names:
            frame = self._plan.checkpoint.frame
            return prod(frame.by_name[name].shape[:-2]) if frame is not None else 1
        config = self._plan.checkpoint.config
        sites = self.structure.blocks[site.block or 0].sites
        return sum(_name_of(other, config)[0] == name for other in sites)


def _one_of(entry: Importance, place: int | None) -> tuple[torch.Tensor, int]:
    """Sums and count of one matrix; of all experts together where they are one matrix of the model (None)."""
    if place is None:
        return entry.sums.double().sum(0), int(entry.counts.sum())
    return entry.sums[place].double(), int(entry.counts[place])


def _digest(path: Path) -> str:
    """XXH3-128 of the file, as hex."""
    import xxhash

    return xxhash.xxh3_128(path.read_bytes()).hexdigest()
