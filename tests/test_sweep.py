"""`outlierq sweep`: one calibration, every recipe a row, nothing done twice."""

from __future__ import annotations

import csv
import io
import json

import pytest

import outlierq as public
from outlierq.core.errors import ArgumentError, RecipeError
from outlierq.pipeline.fitting import sweep as room

SMALL = {
    "settings": {"calibration.samples": 4, "calibration.sequence_length": 32, "quantize.group_size": 32},
    "windows": 1, "window_length": 32, "device": "cpu",
}  # fmt: skip


def test_recipes_share_a_calibration_and_a_second_time_only_new_ones_run(tiny_llama, tmp_path, monkeypatch):
    out = tmp_path / "runs"
    swept = public.sweep(tiny_llama, ["gptq-w4", "awq-gptq-w4"], out=out, **SMALL)
    assert [row.name for row in swept.rows] == ["gptq-w4", "awq-gptq-w4"]
    assert all(row.kl > 0 and row.nbytes < swept.source_bytes and "transformers" in row.loads_in for row in swept.rows)
    assert len(list(out.glob("stats-*"))) == 1, "they read the same text"
    run: list[str] = []
    real = room.compress
    monkeypatch.setattr(room, "compress", lambda *args: run.append(str(args[2])) or real(*args))
    again = public.sweep(tiny_llama, ["gptq-w4", "gptq-w3", "awq-gptq-w4"], out=out, **SMALL)
    assert [name.rpartition("/")[2] for name in run] == ["gptq-w3"]
    assert (again.rows[0], again.rows[2]) == swept.rows
    titles, *rows = csv.reader(io.StringIO((out / "sweep.csv").read_text()))
    assert titles[:4] == ["recipe", "bytes", "bits", "KL"] and rows[-1][0] == "gptq-w3", "the largest KL is last"
    assert (out / "sweep.md").read_text().startswith("| recipe | bytes |")


def test_bits_are_tried_and_what_cannot_be_is_a_row_that_says_why(outlierq, tiny_llama, tmp_path):
    settings = [word for key in ("calibration.samples=4", "calibration.sequence_length=32") for word in ("-s", key)]
    words = (
        "-r",
        "rtn-w4,fp8-dynamic",
        "--bits",
        "3,8",
        "--windows",
        "1",
        "--window-length",
        "32",
        "-o",
        tmp_path / "r",
    )
    answer = outlierq("sweep", tiny_llama, *words, "--json", *settings[2:0])
    assert answer.code == 0, answer.err
    rows = {row["name"]: row for row in json.loads(answer.out)["rows"]}
    assert set(rows) == {"rtn-w4-3-bit", "rtn-w4-8-bit", "fp8-dynamic-3-bit", "fp8-dynamic-8-bit"}
    assert rows["rtn-w4-3-bit"]["kl"] > rows["rtn-w4-8-bit"]["kl"]
    assert "bits" in rows["fp8-dynamic-3-bit"]["fault"] and rows["fp8-dynamic-3-bit"]["kl"] is None


def test_what_is_no_sweep_is_refused_before_work(tiny_llama, tmp_path):
    with pytest.raises(ArgumentError, match="there are no recipes"):
        public.sweep(tiny_llama, [], out=tmp_path / "a")
    with pytest.raises(ArgumentError, match="rtn-w4 was asked for twice"):
        public.sweep(tiny_llama, ["rtn-w4", "rtn-w4"], out=tmp_path / "a")
    with pytest.raises(RecipeError, match="fp8-dynamic-3-bit: "):
        public.sweep(tiny_llama, ["fp8-dynamic"], bits=[3], out=tmp_path / "a", windows=1, window_length=32)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(public.OutlierqError, match="is not empty and holds no sweep"):
        public.sweep(tiny_llama, ["rtn-w4"], out=tmp_path / "full", windows=1, window_length=32)
