"""What a checkpoint need not say of itself: defaults of the base class, and what stands on top of another one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fakes import FakeCheckpoint

from outlierq.core.errors import SourceError
from outlierq.core.model import DerivedCheckpoint, TensorInfo

VALUES = {"a.weight": torch.arange(14.0).reshape(7, 2), "b.weight": torch.ones(3)}


@pytest.fixture
def plain() -> FakeCheckpoint:
    infos = [TensorInfo(name, "F32", tuple(value.shape), 4 * value.numel()) for name, value in VALUES.items()]
    return FakeCheckpoint(infos, {"model_type": "llama"}, VALUES)


class Doubled(DerivedCheckpoint):
    """Twice the numbers of another checkpoint."""

    def __init__(self, original):
        super().__init__(original)
        self.config, self.tensors = original.config, original.tensors

    def read(self, name):
        return 2 * self.original.read(name)


class Passing(FakeCheckpoint):
    """A checkpoint whose weight files come and go."""

    revision, most_threads, digests = "abc", 2, {"model.safetensors": "d1"}

    def __init__(self):
        super().__init__()
        self.stamps, self.told = {Path("model.safetensors"): (1, 2, 3)}, []

    def make_room(self, structure, fetching, *, together):
        self.told.append((structure, together))

    def drop_shards(self):
        self.told.append("dropped")


def test_whoever_reads_a_tensor_reads_several_and_rows_of_it(plain):
    assert {name: value.tolist() for name, value in plain.read_many(VALUES).items()} == {
        name: value.tolist() for name, value in VALUES.items()
    }
    pieces = list(plain.read_rows("a.weight", 3))
    assert [len(piece) for piece in pieces] == [3, 3, 1] and torch.equal(torch.cat(pieces), VALUES["a.weight"])
    assert torch.equal(plain.read_some_rows("a.weight", [5, 0]), VALUES["a.weight"][[5, 0]])


def test_a_plain_checkpoint_has_no_codes_and_means_no_more_than_its_weights(plain):
    assert not plain.linears and not plain.packed and not plain.making_bytes("a.weight")
    with pytest.raises(SourceError, match="is not stored as codes"):
        plain.quantized("a.weight")
    model = torch.nn.Linear(2, 7)
    plain.install(model, {"weight": "a.weight"})
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_a_checkpoint_on_top_of_another_reads_its_own_numbers_in_every_way(plain):
    doubled = Doubled(plain)
    assert torch.equal(doubled.read_many(["b.weight"])["b.weight"], 2 * VALUES["b.weight"])
    assert torch.equal(torch.cat(list(doubled.read_rows("a.weight", 4))), 2 * VALUES["a.weight"])
    assert torch.equal(doubled.read_some_rows("a.weight", [1]), 2 * VALUES["a.weight"][[1]])


def test_a_checkpoint_on_top_of_another_tells_it_what_is_done_and_knows_its_files():
    passing = Passing()
    doubled = Doubled(Doubled(passing))
    doubled.make_room("structure", print, together=True)
    doubled.drop_shards()
    assert passing.told == [("structure", True), "dropped"]
    assert (doubled.revision, doubled.most_threads, doubled.digests) == ("abc", 2, passing.digests)
    assert doubled.stamps == passing.stamps and doubled.fingerprint == passing.fingerprint
