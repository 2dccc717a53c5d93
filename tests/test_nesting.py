"""Weights that are numbers of their new grid already, as published ones often are, are carried bit for bit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import outlierq
from outlierq.core.scheme import QuantScheme
from outlierq.load import open_checkpoint, served
from outlierq.ops.grid import in_groups, minmax_grid, nearest_e2m1, storable
from outlierq.quantize.gptq import gptq
from outlierq.quantize.rtn import rtn

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from coverage_models import tiny_model, write_checkpoint

NVFP4 = QuantScheme(4, 16, kind="float", scales="two-level")
MXFP4 = QuantScheme(4, 32, kind="float", scales="power-of-two")
FP8 = QuantScheme(8, None, kind="float", scale_dtype="bfloat16")
FP8_BLOCKS = QuantScheme(8, None, kind="float", scale_dtype="bfloat16", block=(32, 32))


def on_mxfp4(rows: int = 64, columns: int = 128) -> torch.Tensor:
    """Random numbers of MXFP4, each group of 32 with a power of its own."""
    generator = torch.Generator().manual_seed(0)
    numbers = nearest_e2m1(torch.randn(rows, columns // 32, 32, generator=generator) * 2)
    powers = torch.randint(-9, -4, (rows, columns // 32, 1), generator=generator)
    return torch.ldexp(numbers, powers).flatten(1)


@pytest.mark.parametrize("scheme", [MXFP4, NVFP4, FP8, FP8_BLOCKS], ids=str)
@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_numbers_of_mxfp4_lose_nothing_in_a_grid_that_they_nest_in(scheme, search):
    w = on_mxfp4()
    assert torch.equal(rtn(w, None, scheme, scale_search=search).dequantize().float(), w)


def test_numbers_of_fp8_with_a_power_of_two_for_a_block_lose_nothing_in_such_blocks():
    numbers = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).mul(50).to(torch.float8_e4m3fn).float()
    w = numbers * torch.tensor([2.0**-9, 2.0**-12]).repeat_interleave(32)[:, None]
    assert torch.equal(rtn(w, None, FP8_BLOCKS).dequantize().float(), w)


@pytest.mark.parametrize("scheme", [NVFP4, FP8], ids=str)
def test_other_weights_have_the_grid_that_they_had(scheme):
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).mul(0.1).bfloat16().float()
    w[0] = on_mxfp4()[0]
    grid, largest = minmax_grid(w, scheme), in_groups(w, scheme).abs().amax(-1)
    units = torch.tensor([1024.0]) if scheme is NVFP4 else None
    assert torch.equal(grid.scale[1:], storable(largest / scheme.code_max, None, scheme, units).scale[1:])
    assert torch.equal(grid.round(in_groups(w, scheme))[0].flatten(), w[0])


def test_a_published_mxfp4_model_goes_into_nvfp4_without_loss_and_the_report_says_so(tmp_path):
    write_checkpoint(tiny_model("llama", "text"), tmp_path / "plain")
    outlierq.quantize(tmp_path / "plain", "mxfp4", out=tmp_path / "source", device="cpu")
    report = outlierq.quantize(tmp_path / "source", "nvfp4", out=tmp_path / "out", device="cpu")
    source, out = (served(open_checkpoint(str(tmp_path / name))) for name in ("source", "out"))
    assert all(torch.equal(source.read(name), out.read(name)) for name in source.tensors)
    said = [note for note in report.notes if "are carried bit for bit" in note]
    assert said == ["28 of 28 quantized weights are carried bit for bit: they are numbers of nvfp4"]


def test_error_feedback_has_nothing_to_correct_where_weights_are_on_the_grid():
    from outlierq.core.stats import InputStats

    w = on_mxfp4()
    x = torch.randn(512, 128, generator=torch.Generator().manual_seed(1))
    quantized = gptq(w, InputStats(tokens=512, sequences=1, hessian=(x.T @ x) / 512), NVFP4)
    assert torch.equal(quantized.dequantize().float(), w)
