"""A GGUF file of a model is rounded with the statistics of its Hugging Face original; no class runs it."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf_models import write_model

import outlierq
from outlierq.core.errors import StatsError
from outlierq.load import FramedCheckpoint

SETTINGS = ["quantize.group_size=32", "calibration.samples=4", "calibration.sequence_length=32"]
GGUF = [*SETTINGS, "export.format=gguf"]


def calibrated(folder, out):
    outlierq.calibrate(str(folder), out=str(out), recipe="gptq-w4", settings=SETTINGS)
    return out


def packed(path) -> dict[str, np.ndarray]:
    tensors = GGUFReader(path).tensors
    return {tensor.name: tensor.data for tensor in tensors if tensor.tensor_type == GGMLQuantizationType.Q4_0}


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "glm4"])
def test_the_codes_are_those_that_the_original_gets(model_type, tmp_path, monkeypatch):
    folder = write_model(tmp_path / "model", model_type, dtype="bfloat16")
    outlierq.quantize(str(folder), "dense", out=str(tmp_path / "a.gguf"), settings=["export.format=gguf"])
    stats = calibrated(folder, tmp_path / "stats")
    outlierq.quantize(str(folder), "gptq-w4", out=str(tmp_path / "b.gguf"), settings=GGUF, stats=stats)
    seen, real = [], FramedCheckpoint.decoding
    monkeypatch.setattr(FramedCheckpoint, "decoding", lambda self, names: seen.append(names) or real(self, names))
    outlierq.quantize(str(tmp_path / "a.gguf"), "gptq-w4", out=str(tmp_path / "c.gguf"), settings=GGUF, stats=stats)
    one, other = packed(tmp_path / "b.gguf"), packed(tmp_path / "c.gguf")
    assert seen and len(one) >= 12 and one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert outlierq.verify(str(tmp_path / "c.gguf")).sound


def test_experts_that_have_none_are_rounded_without_and_that_is_said(tmp_path):
    folder = write_model(tmp_path / "model", "qwen3_moe", dtype="bfloat16")
    outlierq.quantize(str(folder), "dense", out=str(tmp_path / "a.gguf"), settings=["export.format=gguf"])
    stats = calibrated(folder, tmp_path / "stats")
    report = outlierq.quantize(
        str(tmp_path / "a.gguf"), "gptq-w4", out=str(tmp_path / "b.gguf"), settings=GGUF, stats=stats
    )
    notes = {row.site.rpartition(".")[2]: row.note for row in report.rows}
    assert "rounded to nearest without statistics" in notes["down_proj"] and not notes["q_proj"]
    assert len(packed(tmp_path / "b.gguf")) == 14


def test_statistics_of_another_model_are_refused_with_the_tensor(tmp_path):
    folder = write_model(tmp_path / "model", "qwen3", dtype="bfloat16")
    other = write_model(tmp_path / "other", "qwen3", dtype="bfloat16", seed=1)
    outlierq.quantize(str(folder), "dense", out=str(tmp_path / "a.gguf"), settings=["export.format=gguf"])
    stats = calibrated(other, tmp_path / "stats")
    with pytest.raises(StatsError, match=r"tensor blk\.0\.attn_q\.weight .* is not model\.layers\.0\.self"):
        outlierq.quantize(str(tmp_path / "a.gguf"), "gptq-w4", out=str(tmp_path / "b.gguf"), settings=GGUF, stats=stats)
