"""The statistics folder: round trip, resume, refusals."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from outlierq.calibrate.stored.stats_file import StatsIdentity, StatsReader, StatsWriter
from outlierq.core.errors import OutputError, StatsError
from outlierq.core.measured.block_stats import BlockStats
from outlierq.core.measured.logits import LogitSample
from outlierq.core.model import Fold, InputGroup, LinearSite
from outlierq.core.stats import InputStats

IDENTITY = StatsIdentity("a" * 64, "b" * 64, "3 x 5 tokens of text", {"needs": ("hessian",), "seed": 0})


def groups(block: int) -> list[InputGroup]:
    def site(name):
        return LinearSite(f"layers.{block}.{name}", f"layers.{block}.{name}.weight", None, 8, 4, block)

    fold = Fold("linear", f"layers.{block}.v.weight", None, (4, 5, 4, 5), transposed=True)
    return [
        InputGroup(f"layers.{block}.q", (site("q"), site("k")), fold, "v absorbs the scale"),
        InputGroup(f"layers.{block}.o", (site("o"),), None, "nothing absorbs the scale"),
        InputGroup(f"layers.{block}.unused", (site("unused"),)),
    ]


def stats(block: int) -> dict[str, InputStats]:
    generator = torch.Generator().manual_seed(block)
    return {
        group.name: InputStats(
            tokens=15 + block,
            sequences=3,
            sum_x=torch.randn(4, generator=generator).double(),
            hessian=torch.randn(4, 4, generator=generator),
            rows=torch.randn(2, 4, generator=generator).bfloat16(),
        )
        for group in groups(block)[:2]
    }


def write(folder, blocks, identity=IDENTITY, *, finish=True) -> StatsWriter:
    writer = StatsWriter(folder, identity)
    for block in blocks:
        writer.write(block, groups(block), stats(block))
    if finish:
        writer.finish()
    return writer


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_groups_folds_and_statistics_come_back_as_they_were(tmp_path):
    write(tmp_path / "stats", [0, 1])
    reader = StatsReader(tmp_path / "stats")
    reader.check("a" * 64)
    assert reader.indices == (0, 1) and reader.identity.to_json() == IDENTITY.to_json()
    for block in (0, 1):
        found_groups, found = reader.block(block)
        assert found_groups == groups(block) and found.keys() == stats(block).keys()
        for name, expected in stats(block).items():
            assert (found[name].tokens, found[name].sequences) == (expected.tokens, expected.sequences)
            assert found[name].tensors().keys() == expected.tensors().keys()
            for field, value in expected.tensors().items():
                assert torch.equal(found[name].need(field), value) and found[name].need(field).dtype == value.dtype


def block_stats(block: int) -> BlockStats:
    return BlockStats(
        residual_top=torch.full((2, 6), float(block)),
        key_abs_max=torch.ones(2, 4),
        expert_tokens=torch.tensor([3, 4]),
        output_names=("layers.0.k", "layers.0.v"),
    )


SAMPLE = LogitSample(
    torch.tensor([0, 2]).int(),
    torch.tensor([4, 1]).int(),
    torch.tensor([[5, 6], [7, 8]]).int(),
    torch.tensor([[-0.1, -2.5], [-1.0, -1.5]]),
    torch.tensor([3.5, 4.5]),
)


def test_block_statistics_notes_and_logits_come_back_as_they_were(tmp_path):
    writer = StatsWriter(tmp_path, IDENTITY)
    writer.write(0, groups(0), stats(0), block_stats(0), ["something odd"])
    writer.write(1, groups(1), stats(1), notes=["something odd", "something else"])
    writer.write_logits(SAMPLE)
    writer.finish()
    reader = StatsReader(tmp_path)
    assert reader.block_stats(1) is None and reader.notes == ("something odd", "something else")
    found = reader.block_stats(0)
    assert found.output_names == ("layers.0.k", "layers.0.v")
    assert found.tensors().keys() == block_stats(0).tensors().keys()
    assert all(torch.equal(value, found.need(name)) for name, value in block_stats(0).tensors().items())
    assert reader.block(0)[1].keys() == stats(0).keys()
    assert all(torch.equal(value, reader.logits().tensors()[name]) for name, value in SAMPLE.tensors().items())
    with pytest.raises(StatsError, match="no statistics of block 7"):
        reader.block_stats(7)


def test_damaged_logits_are_made_again_and_refused(tmp_path):
    writer = write(tmp_path, [0], finish=False)
    writer.write_logits(SAMPLE)
    assert StatsWriter(tmp_path, IDENTITY).logits == writer.logits
    (tmp_path / "logits.safetensors").write_bytes(b"damaged")
    assert StatsWriter(tmp_path, IDENTITY).logits is None
    writer.finish()
    with pytest.raises(StatsError, match=r"logits.safetensors is damaged: sha256"):
        StatsReader(tmp_path).logits()


def test_statistics_of_the_first_format_are_refused(tmp_path):
    write(tmp_path, [0])
    path = tmp_path / "stats.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 1}))
    with pytest.raises(StatsError, match="format version 1; this program reads 3") as caught:
        StatsReader(tmp_path)
    assert "calibrate again" in caught.value.hint


def test_the_list_names_its_blocks_in_plain_json(tmp_path):
    write(tmp_path, [0])
    values = json.loads((tmp_path / "stats.json").read_text())
    block = values["blocks"][0]
    assert values["format_version"] == 3 and values["mode"] == "static" and block["file"] == "block-00000.safetensors"
    assert block["groups"][0]["fold"]["index"] == [[4, 2], [4, 2]] and block["groups"][0]["tokens"] == 15
    assert sorted(content(tmp_path)) == ["block-00000.safetensors", "stats.json"]


def test_tensors_from_inference_mode_and_views_are_written(tmp_path):
    with torch.inference_mode():
        hessian = torch.arange(16.0).view(4, 4).T
    writer = StatsWriter(tmp_path, IDENTITY)
    writer.write(0, groups(0), {groups(0)[0].name: InputStats(5, 1, hessian=hessian, min=hessian[0], max=hessian[0])})
    writer.finish()
    found = StatsReader(tmp_path).block(0)[1][groups(0)[0].name]
    assert torch.equal(found.hessian, hessian) and torch.equal(found.max, hessian[0])


def test_a_killed_run_goes_on_and_gives_the_same_bytes(tmp_path):
    write(tmp_path / "whole", [0, 1, 2])
    write(tmp_path / "killed", [0, 1], finish=False)
    (tmp_path / "killed" / "block-00002.safetensors.outlierq-part").write_bytes(b"half")
    writer = StatsWriter(tmp_path / "killed", IDENTITY)
    assert writer.done == {0, 1}
    writer.write(2, groups(2), stats(2))
    writer.finish()
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_a_damaged_block_is_written_again(tmp_path):
    write(tmp_path, [0, 1])
    (tmp_path / "block-00001.safetensors").write_bytes(b"damaged")
    writer = StatsWriter(tmp_path, IDENTITY)
    assert writer.done == {0}
    writer.write(1, groups(1), stats(1))
    writer.finish()
    assert len(StatsReader(tmp_path).block(1)[1]) == 2


def test_a_finished_folder_is_left_as_it_is(tmp_path):
    write(tmp_path, [0, 1])
    before = content(tmp_path)
    writer = StatsWriter(tmp_path, IDENTITY)
    assert writer.done == {0, 1}
    writer.finish()
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_fingerprint": "c" * 64}, "another model_fingerprint: aaaa.*, not cccc"),
        ({"token_fingerprint": "c" * 64}, "another token_fingerprint"),
        ({"settings": {"needs": ["hessian"], "seed": 1}}, "another settings"),
        ({"mode": "sequential"}, "another mode: static, not sequential"),
    ],
)
def test_a_folder_with_other_statistics_is_refused(tmp_path, change, message):
    write(tmp_path, [0], finish=False)
    with pytest.raises(OutputError, match=message):
        StatsWriter(tmp_path, replace(IDENTITY, **change))


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match=r"1 other files \(thesis.txt"):
        StatsWriter(tmp_path, IDENTITY)
    with pytest.raises(OutputError, match="cannot make the folder"):
        StatsWriter(tmp_path / "thesis.txt", IDENTITY)


@pytest.mark.parametrize(
    "name", ["film.iso.part", "a.outlierq-part", "hidden-states-of-matter.pdf", "block-of-marble.jpg", ".lock"]
)
def test_files_that_only_look_like_ours_are_left_alone(tmp_path, name):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / name).write_text("years of work")
    with pytest.raises(OutputError, match="1 other files"):
        StatsWriter(tmp_path / "new", IDENTITY)
    writer = write(tmp_path / "ours", [0], finish=False)
    (tmp_path / "ours" / name).write_text("years of work")
    writer.finish()
    assert (tmp_path / "new" / name).is_file() and (tmp_path / "ours" / name).is_file()


def test_statistics_of_another_model_are_refused_with_both_hashes(tmp_path):
    write(tmp_path, [0])
    with pytest.raises(
        StatsError, match=r"statistics of another model: aaaaaaaaaaaa\.\.\., this one is cccccccccccc\.\.\."
    ):
        StatsReader(tmp_path).check("c" * 64)


def test_a_missing_or_unfinished_folder_is_refused(tmp_path):
    with pytest.raises(StatsError, match="holds no statistics"):
        StatsReader(tmp_path / "absent")
    write(tmp_path, [0, 1], finish=False)
    with pytest.raises(StatsError, match="are unfinished: 2 blocks are written"):
        StatsReader(tmp_path)


def test_damaged_and_missing_blocks_are_named(tmp_path):
    write(tmp_path, [0, 1])
    (tmp_path / "block-00000.safetensors").unlink()
    (tmp_path / "block-00001.safetensors").write_bytes(b"damaged")
    reader = StatsReader(tmp_path)
    with pytest.raises(StatsError, match=r"cannot read .*block-00000.safetensors: No such file"):
        reader.block(0)
    with pytest.raises(StatsError, match=r"block-00001.safetensors is damaged: sha256"):
        reader.block(1)
    with pytest.raises(StatsError, match="no statistics of block 7; it holds 2 blocks"):
        reader.block(7)


def test_a_damaged_list_is_refused(tmp_path):
    write(tmp_path, [0])
    path = tmp_path / "stats.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in values.items() if key != "mode"}))
    with pytest.raises(StatsError, match="lacks mode"):
        StatsReader(tmp_path)
    path.write_text(json.dumps({**values, "format_version": 4}))
    with pytest.raises(StatsError, match="format version 4; this program reads 3"):
        StatsReader(tmp_path)
    with pytest.raises(OutputError, match="format version 4"):
        StatsWriter(tmp_path, IDENTITY)
    path.write_text("{")
    with pytest.raises(StatsError, match=r"cannot read .*stats.json"):
        StatsReader(tmp_path)
