"""Importance matrices: ours are read by gguf, theirs are read as statistics, and what does not fit is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL_CALIBRATION, write_llama
from gguf import GGUFReader, GGUFWriter, LlamaFileType
from test_export_gguf import write_words
from test_gguf_frame import write as write_frame

from outlierq.api import calibrate
from outlierq.calibrate.stored.stats_file import StatsReader
from outlierq.core.errors import StatsError
from outlierq.load.gguf.imatrix import read_imatrix


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tied Llama of 2 blocks that can be a GGUF file. Read-only."""
    folder = write_llama(tmp_path_factory.mktemp("imatrix") / "model")
    (folder / "tokenizer.json").unlink()
    write_words(folder)
    return folder


@pytest.fixture(scope="module")
def made(model, tmp_path_factory) -> Path:
    """A folder with statistics and an importance matrix of the same."""
    folder = tmp_path_factory.mktemp("made")
    files = {"out": folder / "stats", "imatrix": folder / "imatrix.gguf"}
    calibrate(str(model), **files, samples=6, sequence_length=32)
    return folder


def changed(source: Path, out: Path, change) -> Path:
    """An importance matrix with other entries. change: is given all arrays by name, and may alter them."""
    arrays = {tensor.name: np.array(tensor.data) for tensor in GGUFReader(source).tensors}
    change(arrays)
    writer = GGUFWriter(out, "")
    writer.kv_data[0].pop("general.architecture", None)
    writer.add_string("general.type", "imatrix")
    writer.add_uint32("imatrix.chunk_count", 6)
    writer.add_uint32("imatrix.chunk_size", 32)
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_it_holds_sums_of_squares_under_the_names_of_gguf(made):
    reader = GGUFReader(made / "imatrix.gguf")
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    _, stats = StatsReader(made / "stats").block(1)
    by_name = {"attn_q": "model.layers.1.self_attn.q_proj", "ffn_down": "model.layers.1.mlp.down_proj"}
    for part, group in by_name.items():
        assert np.array_equal(tensors[f"blk.1.{part}.weight.in_sum2"].ravel(), stats[group].sum_sq.float().numpy())
        assert tensors[f"blk.1.{part}.weight.counts"].ravel() == [stats[group].tokens]
    assert len(tensors) == 2 * 14
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.chunk_count"].contents() == 6
    back = read_imatrix(made / "imatrix.gguf")
    assert back.entries.keys() == {name.removesuffix(".counts") for name in tensors if name.endswith(".counts")}


def test_a_recipe_that_asks_for_no_more_rounds_alike_from_both(outlierq, model, made, tmp_path):
    for name in ("stats", "imatrix.gguf"):
        words = ("quantize", model, "-r", "gguf-imatrix-q4_k_m", "--stats", made / name, "-o", tmp_path / name[:5])
        assert outlierq(*words).code == 0
    one, other = (
        {tensor.name: bytes(tensor.data) for tensor in GGUFReader(tmp_path / name / "model.gguf").tensors}
        for name in ("stats", "imatr")
    )
    assert one == other


def test_a_gguf_file_gets_it_without_a_model_class(outlierq, model, made, tmp_path):
    dense, out = tmp_path / "dense", tmp_path / "out.gguf"
    assert outlierq("quantize", model, "-r", "dense", "--format", "gguf", "-o", dense).code == 0
    words = ("quantize", dense / "model.gguf", "-r", "gguf-imatrix-q4_k_m", "--stats", made / "imatrix.gguf")
    answer = outlierq(*words, "-o", out)
    assert answer.code == 0, answer.err
    assert "importance matrix imatrix.gguf, 6 x 32 tokens" in answer.out
    reader = GGUFReader(out)
    assert "Q5_0" in {tensor.tensor_type.name for tensor in reader.tensors}
    assert reader.fields["general.file_type"].contents() == LlamaFileType.MOSTLY_Q4_K_M


def test_what_no_token_reached_is_rounded_without_it_and_said(outlierq, model, made, tmp_path):
    def silent(arrays):
        arrays["blk.0.attn_q.weight.in_sum2"][:] = 0

    file = changed(made / "imatrix.gguf", tmp_path / "silent.gguf", silent)
    answer = outlierq("quantize", model, "-r", "gguf-imatrix-q4_k_m", "--stats", file, "-o", tmp_path / "out")
    assert answer.code == 0, answer.err
    assert "model.layers.0.self_attn.q_proj: the importance matrix says nothing of its input" in " ".join(
        answer.out.split()
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda arrays: arrays.pop("blk.1.ffn_up.weight.in_sum2"), "has no blk.1.ffn_up.weight"),
        (lambda arrays: arrays.pop("blk.1.ffn_up.weight.counts"), "no count of tokens for each matrix of blk.1.ffn_up"),
        (
            lambda arrays: arrays.update({"blk.0.attn_q.weight.in_sum2": np.ones((1, 32), np.float32)}),
            "has 1 x 32 channels for blk.0.attn_q.weight, the model 1 x 64",
        ),
        (
            lambda arrays: arrays.update({"blk.0.attn_q.weight.in_sum2": np.ones((3, 64), np.float32)}),
            "has 3 x 64 channels for blk.0.attn_q.weight, the model 1 x 64",
        ),
        (
            lambda arrays: arrays.update(
                {name.replace("blk.1.", "blk.2."): array for name, array in arrays.items() if "blk.1." in name}
            ),
            "and the model 2 blocks",
        ),
        (lambda arrays: arrays["blk.0.attn_q.weight.in_sum2"].fill(np.nan), "negative sums of squares of blk.0.attn_q"),
        (lambda arrays: arrays["blk.0.attn_q.weight.in_sum2"].fill(-1), "negative sums of squares of blk.0.attn_q"),
    ],
)
def test_one_of_another_model_or_a_damaged_one_is_refused(outlierq, model, made, tmp_path, change, said):
    file = changed(made / "imatrix.gguf", tmp_path / "other.gguf", change)
    answer = outlierq("quantize", model, "-r", "gguf-imatrix-q4_k_m", "--stats", file, "-o", tmp_path / "out")
    assert answer.code == 1
    assert said in answer.err and "hint: " in answer.err


IMPORTANCE = """
calibration: {}
quantize: {method: rtn, type: Q4_0, scale_search: importance}
export: {format: gguf}
"""


def matrices(path: Path, sizes: dict[str, int], unseen: tuple[int, ...] = ()) -> Path:
    """An importance matrix 64 wide with so many matrices a tensor, some of them of no token."""
    writer = GGUFWriter(path, "")
    writer.kv_data[0].pop("general.architecture", None)
    writer.add_string("general.type", "imatrix")
    for seed, (name, count) in enumerate(sizes.items()):
        sums = np.random.default_rng(seed).random((count, 64), np.float32) + 0.1
        seen = np.array([[0.0] if row in unseen and count > 1 else [4096.0] for row in range(count)], np.float32)
        writer.add_tensor(f"{name}.in_sum2", sums * (seen > 0))
        writer.add_tensor(f"{name}.counts", seen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Of a file under its own names that holds experts in one tensor.
MATRICES = {
    f"blk.{block}.{part}.weight": 4 if part == "ffn_up_exps" else 1
    for block in range(3)
    for part in ("attn_q", "ffn_up_exps", "packed")
}


class TestExpertsOfAFileUnderItsOwnNames:
    @pytest.fixture(scope="class")
    def source(self, tmp_path_factory) -> Path:
        return write_frame(tmp_path_factory.mktemp("frame") / "a.gguf")

    @pytest.fixture
    def recipe(self, tmp_path) -> str:
        path = tmp_path / "importance.yaml"
        path.write_text("description: one type\n" + IMPORTANCE)
        return str(path)

    def test_they_share_one_importance_which_is_said(self, source, recipe, tmp_path):
        import outlierq

        for unseen in ((), (1,)):
            stats = matrices(tmp_path / f"{unseen}.gguf", MATRICES, unseen)
            out = tmp_path / f"out{unseen}.gguf"
            report = outlierq.quantize(str(source), recipe, out=str(out), stats=stats)
            said = "blk.0.ffn_up_exps.weight and 2 more: the experts of a block share one importance"
            assert any(note.startswith(said) for note in report.notes)
            assert not any(row.note for row in report.rows) and outlierq.verify(str(out)).sound

    def test_where_no_expert_saw_a_token_the_block_is_rounded_without(self, source, recipe, tmp_path):
        import outlierq

        stats = matrices(tmp_path / "none.gguf", MATRICES, (0, 1, 2, 3))
        report = outlierq.quantize(str(source), recipe, out=str(tmp_path / "out.gguf"), stats=stats)
        unseen = [row.site for row in report.rows if "which no token reached" in row.note]
        assert unseen == [f"blk.{block}.ffn_up_exps" for block in range(3)]

    def test_another_number_of_experts_is_another_model(self, source, recipe, tmp_path):
        import outlierq

        stats = matrices(tmp_path / "other.gguf", {**MATRICES, "blk.1.ffn_up_exps.weight": 8})
        with pytest.raises(StatsError, match=r"has 8 x 64 channels for blk\.1\.ffn_up_exps\.weight, the model 4 x 64"):
            outlierq.quantize(str(source), recipe, out=str(tmp_path / "out.gguf"), stats=stats)


def test_a_method_that_needs_more_says_so(outlierq, model, made, tmp_path):
    words = ("-r", "gguf-q4_k_m", *SMALL_CALIBRATION, "--stats", made / "imatrix.gguf", "-o", tmp_path / "out")
    answer = outlierq("quantize", model, *words)
    assert answer.code == 1
    assert "imatrix.gguf holds the mean square of every input channel only, and the recipe needs" in answer.err
    assert "gguf-imatrix-q4_k_m" in answer.err


def test_another_file_is_no_importance_matrix(outlierq, model, made, tmp_path):
    (tmp_path / "old.dat").write_bytes(b"\x01\x00\x00\x00old")
    words = ("quantize", model, "-r", "gguf-imatrix-q4_k_m", "--stats", tmp_path / "old.dat", "-o", tmp_path / "out")
    answer = outlierq(*words)
    assert answer.code == 1
    assert "old.dat is no importance matrix" in answer.err and "llama-imatrix --in-file" in answer.err


def test_experts_are_matrices_of_one_tensor():
    from outlierq.core.model import LinearSite
    from outlierq.pipeline.block.imatrix import _name_of, _stacked

    weight = "model.layers.3.block_sparse_moe.experts.2.w1.weight"
    site = LinearSite(weight.removesuffix(".weight"), weight, None, 8, 4, 3)
    assert _name_of(site, {"model_type": "mixtral"}) == ("blk.3.ffn_gate_exps.weight", 2)
    sums, counts = _stacked({0: torch.ones(4), 2: torch.full((4,), 3.0)}, {0: 5, 2: 7})
    assert sums.tolist() == [[1.0] * 4, [0.0] * 4, [3.0] * 4]
    assert counts.tolist() == [5, 0, 7]
