"""A GGUF file becomes another one in the same frame, whatever its architecture: all but rounded weights is carried."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

import outlierq
from outlierq.core.errors import OutputError, SourceError
from outlierq.load import open_checkpoint
from outlierq.pipeline.ledger.output import Output

FOUR_BITS = ["export.format=gguf", "quantize.group_size=32"]
WIDTH, BLOCKS, VOCABULARY = 64, 3, 70


def matrix(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)


def contents(width: int = WIDTH, seed: int = 0) -> dict[str, tuple[np.ndarray, GGMLQuantizationType | None]]:
    """Tensors of an architecture that no library knows: experts in one tensor, a packed matrix, four dimensions."""
    eight_bits = GGMLQuantizationType.Q8_0
    tensors = {"token_embd.weight": (matrix(VOCABULARY, width, seed=seed), None)}
    for block in range(BLOCKS):
        tensors |= {
            f"blk.{block}.attn_norm.weight": (np.ones(width, np.float32), None),
            f"blk.{block}.attn_q.weight": (matrix(width, width, seed=seed + block), None),
            f"blk.{block}.strange_thing": (matrix(4, 3, 2, 5, seed=77), None),
            f"blk.{block}.ffn_gate_inp.weight": (matrix(4, width), None),
            f"blk.{block}.ffn_up_exps.weight": (matrix(4, 96, width, seed=9), None),
            f"blk.{block}.odd.weight": (matrix(8, 50, seed=8), None),
            f"blk.{block}.packed.weight": (
                gguf.quants.quantize(matrix(16, width).astype("f4"), eight_bits),
                eight_bits,
            ),
        }
    return tensors | {"output.weight": (matrix(VOCABULARY, width, seed=5), None)}


def write(path: Path, tensors=None, *, keys=lambda writer: None, named="strange", width: int = WIDTH) -> Path:
    """A GGUF file with a vocabulary, a text and a list among its metadata."""
    writer = GGUFWriter(path, named)
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_token_list([f"t{number}" for number in range(VOCABULARY)])
    writer.add_string("strange.note", "für dich")
    writer.add_array("strange.numbers", [1, 2, 3])
    writer.add_file_type(1)
    keys(writer)
    for name, (values, kind) in (contents() if tensors is None else tensors).items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def split(folder: Path, tensors=None, parts: int = 3, stem: str = "m") -> list[Path]:
    """The same in parts, as llama-gguf-split writes them."""
    tensors = contents() if tensors is None else tensors
    names, paths = list(tensors), []
    for number in range(parts):
        own = {name: tensors[name] for name in names[number::parts]}

        def keys(writer: GGUFWriter, number: int = number) -> None:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", parts)
            writer.add_int32("split.tensors.count", len(names))

        paths.append(write(folder / f"{stem}-{number + 1:05d}-of-{parts:05d}.gguf", own, keys=keys))
    return paths


def metadata(path: Path) -> dict[str, object]:
    fields = GGUFReader(path).fields
    return {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}


def tensors_of(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


def rounded(source: Path, out: Path, *settings: str) -> Path:
    outlierq.quantize(str(source), "rtn-w4", out=str(out), settings=[*FOUR_BITS, *settings])
    return out


def test_what_is_not_rounded_is_carried_byte_for_byte(tmp_path):
    source = write(tmp_path / "a.gguf")
    plan = outlierq.plan(str(source), "rtn-w4", settings=FOUR_BITS)
    out = rounded(source, tmp_path / "b.gguf")
    assert plan.output_bytes == out.stat().st_size
    before, after = metadata(source), metadata(out)
    assert (
        after.pop("general.file_type") == int(gguf.LlamaFileType.MOSTLY_Q4_0) and before.pop("general.file_type") == 1
    )
    assert after.pop("general.quantization_version") == 2 and list(after.items()) == list(before.items())
    stored, written = tensors_of(source), tensors_of(out)
    assert list(stored) == list(written)
    changed = {"attn_q", "ffn_up_exps", "packed"}
    for name, tensor in written.items():
        if name.split(".")[-2] not in changed:
            assert tensor.tensor_type == stored[name].tensor_type, name
            assert tensor.data.tobytes() == stored[name].data.tobytes(), name
            continue
        assert tensor.tensor_type == GGMLQuantizationType.Q4_0 and list(tensor.shape) == list(stored[name].shape)
        meant = gguf.quants.dequantize(stored[name].data, stored[name].tensor_type).astype("f8")
        error = np.linalg.norm(gguf.quants.dequantize(tensor.data, tensor.tensor_type) - meant) / np.linalg.norm(meant)
        assert 0.02 < error < 0.12
    assert sum(name.split(".")[-2] in changed for name in written) == 3 * BLOCKS


def test_the_result_is_verified_alone_and_against_its_source(tmp_path):
    source = write(tmp_path / "a.gguf")
    out = rounded(source, tmp_path / "b.gguf")
    for against in (None, str(source)):
        found = outlierq.verify(str(out), against)
        assert found.sound and found.linears == 3 * BLOCKS, found.faults
    assert len(found.errors) == 3 * BLOCKS
    raw = bytearray(out.read_bytes())
    raw[-100] ^= 1
    out.write_bytes(raw)
    assert [fault.check for fault in outlierq.verify(str(out)).faults] == ["record"]


def test_a_result_beside_others_is_one_file_and_overwrites_nothing(tmp_path):
    source = write(tmp_path / "a.gguf")
    out = rounded(source, tmp_path / "b.gguf")
    assert {path.name for path in tmp_path.iterdir()} == {"a.gguf", "b.gguf", "b.gguf.outlierq.json"}
    with pytest.raises(OutputError, match="exists already"):
        rounded(source, out)
    again = rounded(source, tmp_path / "c.gguf")
    assert again.read_bytes() == out.read_bytes()


def test_a_split_file_gives_what_the_whole_one_gives_from_any_part(tmp_path):
    whole = rounded(write(tmp_path / "a.gguf"), tmp_path / "whole.gguf")
    parts = split(tmp_path)
    for number in (0, 2):
        out = rounded(parts[number], tmp_path / f"{number}.gguf")
        stored, expected = tensors_of(out), tensors_of(whole)
        assert stored.keys() == expected.keys() and metadata(out) == metadata(whole)
        assert all(stored[name].data.tobytes() == expected[name].data.tobytes() for name in stored)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda parts: parts[1].unlink(), "1 of them are not there, first m-00002-of-00003.gguf"),
        (lambda parts: parts[1].write_bytes(parts[2].read_bytes()), "says that it is part 3 of 3"),
        (lambda parts: parts[2].write_bytes(parts[2].read_bytes()[:-500]), "m-00003-of-00003.gguf is cut off"),
        (lambda parts: parts[0].rename(parts[0].with_name("first.gguf")), "is not named so"),
    ],
)
def test_a_split_file_with_a_part_missing_mixed_up_or_cut_off_is_refused(tmp_path, damage, said):
    parts = split(tmp_path)
    damage(parts)
    first = next(path for path in (parts[0], tmp_path / "first.gguf") if path.exists())
    with pytest.raises(SourceError, match=said):
        outlierq.plan(str(first), "rtn-w4", settings=FOUR_BITS)


def test_a_part_of_another_model_is_named_with_its_tensor(tmp_path):
    parts = split(tmp_path)
    (tmp_path / "other").mkdir()
    wider = split(tmp_path / "other", contents(width=96))
    parts[1].write_bytes(wider[1].read_bytes())
    with pytest.raises(SourceError, match=r"tensor blk\.0\.attn_norm\.weight in m-00002.* 96 values.* 64 wide"):
        outlierq.plan(str(parts[0]), "rtn-w4", settings=FOUR_BITS)


def with_unknown_type(path: Path, name: str) -> Path:
    """The file with the type of one tensor changed to a number that no library knows."""
    raw = bytearray(path.read_bytes())
    dimensions = raw.index(name.encode()) + len(name)
    (count,) = struct.unpack_from("<I", raw, dimensions)
    struct.pack_into("<I", raw, dimensions + 4 + 8 * count, 99)
    path.write_bytes(raw)
    return path


def test_a_type_that_nobody_knows_is_carried_or_named_by_the_plan(tmp_path):
    source = with_unknown_type(write(tmp_path / "a.gguf"), "blk.1.strange_thing")
    out = rounded(source, tmp_path / "b.gguf")
    raw = contents()["blk.1.strange_thing"][0].tobytes()
    assert source.read_bytes().count(raw) == out.read_bytes().count(raw) == BLOCKS
    source = with_unknown_type(write(tmp_path / "c.gguf"), "blk.1.attn_q.weight")
    with pytest.raises(
        SourceError, match=r"tensor blk\.1\.attn_q\.weight .* has type number 99, which is not supported"
    ):
        outlierq.plan(str(source), "rtn-w4", settings=FOUR_BITS)


def test_a_width_that_no_block_divides_stays_and_is_said(tmp_path):
    notes = outlierq.plan(str(write(tmp_path / "a.gguf")), "rtn-w4", settings=FOUR_BITS).notes
    assert any(note.startswith("blk.0.odd and 2 more: kept in 16 bits: gguf stores blocks of 32") for note in notes)


def test_a_stopped_run_ends_in_the_same_bytes(tmp_path, monkeypatch):
    source = write(tmp_path / "a.gguf")
    whole = rounded(source, tmp_path / "whole.gguf")
    real, seen = Output.commit, []

    def stopping(self, *rest, **named):
        seen.append(rest)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(self, *rest, **named)

    monkeypatch.setattr(Output, "commit", stopping)
    with pytest.raises(KeyboardInterrupt):
        rounded(source, tmp_path / "cut.gguf")
    assert not (tmp_path / "cut.gguf").exists()
    monkeypatch.setattr(Output, "commit", real)
    assert rounded(source, tmp_path / "cut.gguf").read_bytes() == whole.read_bytes()


def test_a_recipe_that_runs_a_model_says_that_there_is_none(tmp_path):
    source = write(tmp_path / "a.gguf")
    with pytest.raises(SourceError, match="architecture strange"):
        outlierq.plan(str(source), "gptq-w4", settings=FOUR_BITS)
    with pytest.raises(SourceError, match="architecture strange"):
        open_checkpoint(str(source))


def test_patterns_of_recipes_fit_the_names_of_an_architecture_that_gguf_knows(tmp_path):
    source = write(tmp_path / "a.gguf", named="qwen3moe")
    plan = outlierq.plan(str(source), "rtn-w4", settings=[*FOUR_BITS, "quantize.ignore=['*.mlp.experts.*', 'lm_head']"])
    modules = {planned.site.module: planned.scheme for planned in plan.sites}
    assert modules["model.layers.1.mlp.experts.up_proj"] is None and modules["lm_head"] is None
    assert modules["model.layers.1.self_attn.q_proj"] is not None
