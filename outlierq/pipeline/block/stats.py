"""A block's statistics: what gives them, from a finished file or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from outlierq.calibrate.batches import Batch
from outlierq.calibrate.collect import stored_fields
from outlierq.calibrate.stored.stats_file import StatsReader
from outlierq.core.errors import StatsError
from outlierq.core.measured.block_stats import BlockStats
from outlierq.core.model import Checkpoint, InputGroup, Structure
from outlierq.core.stats import InputStats
from outlierq.load import tokenizer_digest

if TYPE_CHECKING:
    import torch


class StatsSource(Protocol):
    """Gives each block's groups and statistics in turn.

    Tensors of a block are given by name, in the shape of their headers; statistics have the shapes of `InputStats` and
    `BlockStats`.
    identity: what the statistics belong to, as plain values; a run continues only with the same. seed: of their text.
    calibration: settings that were used instead of the recipe's, None where the recipe's were.
    made_of: digests of the source's tensors that finished statistics were made of, as `Checkpoint.bytes_read`.
    remark: a sentence for the report, or empty. notes: what was unusual in the block that was given last.
    """

    identity: dict[str, Any]
    seed: int | None
    made_of: Mapping[str, str]
    calibration: Mapping[str, Any] | None
    remark: str
    notes: list[str]

    def block(self, index: int) -> tuple[list[InputGroup], Mapping[str, InputStats]]:
        """Input groups with their proved folds, and statistics by group name."""
        ...

    def block_stats(self, index: int) -> BlockStats | None:
        """Statistics of the block itself, once `block` has given its groups; None when none were asked for."""
        ...

    def batches_to_learn(self, index: int) -> list[Batch]:
        """Block `index` on every batch of the text, between `block` and `finished`; empty where nothing learns."""
        ...

    def check_transformed(
        self, index: int, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]
    ) -> None:
        """NumbersError when the block's float32 output differs between its tensors `before` and `after` folding."""
        ...

    def finished(self, index: int, tensors: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """The block is written; `tensors` gives its weights as they lie on disk, dequantized."""
        ...

    def replay(self, index: int, tensors: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """An earlier run has written this block; only carry the hidden states past it."""
        ...


class NoStats:
    """For data-free recipes: every linear is its own group, without statistics of any shape."""

    def __init__(self, structure: Structure, *, remark: str = ""):
        self.structure, self.remark = structure, remark
        self.identity: dict[str, Any] = {}
        self.seed: int | None = None
        self.made_of: Mapping[str, str] = {}
        self.calibration: Mapping[str, Any] | None = None
        self.notes: list[str] = []

    def block(self, index: int) -> tuple[list[InputGroup], Mapping[str, InputStats]]:
        """One group per site."""
        return [InputGroup(site.module, (site,)) for site in self.structure.blocks[index].sites], {}

    def block_stats(self, index: int) -> BlockStats | None:
        """There are none."""
        return None

    def batches_to_learn(self, index: int) -> list[Batch]:
        """There are none."""
        return []

    def check_transformed(
        self, index: int, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]
    ) -> None:
        """Without the model there is nothing to run."""

    def finished(self, index: int, tensors: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """Nothing to carry on."""

    def replay(self, index: int, tensors: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """Nothing to carry on."""


class StatsFromFile(NoStats):
    """Statistics of an earlier `outlierq calibrate`, with the shapes of `InputStats`; no forward pass runs.

    Folds were proved on these very weights when the statistics were made, so they are not proved again. shifts: input
    group -> (bias of its producer, note), for the shifts that biases make possible which `structure` has more than the
    checkpoint that the statistics are of.
    """

    def __init__(
        self,
        folder: Path,
        checkpoint: Checkpoint,
        structure: Structure,
        needs: frozenset[str],
        *,
        shifts: Mapping[str, tuple[str, str]] | None = None,
    ):
        super().__init__(structure)
        self.shifts = shifts or {}
        self.reader = StatsReader(folder)
        self.check(checkpoint)
        self.made_of, self.calibration = self.reader.made_of, self.reader.calibration
        identity = self.reader.identity
        self.identity = {"statistics": identity.to_json()}
        self.seed = identity.settings["seed"]
        self.remark = f"statistics of an earlier calibration: {identity.token_description}"
        held = frozenset(identity.settings["fields"])
        missing = stored_fields(needs) - held
        if missing:
            raise StatsError(f"{folder} does not hold {', '.join(sorted(missing))}", hint="calibrate again")

    def check(self, checkpoint: Checkpoint) -> None:
        """StatsError unless they are of this checkpoint."""
        self.reader.check(checkpoint.fingerprint, tokenizer_digest(checkpoint))

    def block(self, index: int) -> tuple[list[InputGroup], Mapping[str, InputStats]]:
        """Read one block's file."""
        groups, stats = self.reader.block(index)
        return [self._as_now(group, index) for group in groups], stats

    def _as_now(self, group: InputGroup, index: int) -> InputGroup:
        """The group with the sites as they are now, which may have biases that they did not have."""
        now = {site.module: site for site in self.structure.blocks[index].sites}
        fold, (bias, note) = group.fold, self.shifts.get(group.name, ("", ""))
        if bias and fold is not None and fold.weight == f"{bias.removesuffix('bias')}weight":
            fold = replace(fold, bias=bias, shift=True, shift_note=note)
        return replace(
            group,
            sites=tuple(now.get(site.module, site) for site in group.sites),
            fold=fold,
            parts=tuple(self._as_now(part, index) for part in group.parts),
        )

    def block_stats(self, index: int) -> BlockStats | None:
        """As they were kept."""
        return self.reader.block_stats(index)
