"""`outlierq detect`: every outlier measure over a checkpoint, from statistics and weights alone."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from outlierq.core.errors import OutputError, SourceError, StatsError, during
from outlierq.core.machine.heap import return_freed_memory
from outlierq.core.machine.own_files import write_atomically
from outlierq.core.measured.outliers import BlockOutliers, GroupOutliers, OutlierReport
from outlierq.core.model import Block, Checkpoint, InputGroup, LinearSite
from outlierq.core.stats import InputStats
from outlierq.pipeline.asked.events import Event, Listener, silent
from outlierq.pipeline.asked.resources import USUAL, Resources

if TYPE_CHECKING:
    import torch

    from outlierq.calibrate.stored.stats_file import StatsReader
    from outlierq.core.measured.block_stats import BlockStats
    from outlierq.pipeline.block.stats_run import StatsFromRun
    from outlierq.recipe import Calibration

# Without statistics at hand, a short calibration: channels and massive tokens show in a few thousand tokens.
QUICK = {"samples": 16, "sequence_length": 256, "unseen_tokens": False}  # what is shown is of text


@dataclass(frozen=True)
class BlockData:
    """What is known of one block. inputs: by group name; a group that no token reached has none."""

    index: int
    groups: Sequence[InputGroup]
    inputs: Mapping[str, InputStats]
    stats: BlockStats | None


@dataclass(frozen=True)
class Statistics:
    """Where the figures come from, in words, and the blocks in order. notes: what was unusual in making them."""

    description: str
    total: int
    blocks: Iterator[BlockData]
    notes: list[str]


def from_folder(folder: Path, checkpoint: Checkpoint) -> Statistics:
    """Statistics that `outlierq calibrate` wrote; StatsError when they are of another model."""
    from outlierq.calibrate.stored.stats_file import StatsReader
    from outlierq.load import tokenizer_digest

    reader = StatsReader(folder)
    reader.check(checkpoint.fingerprint, tokenizer_digest(checkpoint))
    description = f"{folder}: {reader.identity.token_description}"
    return Statistics(description, len(reader.indices), _read(reader, checkpoint), list(reader.notes))


def _read(reader: StatsReader, checkpoint: Checkpoint) -> Iterator[BlockData]:
    """One file a block; StatsError when the weights that were looked at since are not those that it was made of."""
    from outlierq.calibrate.stored.stats_file import check_made_of

    for index in reader.indices:
        groups, inputs = reader.block(index)
        yield BlockData(index, groups, inputs, reader.block_stats(index))
        check_made_of(reader.made_of, checkpoint.bytes_read)


def quick_settings() -> Calibration:
    """The calibration that is run when there are no statistics."""
    from outlierq.recipe import Calibration

    return Calibration(**QUICK)


def from_run(checkpoint: Checkpoint, settings: Calibration, work: Path, resources: Resources = USUAL) -> Statistics:
    """Statistics of the model run now, block by block; none of them are kept. work: for large hidden states."""
    from outlierq.calibrate.collect import ALL_FIELDS
    from outlierq.core.measured.block_stats import BLOCK_FIELDS
    from outlierq.load import study
    from outlierq.pipeline.block.stats_run import Asked, StatsFromRun, token_set

    model = study(checkpoint)
    tokens = token_set(model, settings)
    unheard = replace(resources, listen=silent)
    source = StatsFromRun(model, tokens, settings, work, unheard, asked=Asked(ALL_FIELDS | BLOCK_FIELDS))
    structure = model.structure
    notes: list[str] = []
    description = f"a short calibration just now, not kept: {tokens.description}"
    return Statistics(description, len(structure.blocks), _run(source, structure.blocks, notes), notes)


def _run(source: StatsFromRun, blocks: Sequence[Block], notes: list[str]) -> Iterator[BlockData]:
    """One forward pass a block."""
    for block in blocks:
        groups, inputs = source.block(block.index)
        notes += source.notes
        yield BlockData(block.index, groups, inputs, source.block_stats(block.index))
        source.finished(block.index, dict)


def detect(checkpoint: Checkpoint, *, stats: Path | None = None, resources: Resources = USUAL) -> OutlierReport:
    """The outlier report of a model. stats: a folder of `outlierq calibrate`; without it a short calibration runs."""
    from outlierq.load import check_recorded, served

    check_recorded(checkpoint)
    plain = served(checkpoint)
    if stats is not None:
        return report(plain, from_folder(stats, checkpoint), listen=resources.listen)
    with tempfile.TemporaryDirectory(prefix="outlierq-detect-") as work:
        run = from_run(plain, quick_settings(), Path(work), resources)
        return report(plain, run, listen=resources.listen)


def report(checkpoint: Checkpoint, statistics: Statistics, *, listen: Listener = silent) -> OutlierReport:
    """Measure block by block; one block's weights and statistics are in memory at a time."""
    from outlierq.detect.summary import summarise

    started = time.perf_counter()
    model = _Model(checkpoint)
    for data in statistics.blocks:
        listen(Event("detect", data.index, statistics.total, f"block {data.index}"))
        with during("detect", f"block {data.index}"):
            model.add(data)
        return_freed_memory()
    listen(Event("detect", statistics.total, statistics.total))
    features, channels = model.features(), model.outlier_channels()
    blocks = model.with_texts()
    notes = (*dict.fromkeys(statistics.notes), *model.notes, *_ways_out(checkpoint))
    return OutlierReport(
        model=checkpoint.source,
        fingerprint=checkpoint.fingerprint,
        statistics=statistics.description,
        seconds=time.perf_counter() - started,
        groups=tuple(model.groups),
        blocks=blocks,
        outlier_features=features,
        outlier_channels=channels,
        summary=summarise(model.groups, blocks, features, channels, model.super_weight),
        notes=notes,
    )


def _ways_out(checkpoint: Checkpoint) -> list[str]:
    """A sentence on attentions that need no sink, where the model has some; a file without a class has none."""
    from outlierq.core.windows import limit_of
    from outlierq.detect.blocks.ways_out import sentence, way_out
    from outlierq.load import attention_names, build_skeleton

    if checkpoint.studied() is not None:
        return []
    model = build_skeleton(checkpoint)
    hidden, heads = (limit_of(model, name) for name in ("hidden_size", "num_attention_heads"))
    if not hidden or not heads:
        return []
    sizes = heads, limit_of(model, "num_key_value_heads") or heads, limit_of(model, "head_dim") or hidden // heads
    said = sentence([way_out(model.get_submodule(name), *sizes, hidden) for name in attention_names(model)])
    return [said] if said else []


class _Model:
    """What has been measured so far."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.groups: list[GroupOutliers] = []
        self.blocks: list[BlockOutliers] = []
        self.notes: list[str] = []
        self.super_weight: str | None = None
        self._ratios: list[list[torch.Tensor]] = []  # by block, of the inputs that read the normalised stream
        self._counted: list[InputStats] = []  # of the inputs that LLM.int8() counts, reduced to the counts
        self._width: int | None = None

    def add(self, data: BlockData) -> None:
        """Measure one block."""
        from outlierq.detect.stage import find_super_weight, measure_block, measure_group

        weights = self._weights(data)
        for group in data.groups:
            with during("detect", group.name):
                self.groups.append(measure_group(data.index, group, data.inputs.get(group.name), weights[group.name]))
        measured = measure_block(data.index, data.stats, data.inputs, weights)
        self.blocks.append(measured)
        if self._width is None:
            self._width = stream_width(data)
        self._keep_stream(data)
        if measured.massive and self._width is not None and not any(block.massive for block in self.blocks[:-1]):
            self.super_weight = find_super_weight(measured.massive[0], data.inputs, weights, self._width)

    def _weights(self, data: BlockData) -> dict[str, dict[LinearSite, torch.Tensor]]:
        """[out, in] of every site, by group name."""
        from outlierq.core.model import as_matrix

        sites = [site for group in data.groups for site in group.sites]
        stored = self.checkpoint.read_many(dict.fromkeys(site.weight for site in sites))
        return {g.name: {site: as_matrix(site, stored[site.weight]) for site in g.sites} for g in data.groups}

    def _keep_stream(self, data: BlockData) -> None:
        """Keep what the model-wide findings need of the inputs as wide as the residual stream."""
        from outlierq.detect.inputs.channel_ratio import channel_ratios

        ratios = []
        for group in data.groups:
            stats = data.inputs.get(group.name)
            if stats is None or not stats.tokens or stats.channels != self._width:
                continue
            if stats.count_large is not None and stats.sequence_large is not None:
                counts = {"count_large": stats.count_large, "sequence_large": stats.sequence_large}
                self._counted.append(InputStats(stats.tokens, stats.sequences, **counts))
            if group.fold is None or group.fold.kind != "linear":
                try:
                    ratios.append(channel_ratios(stats.need("abs_max")))
                except StatsError as error:
                    self.notes.append(f"{group.name} does not count for outlier channels: {error.what}")
        self._ratios.append(ratios)

    def outlier_channels(self) -> tuple[int, ...]:
        """Channels of the residual stream that stand out in most blocks."""
        from outlierq.detect.inputs.channel_ratio import persistent_channels

        if not any(self._ratios):
            self.notes.append("no input reads the residual stream through a norm, so there are no outlier channels")
        return persistent_channels(self._ratios)

    def features(self) -> dict[str, tuple[float, float]]:
        """LLM.int8()'s outlier features, channel numbers as text like in JSON."""
        from outlierq.detect.inputs.llm_int8 import outlier_features

        if not self._counted:
            self.notes.append("LLM.int8() outlier features: no counts of |x| >= 6 in the statistics (calibrate again)")
        return {str(channel): shares for channel, shares in outlier_features(self._counted).items()}

    def with_texts(self) -> tuple[BlockOutliers, ...]:
        """The blocks, with the text of every massive token."""
        from outlierq.load.token_text import token_texts

        tokens = {entry.token for block in self.blocks for entry in block.massive}
        if not tokens:
            return tuple(self.blocks)
        try:
            texts = token_texts(self.checkpoint, tokens)
        except SourceError as error:
            self.notes.append(f"massive tokens are shown without their text: {error.what}")
            texts = {}
        return tuple(
            replace(block, massive=tuple(replace(entry, text=texts.get(entry.token, "")) for entry in block.massive))
            for block in self.blocks
        )


def stream_width(data: BlockData) -> int | None:
    """Channels of the residual stream: as its statistics say, else what the block's first input has."""
    if data.stats is not None and data.stats.residual_abs_max is not None:
        return len(data.stats.residual_abs_max)
    return data.groups[0].sites[0].in_features if data.groups and data.groups[0].sites else None


def write_json(report: OutlierReport, path: Path) -> None:
    """The report as JSON, all of it or nothing; its folder is made if need be."""
    content = json.dumps(report.to_dict(), allow_nan=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content.encode())
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
