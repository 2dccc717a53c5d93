"""Scales that cannot be those of the codes beside them are refused in every format before anything is written.

The formats with readers of their own and writers elsewhere are in `test_sources_fp8.py` and `test_sources_methods.py`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_sources import edit_tensors

import outlierq
from outlierq.core.errors import SourceError

G32 = {"quantize.group_size": 32}
WRITTEN = {
    "int4 of compressed-tensors": ("rtn-w4", G32),
    "with zero points": ("rtn-w4", G32 | {"quantize.symmetric": False}),
    "int8 of compressed-tensors": ("w8a8-dynamic", {}),
    "fp8 of compressed-tensors": ("fp8-dynamic", {}),
    "nvfp4": ("nvfp4", {}),
    "mxfp4": ("mxfp4", {}),
    "mxfp6": ("mxfp6", {}),
    "mxfp8": ("mxfp8", {}),
    "gptq": ("rtn-w4", G32 | {"export.format": "gptq"}),
    "awq": ("rtn-w4", G32 | {"export.format": "awq"}),
    "llm-int8": ("llm-int8", {}),
}
MODULE = "model.layers.1.mlp.up_proj"
NAMES = tuple(f"{MODULE}.{leaf}" for leaf in ("weight_scale", "scales", "SCB"))


@pytest.fixture(scope="module")
def written(tiny_llama, tmp_path_factory) -> Callable[[str], Path]:
    """A function from a format to a folder of it without a record, made once; read-only."""
    folders: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp("written") / "model"
            recipe, settings = WRITTEN[kind]
            outlierq.quantize(tiny_llama, recipe, out=folders[kind], settings=settings, device="cpu")
            (folders[kind] / "outlierq.json").unlink()  # it would say that a file was changed
        return folders[kind]

    return folder


def with_number(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Puts a number in the place of the first scale."""

    def change(scale: torch.Tensor) -> torch.Tensor:
        numbers = scale.float().clone()
        numbers.view(-1)[0] = value
        return numbers.to(scale.dtype)

    return change


DAMAGE = {
    "NaN": with_number(float("nan")),
    "zeros": torch.zeros_like,
    "another shape": lambda scale: scale[:-1].contiguous(),
    "none": None,
}
CASES = [
    (kind, damage)
    for kind in WRITTEN
    for damage in DAMAGE
    if not (kind.startswith("mxfp") and damage == "NaN")  # exponents: the next test
]


def damaged(source: Path, folder: Path, change: Callable[[torch.Tensor], torch.Tensor] | None) -> Path:
    """A copy with other scales of one linear, or without them."""
    shutil.copytree(source, folder)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in NAMES if name in tensors)
        scale = tensors.pop(name)
        if change is not None:
            tensors[name] = change(scale)

    edit_tensors(folder, edit)
    return folder


@pytest.mark.parametrize(("kind", "damage"), CASES)
def test_they_are_refused_with_the_name_of_the_weight_and_nothing_is_written(kind, damage, written, tmp_path):
    folder = damaged(written(kind), tmp_path / "bad", DAMAGE[damage])
    with pytest.raises(SourceError) as refused:
        outlierq.quantize(folder, "rtn-w8", out=tmp_path / "out", device="cpu")
    said = str(refused.value)
    assert MODULE in said or "needs" in said  # of GPTQ and AWQ the shapes
    assert refused.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


@pytest.mark.parametrize("kind", ["mxfp4", "mxfp6", "mxfp8"])
def test_an_exponent_of_255_is_no_scale(kind, written, tmp_path):
    folder = damaged(written(kind), tmp_path / "bad", with_number(255))
    with pytest.raises(SourceError, match="scales are NaN"):
        outlierq.quantize(folder, "rtn-w8", out=tmp_path / "out", device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


@pytest.mark.parametrize("kind", ["int4 of compressed-tensors", "fp8 of compressed-tensors", "nvfp4"])
def test_the_plan_refuses_another_shape_too(kind, written, tmp_path):
    folder = damaged(written(kind), tmp_path / "bad", DAMAGE["another shape"])
    with pytest.raises(SourceError, match="which do not fit"):
        outlierq.plan(folder, "rtn-w8")


@pytest.mark.parametrize("leaf", ["weight_packed", "weight_zero_point"])
def test_codes_and_zero_points_of_another_shape_are_refused_by_their_headers(leaf, written, tmp_path):
    folder = tmp_path / "bad"
    shutil.copytree(written("with zero points"), folder)
    edit_tensors(folder, lambda tensors: tensors.update({f"{MODULE}.{leaf}": tensors[f"{MODULE}.{leaf}"][:-1].clone()}))
    with pytest.raises(SourceError, match=r"codes|zero points"):
        outlierq.plan(folder, "rtn-w8")
