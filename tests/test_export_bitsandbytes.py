"""LLM.int8() checkpoints in the layout of bitsandbytes: written, read back, computed, and loaded by the client."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from outlierq.core.errors import OutputError, RecipeError, SourceError
from outlierq.core.model import LinearSite
from outlierq.core.scheme import ActivationScheme, QuantScheme
from outlierq.export.bitsandbytes import BitsandbytesFormat, row_maxima
from outlierq.export.layout import OutputTensor, make_layout
from outlierq.load import load_model, open_checkpoint, unpacked
from outlierq.load.packed.bitsandbytes import decode_int8
from outlierq.load.packed.outlier_split import DynamicSplitLinear
from outlierq.recipe import load

NAME = "model.layers.0.mlp.up_proj"
SITE = LinearSite(NAME, f"{NAME}.weight", None, 96, 64, 0)
# The Python of an environment with transformers, accelerate and bitsandbytes.
CLIENT = os.environ.get("OUTLIERQ_BITSANDBYTES_PYTHON", "")
CLIENT_CODE = """
import sys, torch, transformers, bitsandbytes
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
layer = model.model.layers[0].mlp.up_proj
assert type(layer) is bitsandbytes.nn.Linear8bitLt, type(layer)
x = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(layer(x), sys.argv[3])
    print(model.generate(torch.arange(3, 13)[None], max_new_tokens=4).shape[1])
"""


@pytest.fixture(scope="module")
def int8_folder(tiny_llama, tmp_path_factory) -> Path:
    """The tiny model through recipe llm-int8."""
    from outlierq.pipeline.planning.decide import make_plan
    from outlierq.pipeline.quantize import quantize

    out = tmp_path_factory.mktemp("int8") / "out"
    plan = make_plan(open_checkpoint(str(tiny_llama)), load("llm-int8"))
    quantize(plan, out)
    assert sum(path.stat().st_size for path in out.iterdir() if path.name != "outlierq.json") == plan.output_bytes
    return out


def stored(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_the_layout_is_that_of_transformers(int8_folder):
    tensors = stored(int8_folder)
    assert (tensors[f"{NAME}.weight"].dtype, tensors[f"{NAME}.weight"].shape) == (torch.int8, (96, 64))
    assert (tensors[f"{NAME}.SCB"].dtype, tensors[f"{NAME}.SCB"].shape) == (torch.float32, (96,))
    assert (tensors[f"{NAME}.weight_format"].dtype, tensors[f"{NAME}.weight_format"].item()) == (torch.uint8, 0)
    config = json.loads((int8_folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bitsandbytes" and config["load_in_8bit"] is True
    assert config["llm_int8_threshold"] == 6.0 and config["llm_int8_skip_modules"] == ["lm_head"]


def test_codes_and_row_maxima_are_those_of_the_paper(int8_folder, tiny_llama):
    """SCB is the largest magnitude of a row, and each code the nearest of 127 w / SCB (either one at a tie)."""
    tensors, plain = stored(int8_folder), open_checkpoint(str(tiny_llama))
    weight = plain.read(f"{NAME}.weight").double()
    maxima = weight.abs().amax(1)
    assert torch.equal(tensors[f"{NAME}.SCB"].double(), maxima)
    distance = (tensors[f"{NAME}.weight"].double() - 127 * weight / maxima[:, None]).abs()
    assert distance.max() <= 0.5 + 1e-5


def test_reading_gives_codes_times_the_127th_part(int8_folder):
    tensors = stored(int8_folder)
    codes, maxima = tensors[f"{NAME}.weight"].numpy(), tensors[f"{NAME}.SCB"].numpy()
    expected = codes.astype(np.float64) * (maxima.astype(np.float64) / 127)[:, None]
    found = unpacked(open_checkpoint(str(int8_folder))).read(f"{NAME}.weight").numpy()
    assert np.allclose(found, expected, rtol=1e-6, atol=0)
    assert np.array_equal(found, decode_int8(codes, maxima))


def test_the_loaded_model_finds_its_outliers_at_run_time(int8_folder, tiny_llama):
    model = load_model(open_checkpoint(str(int8_folder)))
    layers = [part for part in model.modules() if isinstance(part, DynamicSplitLinear)]
    assert len(layers) == 14 and all(layer.threshold == 6.0 for layer in layers)
    plain = load_model(open_checkpoint(str(tiny_llama)))
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        found, expected = model(ids).logits, plain(ids).logits
    assert 1e-4 < ((found - expected).norm() / expected.norm()).item() < 0.03


def test_what_belongs_to_the_codes_counts_as_no_parameters(int8_folder, tiny_llama):
    from outlierq.evaluate.comparison import logical_tensors, measure_size

    found, plain = (measure_size(logical_tensors(open_checkpoint(str(f)))) for f in (int8_folder, tiny_llama))
    assert found.parameters == plain.parameters
    assert 8 < found.quantized_bits_per_weight < 9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_scale_is_the_127th_part_of_a_row_maximum(dtype):
    scale = (torch.rand(20_000, generator=torch.Generator().manual_seed(0)) * 3 + 1e-3).to(dtype).float()
    assert torch.equal(row_maxima(scale, "x") / 127, scale)


def test_so_is_every_row_maximum_over_127():
    largest = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) + 1e-3
    assert torch.equal(row_maxima(largest / 127, "x") / 127, largest / 127)


def test_a_scale_that_no_row_maximum_gives_is_an_error_and_not_a_change():
    some = torch.rand(2000, generator=torch.Generator().manual_seed(0)) + 1
    with pytest.raises(OutputError, match="row maxima"):
        row_maxima(some, "x")


def test_other_schemes_are_kept_in_16_bits_with_a_reason():
    assert BitsandbytesFormat({}).obstacle(SITE, QuantScheme(8, None)) is None
    assert BitsandbytesFormat({}).obstacle(SITE, QuantScheme(8, None, activations=ActivationScheme())) is None
    static = ActivationScheme(dynamic=False, per="tensor")
    for scheme in (QuantScheme(4, None), QuantScheme(8, 64), QuantScheme(8, None, False)):
        assert "int8 symmetric per channel" in BitsandbytesFormat({}).obstacle(SITE, scheme)
    assert "inputs per token" in BitsandbytesFormat({}).obstacle(SITE, QuantScheme(8, None, activations=static))


def test_a_recipe_with_nothing_to_store_is_refused_by_the_plan(tiny_llama):
    from outlierq.pipeline.planning.decide import make_plan

    recipe = load("llm-int8", ["quantize.bits=4"])
    with pytest.raises(RecipeError, match="bitsandbytes stores int8"):
        make_plan(open_checkpoint(str(tiny_llama)), recipe)


def test_tiled_codes_and_folders_without_4_bit_codes_are_refused(int8_folder, tmp_path):
    import shutil

    from safetensors.torch import save_file

    folder = Path(shutil.copytree(int8_folder, tmp_path / "tiled"))
    tensors = stored(folder)
    tensors[f"{NAME}.weight_format"] = torch.tensor(1, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match="tiled layout"):
        unpacked(open_checkpoint(str(folder))).read(f"{NAME}.weight")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="holds no compressed weight"):
        unpacked(open_checkpoint(str(folder)))


def test_tensors_of_odd_length_do_not_push_wider_ones_off_their_places():
    shapes = [("a", "U8", ()), ("b", "F32", (3,)), ("c", "I8", (3, 5)), ("d", "BF16", (4, 4)), ("e", "BF16", (3,))]
    layout = make_layout([OutputTensor(name, dtype, shape, "u") for name, dtype, shape in shapes], 1 << 20)
    width = {"U8": 1, "I8": 1, "BF16": 2, "F32": 4}
    assert len(layout.places) == 5
    assert all(place.offset % width[place.tensor.dtype] == 0 for place in layout.places.values())
    assert sum(place.tensor.nbytes for place in layout.places.values()) + len(*layout.headers.values()) == sum(
        layout.sizes.values()
    )


@pytest.mark.slow
@pytest.mark.skipif(not CLIENT, reason="set OUTLIERQ_BITSANDBYTES_PYTHON to a Python that has bitsandbytes")
def test_transformers_with_bitsandbytes_loads_it_and_computes_the_same(int8_folder, tmp_path):
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[:, 5] *= 20
    torch.save(x, tmp_path / "x.pt")
    words = [CLIENT, "-c", CLIENT_CODE, int8_folder, tmp_path / "x.pt", tmp_path / "y.pt"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("14")
    theirs = torch.load(tmp_path / "y.pt").float()
    layer = load_model(open_checkpoint(str(int8_folder))).model.layers[0].mlp.up_proj
    assert x.abs().amax() > 6
    assert ((layer(x.float()) - theirs).abs().max() / theirs.abs().max()).item() < 2**-7  # their output is bfloat16
