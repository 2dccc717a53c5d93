"""Which biases a model class could take that its checkpoint does not hold, and which shifts they would carry.

Found by trying: a boolean key of the config with "bias" in its name is turned over, and what the class then has more
must be biases of linears. With zeros in them every kind of block must compute what it did, on random weights; then the
folds are proved anew (`calibrate/folds.py`). Nothing is listed by architecture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from outlierq.calibrate.experts import routing
from outlierq.calibrate.folds import prove_folds
from outlierq.calibrate.groups import find_groups
from outlierq.core.errors import NumbersError, SourceError
from outlierq.core.model import Block, Checkpoint, InputGroup, Structure, StudiedModel, TensorInfo
from outlierq.core.move import UNCHANGED
from outlierq.load import build_skeleton, study
from outlierq.pipeline.remodel.anatomy import Bench, Kind, Moved, Weights, kind_of, random_weights, relative_error
from outlierq.pipeline.remodel.rewritten import RewrittenCheckpoint
from outlierq.transform.add_biases import BiasKey, Openings, Shift
from outlierq.transform.rotate import Rewrite

if TYPE_CHECKING:
    import torch


def find_openings(checkpoint: Checkpoint, *, refusal: str = "") -> Openings:
    """The keys of the checkpoint's config that make places for biases, and the shifts that these could carry.

    refusal: why the output format cannot hold biases that the checkpoint does not have; then none are looked for.
    """
    if refusal:
        return Openings(obstacle=refusal)
    model = study(checkpoint)
    keys = tuple(_keys(model))
    if not keys:
        return Openings(obstacle="no key of this model's config makes places for biases")
    try:
        trial = _Trial(model, keys)
        return Openings(keys, trial.shifts())
    except (SourceError, NumbersError) as error:
        return Openings(keys, obstacle=error.what)


def opened(checkpoint: Checkpoint, keys: tuple[BiasKey, ...]) -> RewrittenCheckpoint:
    """The checkpoint with all these keys turned over and zeros for their biases."""
    zeros = {name: info for key in keys for name, info in key.tensors.items()}
    return RewrittenCheckpoint(checkpoint, Rewrite({}, zeros=zeros, settings={k.path: k.value for k in keys}), "opened")


def _keys(model: StudiedModel) -> Iterator[BiasKey]:
    """Keys that add biases of linears to the class, and do nothing else to it."""
    checkpoint, skeleton, structure = model.checkpoint, model.skeleton, model.structure
    config = skeleton.config.get_text_config()
    outer = [key for key, value in checkpoint.config.items() if isinstance(value, dict)]
    nested = [key for key in outer if getattr(skeleton.config, key, None) is config]
    if config is not skeleton.config and not nested:
        return
    before = {name: tuple(slot.shape) for name, slot in skeleton.state_dict(keep_vars=True).items()}
    for name, value in config.to_dict().items():
        if "bias" not in name or not isinstance(value, bool):
            continue
        key = BiasKey((*nested[:1], name), not value, {})
        try:
            other = build_skeleton(opened(checkpoint, (key,)))
        except SourceError:  # the class does not take the key this way round
            continue
        after = {name: tuple(slot.shape) for name, slot in other.state_dict(keep_vars=True).items()}
        tensors = _biases(checkpoint, structure, before, after)
        if tensors:
            yield replace(key, tensors=tensors)


def _biases(
    checkpoint: Checkpoint, structure: Structure, before: dict[str, Any], after: dict[str, Any]
) -> dict[str, TensorInfo]:
    """The biases that the class has more, by tensor name; none when anything else differs."""
    linears = {f"{site.module}.bias": site for site in structure.sites}
    more = after.keys() - before.keys()
    if any(after.get(name) != shape for name, shape in before.items()) or not more <= linears.keys():
        return {}
    tensors = {}
    for slot, site in linears.items():
        name = f"{site.weight.removesuffix('weight')}bias"
        if slot in more and name not in checkpoint.tensors:
            weight = checkpoint.tensors[site.weight]
            size = weight.nbytes // site.in_features // site.out_features
            tensors[name] = TensorInfo(name, weight.dtype, (site.out_features,), site.out_features * size)
    return tensors


class _Trial:
    """The model with all keys turned over, on random weights, beside the model as it is."""

    def __init__(self, model: StudiedModel, keys: tuple[BiasKey, ...]):
        self.plain, self.plain_weights = Bench(model), random_weights(model)
        self.plain.before(self.plain_weights)
        wider = study(opened(model.checkpoint, keys))
        self.names = wider.names
        self.bench, self.weights = Bench(wider), random_weights(wider)
        self.hidden = self.bench.before(self.weights)
        self.new = frozenset(name for key in keys for name in key.tensors)

    def shifts(self) -> dict[str, Shift]:
        """By input group, the shifts that need new biases; of blocks that look alike, one is examined."""
        known: dict[Kind, tuple[Block, list[InputGroup]]] = {}
        shifts = {}
        for block in self.bench.structure.blocks:
            kind = kind_of(self.bench.model, block)
            if kind not in known:
                self._check_zeros(block)
                known[kind] = block, self._groups(block)
            like, groups = known[kind]
            moved = Moved(self.names, like, block)
            for group in groups:
                fold = group.admitted
                new = self.new & {name for name in (fold.bias, *(site.bias for site in group.sites)) if name}
                if new:
                    assert fold.bias is not None, "a shift is taken off by the producer's bias"
                    shift = Shift(moved.tensors[fold.bias], frozenset(moved.tensors[name] for name in new), "")
                    note = fold.shift_note.replace(fold.bias, shift.bias)
                    shifts[moved.sites[group.sites[0]].module] = replace(shift, note=note)
        return shifts

    def _check_zeros(self, block: Block) -> None:
        """SourceError when the block with zeros for its new biases does not compute what it did."""

        def read(name: str, rows: int | None) -> torch.Tensor:
            values = self.weights.read(name, rows)
            return values.zero_() if name in self.new else values

        actual = self.bench.block(Weights(self.names, read), block.index, self.hidden)
        expected = self.plain.block(self.plain_weights, block.index, self.hidden)
        error = relative_error(actual, expected)
        if not error <= UNCHANGED:
            raise SourceError(f"biases of zeros change the output of {block.name} by {error:.1g}")

    def _groups(self, block: Block) -> list[InputGroup]:
        """The input groups whose input can be shifted."""
        import torch

        def run(module: torch.nn.Module) -> torch.Tensor:
            with torch.no_grad(), routing(module, "probe"):  # every expert reads what the router reads
                return self.bench.runner.forward(module, block.index, 0, self.hidden)

        with self.bench.filled(self.weights, block.index) as module:
            groups = prove_folds(module, block, find_groups(module, block, run), run, self.bench.model.config)
        return [group for group in groups if group.fold is not None and group.fold.shift]
