"""Types of GGUF by name: what we write llama.cpp's reader and ours read, bit for bit, and mixes are llama.cpp's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_llama
from gguf import GGMLQuantizationType, GGUFReader, LlamaFileType
from gguf.quants import dequantize
from gguf_models import write_model
from test_export_gguf import write_words

from outlierq.core.errors import RecipeError
from outlierq.core.gguf.mixes import Shape, mixes, type_in_mix
from outlierq.core.gguf.types import block_types
from outlierq.core.model import LinearSite
from outlierq.core.scheme import gguf_scheme
from outlierq.core.stats import InputStats
from outlierq.export.gguf.blocks import encode_blocks
from outlierq.load import decode_rows, open_checkpoint
from outlierq.ops.codebooks import codewords, nearest_vectors
from outlierq.pipeline.ledger.output import Output
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.quantize import quantize
from outlierq.pipeline.verify import verify
from outlierq.quantize.gptq import gptq
from outlierq.quantize.rtn import rtn
from outlierq.recipe import Recipe, load, parse, shipped

NAMES = list(block_types())
ROWS, COLUMNS = 24, 512


def weights(seed: int = 0) -> torch.Tensor:
    """[out, in] with a row of zeros, and one far larger than the others."""
    w = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) * 0.05
    w[3], w[4] = 0, w[4] * 40
    return w


def linear() -> LinearSite:
    return LinearSite("a", "a.weight", None, ROWS, COLUMNS, 0)


def parts(raw: torch.Tensor, name: str, unit: float = 1.0) -> dict[str, torch.Tensor]:
    scale = {"scale": torch.tensor([1 / unit])} if name == "NVFP4" else {}
    return {"weight": raw, "heads": torch.tensor(0), **scale}


@pytest.mark.parametrize("name", NAMES)
def test_gguf_reads_from_our_blocks_what_was_meant_and_so_do_we(name):
    quantized = rtn(weights(), None, gguf_scheme(name))
    raw = encode_blocks(linear(), quantized)
    assert raw.shape == (ROWS, COLUMNS // block_types()[name].columns * block_types()[name].nbytes)
    unit = quantized.super_scale.item() if name == "NVFP4" else 1.0  # llama.cpp multiplies by 1 / unit afterwards
    assert np.array_equal(dequantize(raw.numpy(), GGMLQuantizationType[name]) / unit, quantized.dequantize().numpy())
    back = decode_rows("gguf", parts(raw, name, unit), quantized.scheme, (ROWS, COLUMNS), 8, 24)
    meant = quantized.rows(8, 24)
    assert torch.equal(back.codes.float(), meant.codes.float())
    for field in ("scale", "zero_point", "super_scale"):
        one, other = getattr(back, field), getattr(meant, field)
        assert (one is None) == (other is None)
        assert one is None or (one.dtype == other.dtype and torch.equal(one.float(), other.float()))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("name", NAMES)
def test_any_bytes_are_read_as_gguf_reads_them(name):
    kind, generator = block_types()[name], np.random.default_rng(1)
    raw = generator.integers(0, 256, (ROWS, COLUMNS // kind.columns, kind.nbytes), np.uint8)
    if kind.columns <= 64:
        scales = {"MXFP4": [0], "NVFP4": [0, 1, 2, 3]}.get(name, [1, 3])
        raw[..., scales] &= 0x3F  # scales that are finite
    raw = raw.reshape(ROWS, -1)
    read = decode_rows("gguf", parts(torch.from_numpy(raw), name), gguf_scheme(name), (ROWS, COLUMNS), 0, ROWS)
    expected = dequantize(raw, GGMLQuantizationType[name])
    assert np.array_equal(read.dequantize().numpy(), expected, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_rounding_errs_as_little_as_the_bits_allow(name):
    w = weights()
    error = ((rtn(w, None, gguf_scheme(name)).dequantize() - w).norm() / w.norm()).item()
    # Of normal weights with max-scaled blocks; 2 ** -bits is what a bit is worth.
    assert error < 2 * 2.0 ** -block_types()[name].bits


@pytest.mark.parametrize("name", [name for name in NAMES if block_types()[name].vector > 1])
def test_the_nearest_vector_is_the_nearest_that_can_be_stored(name):
    kind = block_types()[name]
    ratio = torch.randn(40, 8, generator=torch.Generator().manual_seed(2)) * kind.codes[1] / 2
    importance = torch.rand(8, generator=torch.Generator().manual_seed(3)) + 0.1  # of a vector
    vectors = nearest_vectors(ratio, kind, importance[None])
    distance = ((vectors - ratio).square() * importance).sum(1)
    words = codewords(name)
    if kind.vector == 8:
        signs = torch.tensor([[1 - 2 * (n >> bit & 1) for bit in range(8)] for n in range(256)])
        signs = signs[(signs < 0).sum(1) % 2 == 0] if kind.even_signs else signs
        best = torch.stack(
            [((words * sign - ratio[:, None]).square() * importance).sum(-1).amin(1) for sign in signs.float()]
        ).amin(0)
        assert (distance <= best * (1.25 if kind.even_signs else 1.0001)).all()
        assert distance.sum() <= best.sum() * 1.02
    assert ((vectors < 0).sum(1) % 2 == 0).all() or not kind.even_signs


def test_without_statistics_the_nearest_vector_is_looked_for_among_those_near_and_is_the_same():
    kind, generator = block_types()["IQ3_S"], torch.Generator().manual_seed(4)
    ratio = torch.randn(6, 4000, 8, generator=generator) * torch.tensor([1, 4, 9, 20, 60, 400]).view(-1, 1, 1)
    ratio[0, :50], ratio[1], ratio[2, 0] = 0, ratio[1].round(), 1e30
    ratio = ratio.view(-1, 8)
    alike = torch.ones(1, 8)
    assert torch.equal(nearest_vectors(ratio, kind), nearest_vectors(ratio, kind, alike))
    assert nearest_vectors(torch.full((1, 8), float("nan")), kind).shape == (1, 8)


def test_a_lattice_of_q4_1_is_found_by_rounding():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (ROWS, COLUMNS // 32, 32), generator=generator).float()
    codes[..., 0], codes[..., 1] = 0, 15
    scale = (torch.rand(ROWS, COLUMNS // 32, 1, generator=generator) * 0.01 + 0.001).half().float()
    low = (torch.randn(ROWS, COLUMNS // 32, 1, generator=generator) * 0.05).half().float()
    w = (codes * scale + low).view(ROWS, COLUMNS)
    quantized = rtn(w, None, gguf_scheme("Q4_1"))
    assert torch.equal(quantized.codes.view(codes.shape).float(), codes)
    assert ((quantized.dequantize() - w).norm() / w.norm()).item() < 1e-3


class TestMixes:
    """`llama_tensor_get_type` of llama.cpp, by its own answers for a Llama of 32 blocks."""

    shape = Shape(layers=32, sharing=4, experts=0)

    def types(self, mix: str, part: str, shape: Shape | None = None) -> list[str]:
        shape = shape or self.shape
        return [type_in_mix(mix, part, layer, 4096, shape, tied=False) for layer in range(shape.layers)]

    def test_q4_k_m_gives_more_bits_to_half_of_the_blocks(self):
        more = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
        for part in ("attn_v", "ffn_down"):
            assert [n for n, kind in enumerate(self.types("Q4_K_M", part)) if kind == "Q6_K"] == more
        assert set(self.types("Q4_K_M", "attn_q")) == {"Q4_K"}

    def test_the_first_blocks_of_q3_k_m_and_iq2_m(self):
        assert self.types("Q3_K_M", "attn_v")[:3] == ["Q5_K", "Q5_K", "Q4_K"]
        assert self.types("Q3_K_M", "ffn_down")[:3] == ["Q5_K", "Q5_K", "Q4_K"]
        assert self.types("IQ2_M", "ffn_down")[3:5] == ["IQ3_S", "IQ2_S"]
        assert set(self.types("IQ2_M", "attn_v")) == {"Q4_K"}

    def test_eight_experts_and_seventy_billion(self):
        assert set(self.types("Q4_K_M", "attn_k", Shape(32, 4, 8))) == {"Q8_0"}
        assert set(self.types("Q4_K_M", "attn_output", Shape(32, 4, 8))) == {"Q5_K"}
        assert "Q4_K" not in self.types("Q4_K_M", "attn_v", Shape(80, 8, 0))

    def test_the_output_and_the_embeddings(self):
        outside = {(part, tied): type_in_mix("IQ2_M", part, None, 4096, self.shape, tied=tied)
                   for part, tied in (("output", False), ("token_embd", False), ("token_embd", True))}  # fmt: skip
        assert list(outside.values()) == ["Q5_K", "IQ3_S", "Q5_K"]
        assert type_in_mix("Q4_K_M", "token_embd", None, 576, self.shape, tied=True) == "Q8_0"
        assert type_in_mix("Q4_K_M", "token_embd", None, 576, self.shape, tied=False) == "Q4_K"


def test_attention_is_counted_among_the_blocks_that_have_it_and_shared_as_in_the_first(tmp_path):
    """As `llama-quantize --dry-run` answers for this model; attention in the blocks 2, 5, 8, 11 and 14 of 16."""
    layers = ["conv", "conv", "full_attention"] * 5 + ["conv"]
    sizes = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 16}
    folder = write_model(tmp_path / "model", "lfm2", dtype="bfloat16", **sizes, layer_types=layers)

    def types(mix: str) -> list[str]:
        recipe = f"quantize: {{method: rtn, mix: {mix}, ignore: []}}\nexport: {{format: gguf}}"
        plan = make_plan(open_checkpoint(str(folder)), parse(recipe))
        return [p.scheme.type for p in plan.sites if p.site.module.endswith("v_proj")]

    assert types("Q3_K_M") == ["Q5_K", "Q5_K", "Q4_K", "Q4_K", "Q4_K"]
    assert types("Q4_K_M") == ["Q4_K", "Q4_K", "Q6_K", "Q4_K", "Q6_K"]
    assert types("Q2_K") == ["Q3_K"] * 5


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory) -> Path:
    """A random tied Llama of 8 blocks; 256 divides its widths but for one. Read-only."""
    folder = write_llama(
        tmp_path_factory.mktemp("wide") / "model", hidden_size=256, intermediate_size=288, num_hidden_layers=8
    )
    (folder / "tokenizer.json").unlink()
    write_words(folder)
    return folder


def written(source: Path, out: Path, recipe: str | Recipe) -> GGUFReader:
    """The file that a recipe makes, whose size is what its plan said; `verify` finds nothing wrong."""
    plan = make_plan(open_checkpoint(str(source)), parse(recipe) if isinstance(recipe, str) else recipe)
    quantize(plan, out)
    assert sum(path.stat().st_size for path in out.iterdir() if path.name != "outlierq.json") == plan.output_bytes
    assert verify(str(out), str(source)).faults == []
    return GGUFReader(out / "model.gguf")


def file_type_of(reader: GGUFReader) -> str:
    return LlamaFileType(reader.fields["general.file_type"].contents()).name


def types_of(reader: GGUFReader) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}


# Of the others the types are held above; that each file is what its plan says is held by the slow tests.
USUAL = ("IQ2_M", "Q3_K_M", "Q4_K_M")


@pytest.mark.parametrize("mix", [mix if mix in USUAL else pytest.param(mix, marks=pytest.mark.slow) for mix in mixes()])
def test_a_mix_is_written_as_planned_with_the_types_that_llama_cpp_takes(wide_llama, tmp_path, mix):
    recipe = f"quantize: {{method: rtn, mix: {mix}, ignore: []}}\nexport: {{format: gguf}}"
    reader = written(wide_llama, tmp_path / "out", recipe)
    assert file_type_of(reader) == f"MOSTLY_{mix}"
    types, shape = types_of(reader), Shape(8, 2, 0)
    for layer in range(8):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            kind = type_in_mix(mix, part, layer, 256, shape, tied=True)
            meant = block_types()[kind].instead if part == "ffn_down" else kind
            assert types[f"blk.{layer}.{part}.weight"] == meant
    assert types["token_embd.weight"] == ("Q5_K" if mix == "IQ2_M" else "Q6_K")
    assert types["blk.0.attn_norm.weight"] == "F32"


SHIPPED = [name for name in shipped() if name.startswith("gguf-")]
ALL = [name if name == "gguf-q5_k_m" else pytest.param(name, marks=pytest.mark.slow) for name in SHIPPED]


@pytest.mark.parametrize("name", ALL)
def test_the_file_of_a_shipped_recipe_has_the_size_that_the_plan_says(wide_llama, tmp_path, name):
    (tmp_path / "text.txt").write_text("What the settings say of this text is all that matters here. " * 40)
    little = {"text": tmp_path / "text.txt", "samples": 2, "sequence_length": 64}
    few = [] if name == "gguf-q8_0" else [f"calibration.{key}={value}" for key, value in little.items()]
    assert len(written(wide_llama, tmp_path / "out", load(name, few)).tensors) == 8 * 9 + 2


def test_patterns_give_types_to_single_tensors_in_a_mix(wide_llama, tmp_path):
    recipe = """
quantize:
  method: rtn
  mix: Q4_K_M
  ignore: []
  embeddings: Q4_K
  overrides:
    - {match: "*.0.self_attn.q_proj", type: IQ3_XXS}
    - {match: "*.1.self_attn.q_proj", keep: true}
export: {format: gguf}
"""
    reader = written(wide_llama, tmp_path / "out", recipe)
    assert file_type_of(reader) == "MOSTLY_Q4_K_M"
    types = types_of(reader)
    assert [types[f"blk.{n}.attn_q.weight"] for n in range(3)] == ["IQ3_XXS", "BF16", "Q4_K"]
    assert types["token_embd.weight"] == "Q4_K"


def test_without_data_the_embeddings_get_the_scales_that_the_recipe_looks_for(wide_llama, tmp_path):
    recipe = "quantize: {method: rtn, type: Q4_K, scale_search: mse, embeddings: Q3_K}\nexport: {format: gguf}"
    tensors = {tensor.name: tensor for tensor in written(wide_llama, tmp_path / "out", recipe).tensors}
    table = open_checkpoint(str(wide_llama)).read("model.embed_tokens.weight").float()
    meant = rtn(table, None, gguf_scheme("Q3_K"), scale_search="mse").dequantize()
    found = tensors["token_embd.weight"]
    assert np.array_equal(dequantize(found.data, found.tensor_type), meant.numpy())


class TestNvfp4:
    """NVFP4 has a number beside each matrix, which only some of llama.cpp's architectures multiply by."""

    recipe = "quantize: {method: rtn, type: NVFP4, scale_search: mse, ignore: []}\nexport: {format: gguf}"

    def test_a_tensor_beside_each_matrix_holds_its_number(self, wide_llama, tmp_path):
        reader = written(wide_llama, tmp_path / "out", self.recipe)
        assert file_type_of(reader) == "MOSTLY_NVFP4"
        types, numbers = types_of(reader), {tensor.name: tensor.data for tensor in reader.tensors}
        packed = [name for name, kind in types.items() if kind == "NVFP4"]
        assert len(packed) == 8 * 6
        assert all(numbers[name.replace(".weight", ".scale")].tolist() == [1 / 1024] for name in packed)
        assert types["token_embd.weight"] == types["blk.0.ffn_down.weight"] == "BF16"
        stored = open_checkpoint(str(wide_llama)).read("model.layers.0.mlp.up_proj.weight").float()
        found = dequantize(numbers["blk.0.ffn_up.weight"], GGMLQuantizationType.NVFP4) / 1024
        assert np.linalg.norm(found - stored.numpy()) < 0.12 * stored.norm().item()

    def test_what_cannot_have_one_is_kept_and_said(self, wide_llama, tmp_path):
        said = " ".join(make_plan(open_checkpoint(str(wide_llama)), parse(self.recipe)).notes)
        assert "gguf stores blocks of 64 columns as NVFP4, and 288 is no multiple of it" in said
        folder = write_model(tmp_path / "model", "qwen2", num_hidden_layers=1)
        with pytest.raises(RecipeError, match=r"none of the 8 linears.* llama\.cpp does not read in this architecture"):
            make_plan(open_checkpoint(str(folder)), parse(self.recipe))


MIXED = """
quantize: {method: rtn, mix: Q3_K_M, scale_search: mse, ignore: []}
export: {format: gguf}
"""
CALIBRATED = """
calibration: {samples: 2, sequence_length: 32}
quantize: {method: gptq, type: IQ4_NL, embeddings: Q5_0, ignore: []}
export: {format: gguf}
"""


@pytest.mark.parametrize("recipe", [MIXED, CALIBRATED], ids=["mix", "calibrated"])
def test_a_stopped_run_of_types_ends_in_the_same_bytes(recipe, tmp_path, monkeypatch):
    width = 256 if recipe == MIXED else 64
    folder = write_llama(tmp_path / "model", hidden_size=width, intermediate_size=width, num_hidden_layers=3)
    (folder / "tokenizer.json").unlink()
    write_words(folder)

    def run(name: str) -> bytes:
        quantize(make_plan(open_checkpoint(str(folder)), parse(recipe)), tmp_path / name)
        return (tmp_path / name / "model.gguf").read_bytes()

    real, seen = Output.commit, []

    def stopping(self, *rest, **named):
        seen.append(rest)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(self, *rest, **named)

    monkeypatch.setattr(Output, "commit", stopping)
    with pytest.raises(KeyboardInterrupt):
        run("cut")
    assert not (tmp_path / "cut").exists()
    monkeypatch.setattr(Output, "commit", lambda self, *rest, **named: seen.append(rest) or real(self, *rest, **named))
    resumed = run("cut")
    assert len(seen) == 3 + 4 - 2, "two units were done, of three blocks and what lies outside"
    monkeypatch.setattr(Output, "commit", real)
    assert resumed == run("whole")


@pytest.mark.parametrize("name", NAMES)
def test_every_type_is_rounded_with_error_feedback_on_its_own_grid(name):
    w = weights()
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2048, COLUMNS, generator=generator) @ torch.randn(COLUMNS, COLUMNS, generator=generator)
    hessian = x.T @ x / len(x)
    stats = InputStats(tokens=len(x), sequences=1, hessian=hessian)
    scheme = gguf_scheme(name)
    errors = [
        ((q.dequantize() - w) @ hessian * (q.dequantize() - w)).sum().item()
        for q in (rtn(w, None, scheme), rtn(w, stats, scheme, scale_search="hessian"), gptq(w, stats, scheme))
    ]
    assert errors[1] < errors[0]
    assert errors[2] < 0.7 * errors[1]


class TestRefusals:
    def refusal(self, text: str) -> str:
        with pytest.raises(RecipeError) as caught:
            parse(text)
        return str(caught.value)

    def test_a_misspelt_type_or_mix_gets_the_nearest_name(self):
        text = "quantize: {method: rtn, type: Q4K}\nexport: {format: gguf}"
        assert "'Q4K' is no type of GGUF; did you mean Q4_K?" in self.refusal(text)
        text = "quantize: {method: rtn, mix: Q4_K_X}\nexport: {format: gguf}"
        assert "'Q4_K_X' is no mix of types; did you mean" in self.refusal(text)

    def test_a_type_decides_what_other_keys_would(self):
        text = "quantize: {method: rtn, type: Q4_K, bits: 5}\nexport: {format: gguf}"
        assert "quantize.bits: leave it out, the type decides it" in self.refusal(text)
        text = "quantize: {method: rtn, type: Q4_K, mix: Q4_K_M}\nexport: {format: gguf}"
        assert "quantize.type: leave it out, the mix decides it" in self.refusal(text)

    def test_no_other_format_has_them(self):
        text = "quantize: {method: rtn, type: Q4_K}"
        assert "compressed-tensors has no types of GGUF; `export.format: gguf` has" in self.refusal(text)
