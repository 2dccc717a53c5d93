"""The stress model: the same function as a given checkpoint, with outlier channels at chosen places.

A norm's gain times f and the matching input columns of everything that reads the norm divided by f change nothing that
the model computes, but the linears now see f times larger inputs in those channels. It is SmoothQuant's rewrite
(arXiv:2211.10438, Eq. 3) run backwards, and imitates what arXiv:2208.07339 found in models above 6.7B parameters: a few
channels, the same in every layer, 20 and more times larger than the rest.

Any producer and reader that `calibrate` proves to fold into each other can be used; nothing is listed by architecture.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from outlierq.calibrate.folds import apply_fold, prove_folds
from outlierq.calibrate.groups import find_groups
from outlierq.calibrate.runner import PROBE_TOKENS, BlockRunner, PartWeights
from outlierq.core.errors import OutlierqError, SourceError
from outlierq.core.model import Checkpoint, DerivedCheckpoint, InputGroup, LinearSite, StudiedModel
from outlierq.load import load_tensors_into, release, study
from outlierq.load.source.shards import torch_dtype
from outlierq.transform.stage import storable_scale

if TYPE_CHECKING:
    import torch

NORMS = ("norm", "offset-norm")


def stressed(
    checkpoint: Checkpoint,
    channels: int | Sequence[int] = 6,
    factor: float = 60.0,
    *,
    seed: int = 0,
) -> StressedCheckpoint:
    """`checkpoint` with the outputs of its norms `factor` times larger in some channels, and the readers adapted.

    channels: their numbers, or how many to draw with `seed`; they are the same in every block. Stored gains are rounded
    to their dtype first and the readers take the factor that this leaves, so only the readers' columns are rounded
    once more. A power of two (64) therefore gives back the very same function, to the bit, for plain norms.
    SourceError when no norm of the model may be scaled.
    """
    if not factor > 1:
        raise OutlierqError(f"a factor of {factor:g} makes no outliers", hint="use a factor above 1")
    groups = [g for g in proved_groups(study(checkpoint)) if g.fold and g.fold.kind in NORMS]
    if not groups:
        raise SourceError(f"no norm of {checkpoint.source} may be scaled", hint="its readers are not its only users")
    width = Counter(group.sites[0].in_features for group in groups).most_common(1)[0][0]
    return StressedCheckpoint(
        checkpoint,
        [group for group in groups if group.sites[0].in_features == width],
        _channel_numbers(channels, width, seed),
        factor,
    )


def proved_groups(model: StudiedModel) -> list[InputGroup]:
    """The input groups of every block with the folds that were proved for them; one short probe runs, no text."""
    import torch

    checkpoint, skeleton, structure = model.checkpoint, model.skeleton, model.structure
    blocks = [block.name for block in structure.blocks]

    def materialise(name: str) -> None:
        part = skeleton.get_submodule(name) if name else skeleton
        skip = () if name else blocks
        load_tensors_into(part, checkpoint, model.names, prefix=name, skip=skip, dtype="float32")

    def forget(name: str) -> None:
        release(skeleton.get_submodule(name) if name else skeleton)

    runner = BlockRunner(skeleton, structure, PartWeights(materialise, forget), dtype=torch.float32)
    vocabulary = skeleton.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    hidden = runner.start(ids)
    proved: list[InputGroup] = []
    for block in structure.blocks:
        materialise(block.name)
        module, run_once = skeleton.get_submodule(block.name), runner.run_once(block.index, hidden)
        groups = find_groups(module, block, run_once)
        proved += prove_folds(module, block, groups, run_once, skeleton.config)
        forget(block.name)
    return proved


def _channel_numbers(channels: int | Sequence[int], width: int, seed: int) -> tuple[int, ...]:
    """The channel numbers in ascending order."""
    import torch

    if isinstance(channels, int):
        order = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
        numbers = order[:channels].tolist()
    else:
        numbers = list(dict.fromkeys(channels))
    too_many = isinstance(channels, int) and channels > width
    if too_many or not numbers or not all(0 <= channel < width for channel in numbers):
        raise OutlierqError(f"channels must be 1 to {width} different numbers from 0 to {width - 1}, not {channels}")
    return tuple(sorted(numbers))


@dataclass(frozen=True)
class _Change:
    """What happens to one tensor. group: whose norm or reader it is; site: the reader, None for the norm's tensors."""

    group: InputGroup
    site: LinearSite | None


class StressedCheckpoint(DerivedCheckpoint):
    """A checkpoint with outlier channels; tensors are rewritten when they are read.

    channels: ascending. groups: the input groups whose norm was scaled.
    """

    def __init__(self, plain: Checkpoint, groups: Sequence[InputGroup], channels: tuple[int, ...], factor: float):
        super().__init__(plain)
        self.groups, self.channels, self.factor = tuple(groups), channels, factor
        self.config, self.tensors = plain.config, plain.tensors
        self._changes: dict[str, _Change] = {}
        for group in self.groups:
            for name in (group.fold.weight, group.fold.bias):
                if name:
                    self._changes[name] = _Change(group, None)
            for site in group.sites:
                self._changes[site.weight] = _Change(group, site)

    @property
    def fingerprint(self) -> str:
        """Of the plain checkpoint, the channels and the factor."""
        text = json.dumps([self.original.fingerprint, self.channels, self.factor])
        return hashlib.sha256(text.encode()).hexdigest()

    def read(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype and the shape of its header, rewritten where it belongs to a scaled norm."""
        tensor = self.original.read(name)
        change = self._changes.get(name)
        if change is None:
            return tensor
        scale = self._scale(change.group)
        if change.site is None:
            producer = {
                n: self.original.read(n).float() for n in (change.group.fold.weight, change.group.fold.bias) if n
            }
            wide = apply_fold(producer, change.group.fold, scale)[name]
        else:
            wide = tensor.float() * (scale[:, None] if change.site.transposed else scale)
        return wide.to(tensor.dtype)

    def _scale(self, group: InputGroup) -> torch.Tensor:
        """[K] what the readers' columns are multiplied with: 1, or about 1 / factor, exact for the stored gain."""
        import torch

        fold, info = group.fold, self.tensors[group.fold.weight]
        offset = 1.0 if fold.kind == "offset-norm" else 0.0
        gain = self.original.read(fold.weight).float()[torch.tensor(fold.index)] + offset
        channels = torch.tensor(self.channels)
        exact = storable_scale(
            gain[channels], torch.full(channels.shape, 1 / self.factor), torch_dtype(info.dtype), offset
        )
        scale = torch.ones(len(fold.index))
        scale[channels] = exact
        return scale
