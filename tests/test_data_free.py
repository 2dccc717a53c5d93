"""Data-free runs: several blocks at once, in pieces of rows, give what the definition says; errors stay exact."""

from __future__ import annotations

import io
import json
import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from outlierq.core.errors import NumbersError, OutputError
from outlierq.core.model import LinearSite
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.export import writer
from outlierq.load import open_checkpoint, reading_ahead
from outlierq.load.decode import decode_rows
from outlierq.pipeline.block import data_free
from outlierq.pipeline.ledger.journal import JOURNAL
from outlierq.pipeline.ledger.output import Output
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.quantize import quantize
from outlierq.quantize import stage
from outlierq.recipe import load
from outlierq.registry import method


@pytest.fixture(autouse=True)
def threads():
    """Two threads, and the number that was set before is set again by the run itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def compress(source, out, recipe="rtn-w8", *settings):
    return quantize(make_plan(open_checkpoint(str(source)), load(recipe, list(settings))), out)


def site_of(rows: int, columns: int) -> LinearSite:
    return LinearSite("m.linear", "m.linear.weight", None, rows, columns, 0, "Linear")


@pytest.mark.parametrize("piece", [64, 1 << 20])
def test_the_written_codes_are_those_of_the_definition(piece, untied_llama, tmp_path, monkeypatch):
    """Against plain numpy: scale = max|w| / 127 in the model's dtype, code = round(w / scale) + 128 in one byte."""
    monkeypatch.setattr(stage, "PIECE_WEIGHTS", piece)
    report = compress(untied_llama, tmp_path / "out")
    checkpoint = open_checkpoint(str(untied_llama))
    written = load_file(tmp_path / "out" / "model.safetensors")
    names = [row.site for row in report.rows]
    assert names
    for name in names:
        w = checkpoint.read(f"{name}.weight").float()
        found = written[f"{name}.weight_scale"]
        scale = (w.abs().amax(1, keepdim=True) / 127).to(getattr(torch, checkpoint.dtype))
        assert torch.equal(found, scale)
        scale = scale.float().numpy()
        codes = np.clip(np.rint(w.numpy() / scale), -128, 127)
        stored = written[f"{name}.weight_packed"].numpy().view(np.uint8).astype(np.float32) - 128
        assert np.array_equal(stored, codes)


def test_several_threads_work_and_the_journal_keeps_the_order(untied_llama, tmp_path, monkeypatch):
    seen, together = [], threading.Barrier(2, timeout=20)
    original, finish = data_free._write, []

    def watched(unit, output):
        if unit.name.endswith(("00000", "00001")):
            together.wait()  # both blocks are in work at the same time, or the barrier breaks
        return original(unit, output)

    monkeypatch.setattr(data_free, "_write", watched)
    add = data_free.Output.commit

    def committed(self, unit, *args, **kwargs):
        seen.append(unit)
        add(self, unit, *args, **kwargs)
        finish.append((self.work / JOURNAL).read_text())

    monkeypatch.setattr(Output, "commit", committed)
    compress(untied_llama, tmp_path / "out")
    assert seen == ["outside", *(f"block-{index:05d}" for index in range(len(seen) - 1))]
    assert [json.loads(line).get("unit") for line in finish[-1].splitlines()] == [None, *seen]


def test_a_nan_is_named_and_counted_whatever_piece_it_is_in(monkeypatch):
    monkeypatch.setattr(stage, "PIECE_WEIGHTS", 32)
    weight = torch.randn(12, 8)
    weight[9, 3] = float("nan")
    weight[2, 1] = float("inf")
    scheme = QuantScheme(8, None)
    with pytest.raises(NumbersError, match=r"m.linear.weight holds 2 NaN or Inf among 96 weights"):
        list(stage.quantize_rows(site_of(12, 8), weight.split(4), scheme, method("quantize", "rtn"), {}))


def test_finite_weights_whose_squares_overflow_are_refused_for_what_they_are():
    scheme, weight = QuantScheme(4, None), torch.full((2, 8), 1e30)
    with pytest.raises(NumbersError, match=r"m.linear.weight holds weights of more than 1e15, whose squares"):
        list(stage.quantize_rows(site_of(2, 8), iter([weight]), scheme, method("quantize", "rtn"), {}))


@pytest.mark.parametrize(("size", "refused"), [(0, False), (1e-6, False), (1e-9, True), (1e-30, True)])
def test_weights_that_float16_scales_cannot_hold_are_refused(size, refused):
    scheme, weight = QuantScheme(4, 8, scale_dtype="float16"), torch.randn(4, 16) * size
    rows = stage.quantize_rows(site_of(4, 16), iter([weight]), scheme, method("quantize", "rtn"), {})
    if refused:
        with pytest.raises(NumbersError, match=r"weights of m\.linear.weight are too small for the format's float16"):
            list(rows)
    else:
        assert len(list(rows)) == 1 and rows.row.weight_error < 0.2


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_piece_may_be_overwritten_after_it_was_used(dtype):
    """Pieces share one buffer; what was made of a piece must not look at it again."""
    weight = torch.randn(12, 8).to(getattr(torch, dtype))
    scheme, rtn = QuantScheme(4, 4, False, "float32"), method("quantize", "rtn")

    def overwritten():
        buffer = torch.empty(4, 8, dtype=weight.dtype)
        for piece in weight.split(4):
            yield buffer.copy_(piece)
        buffer.fill_(7)

    rows = stage.quantize_rows(site_of(12, 8), overwritten(), scheme, rtn, {})
    found, row = QuantTensor.stack(list(rows)), rows.row
    whole = rtn.function(weight.float(), None, scheme)
    assert torch.equal(found.codes, whole.codes) and torch.equal(found.scale, whole.scale)
    error = (found.dequantize() - weight.float()).norm() / weight.float().norm()
    assert row.weight_error == pytest.approx(error.item(), rel=1e-5)


@pytest.mark.parametrize("part", ["_packed", "_scale", "embed_tokens.weight", "input_layernorm.weight"])
def test_a_byte_that_the_disk_changed_is_found(part, tiny_llama, tmp_path, monkeypatch):
    """Quantized or copied: every written tensor is read back."""
    original = writer.ShardWriter.write

    def flipped(self, name, tensor, row=None):
        original(self, name, tensor, row)
        if name.endswith(part):
            place = self.layout.places[name]
            at = place.offset + place.tensor.nbytes - 2
            byte = writer.os.pread(self._files[place.shard], 1, at)[0] ^ 1
            writer.os.pwrite(self._files[place.shard], bytes([byte]), at)

    monkeypatch.setattr(writer.ShardWriter, "write", flipped)
    with pytest.raises(OutputError, match=r"decodes to something else|not those that were written") as caught:
        compress(tiny_llama, tmp_path / "out")
    assert "export on" in caught.value.where
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_are_decoded_to_the_codes_that_were_meant(bits, symmetric):
    """What the exporter packs, the independent decoder gives back, from any row that begins a word."""
    from outlierq.export import format_type

    scheme = QuantScheme(bits, 8, symmetric)
    meant = method("quantize", "rtn").function(torch.randn(70, 24), None, scheme)
    stored = format_type("compressed-tensors")({}).encode(site_of(70, 24), meant)
    stored = {name.rpartition(".")[2]: value for name, value in stored.items()}
    for start, stop in [(0, 70), (32, 64), (64, 70)]:
        found, rows = decode_rows("compressed-tensors", stored, scheme, (70, 24), start, stop), meant.rows(start, stop)
        writer.compare("m.linear", found, rows)
        assert torch.equal(found.dequantize(), rows.dequantize())


def test_rows_come_as_the_tensor_holds_them(untied_llama):
    checkpoint = open_checkpoint(str(untied_llama))
    name = next(name for name, info in checkpoint.tensors.items() if len(info.shape) == 2)
    whole = checkpoint.read(name)
    for count in (1, 7, len(whole), len(whole) + 5):
        assert torch.equal(torch.cat([piece.clone() for piece in checkpoint.read_rows(name, count)]), whole)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float8_e4m3fn", "int64"])
def test_the_look_at_exponent_bits_finds_what_isfinite_finds(dtype):
    dtype = getattr(torch, dtype)
    good = torch.linspace(-400, 400, 1001).to(dtype)
    assert writer.all_finite(good) and writer.all_finite(good[:0]) and writer.all_finite(good.view(7, 143).T)
    if dtype.is_floating_point:
        largest = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min, 0.0]).to(dtype)
        assert writer.all_finite(largest)
        for value in ("nan", "inf", "-inf"):
            bad = good.float()
            bad[500] = float(value)
            bad = bad.to(dtype)
            assert writer.all_finite(bad) == bool(bad.float().isfinite().all())


@pytest.mark.parametrize("size", [0, 1, 8, 13, 4096])
def test_bytes_are_compared_to_the_last(size):
    content = np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()
    assert writer.same_bytes(content, memoryview(bytearray(content)))
    assert not writer.same_bytes(content, content + b"x")
    for place in {0, size // 2, size - 1} if size else ():
        changed = bytearray(content)
        changed[place] ^= 128
        assert not writer.same_bytes(content, changed)


def test_threads_start_only_where_there_is_room_for_them(untied_llama, tmp_path, monkeypatch):
    """Python waits for ever for a thread that finds no memory while it starts."""
    from outlierq.core.machine import threads

    started = []
    monkeypatch.setattr(threads, "THREAD_BYTES", 1 << 60)
    monkeypatch.setattr(threading.Thread, "start", lambda self: started.append(self.name))
    with reading_ahead(open_checkpoint(str(untied_llama))):
        assert started == []
    with pytest.raises(MemoryError):
        compress(untied_llama, tmp_path / "out")
    assert started == []


def test_every_thread_of_ours_asks_for_room_first():
    package = Path(stage.__file__).parents[1]
    sources = {path.name: path.read_text() for path in package.rglob("*.py")}
    starting = {name for name, text in sources.items() if re.search(r"\bThread\(|ThreadPoolExecutor\(", text)}
    assert starting == {"threads.py", "read_ahead.py", "chats.py", "progress.py"}
    assert all("check_room(" in sources[name] for name in starting)


def test_reading_ahead_reads_every_byte_and_ends_with_the_block(untied_llama, monkeypatch):
    from outlierq.load.source import read_ahead

    read = []
    monkeypatch.setattr(read_ahead, "_read", lambda paths, stop: (read.extend(paths), stop.wait(20)))
    checkpoint = open_checkpoint(str(untied_llama))
    with reading_ahead(checkpoint):
        assert any(thread.name == "read-ahead" for thread in threading.enumerate())
    assert not any(thread.name == "read-ahead" for thread in threading.enumerate())
    assert read == checkpoint.weight_files and read


def test_wishes_and_farewells_are_for_files_of_a_system_that_takes_them(tmp_path, monkeypatch):
    """macOS has no `posix_fadvise`, and what is read from the Hub is no file."""
    from outlierq.load.source.read_ahead import WISH, will_need

    (tmp_path / "weights").write_bytes(bytes(3 * WISH))
    wishes = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, start, length, advice: wishes.append((start, length)))
    with (tmp_path / "weights").open("rb", buffering=0) as file:
        will_need(file, 7, 2 * WISH + 1)
        assert wishes == [(7, WISH), (7 + WISH, WISH), (7 + 2 * WISH, 1)]
        will_need(io.BytesIO(bytes(WISH)), 0, WISH)
        writer.leave_cache(file.fileno())
        assert wishes[3:] == [(0, 0)]
        monkeypatch.delattr(os, "posix_fadvise")
        will_need(file, 0, WISH)
        writer.leave_cache(file.fileno())
    assert len(wishes) == 4


def test_reading_ahead_ends_where_a_file_cannot_be_read(tmp_path):
    from outlierq.load.source import read_ahead

    (tmp_path / "weights").write_bytes(bytes(5 << 20))
    read_ahead._read([tmp_path / "weights", tmp_path / "gone", tmp_path], threading.Event())


def test_no_thread_works_on_when_the_run_fails(untied_llama, tmp_path, monkeypatch):
    """A journal that cannot be written ends the run; the files are closed only when the last thread has stopped."""
    original, closed_at = Output.close, []

    def full(self, *args, **kwargs):
        raise OutputError("no space on the disk")

    def closed(self):
        closed_at.append([thread.name for thread in threading.enumerate() if thread.name.startswith("block")])
        original(self)

    monkeypatch.setattr(Output, "commit", full)
    monkeypatch.setattr(Output, "close", closed)
    with pytest.raises(OutputError, match="no space"):
        compress(untied_llama, tmp_path / "out")
    assert closed_at == [[]]
