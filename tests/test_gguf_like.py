"""`--like template.gguf`: a model in the frame of a file of another program, or a refusal with the tensor."""

from __future__ import annotations

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf_models import write_model, write_tokenizer
from safetensors.torch import load_file

import outlierq
from outlierq.core.errors import OutlierqError, SourceError
from outlierq.export.gguf.names import gguf_name

GGUF = "export.format=gguf"
FOUR_BITS = [GGUF, "quantize.group_size=32"]
SMALL = ["calibration.samples=4", "calibration.sequence_length=32"]


def write_olmo(folder, seed: int = 0):
    """Of an architecture that has no row in our table; llama.cpp pairs neighbouring rows of its queries and keys."""
    from transformers import OlmoConfig, OlmoForCausalLM

    torch.manual_seed(seed)
    sizes = {"vocab_size": 288, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    OlmoForCausalLM(OlmoConfig(**sizes, num_attention_heads=4, initializer_range=0.1)).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def rotated(weight: np.ndarray, heads: int = 4) -> np.ndarray:
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def template_of(folder, path, *, dtype=np.float16, change=lambda name, weight: weight, left_out=()):
    """What llama.cpp's converter would make of it, with keys that only the converter knows."""
    writer = GGUFWriter(path, "olmo")
    writer.add_block_count(2)
    writer.add_string("converter.note", "made elsewhere")
    writer.add_token_list([f"t{number}" for number in range(288)])
    writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))
    stored = load_file(folder / "model.safetensors")
    for name in sorted(stored, reverse=True):
        weight, ours = stored[name].numpy(), gguf_name(name, "olmo")
        weight = rotated(weight) if ".attn_q." in ours or ".attn_k." in ours else weight
        if ours not in left_out:
            writer.add_tensor(ours, change(ours, weight).astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors_of(path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


@pytest.mark.parametrize("recipe", ["rtn-w4", "gptq-w4"])
def test_a_model_is_written_into_the_frame_of_its_template(recipe, tmp_path):
    folder, out = write_olmo(tmp_path / "model"), tmp_path / "m.gguf"
    template = template_of(folder, tmp_path / "t.gguf")
    settings = [*FOUR_BITS, *(SMALL if recipe == "gptq-w4" else [])]
    planned = outlierq.plan(str(folder), recipe, settings=settings, like=template)
    outlierq.quantize(str(folder), recipe, out=str(out), settings=settings, like=template)
    assert planned.output_bytes == out.stat().st_size
    assert GGUFReader(out).fields["converter.note"].contents() == "made elsewhere"
    written, meant = tensors_of(out), tensors_of(template)
    assert list(written) == list(meant)
    packed = [name for name, tensor in written.items() if tensor.tensor_type == GGMLQuantizationType.Q4_0]
    assert len(packed) == 14
    for name, tensor in written.items():
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype("f8")
        error = np.linalg.norm(values - meant[name].data) / np.linalg.norm(meant[name].data)
        assert error < (0.3 if name in packed else 1e-3), name


def test_a_packed_template_and_one_of_an_architecture_of_the_table_serve_as_well(tmp_path):
    folder, template = write_model(tmp_path / "model", "qwen3_moe"), tmp_path / "t.gguf"
    outlierq.quantize(str(folder), "rtn-w8", out=str(template), settings=FOUR_BITS)
    outlierq.quantize(str(folder), "rtn-w4", out=str(tmp_path / "a.gguf"), settings=FOUR_BITS, like=template)
    outlierq.quantize(str(folder), "rtn-w4", out=str(tmp_path / "b.gguf"), settings=FOUR_BITS)
    one, other = tensors_of(tmp_path / "a.gguf"), tensors_of(tmp_path / "b.gguf")
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name].data, other[name].data) for name in one)


REFUSED = [
    ({"change": lambda name, weight: weight * 1.02 if name == "blk.1.ffn_up.weight" else weight},
     r"tensor blk\.1\.ffn_up\.weight, whose values differ by .* of t\.gguf is not model\.layers\.1\.mlp\.up_proj"),
    ({"left_out": ("blk.1.attn_v.weight",)}, r"t\.gguf has no tensor blk\.1\.attn_v\.weight"),
    ({"change": lambda name, weight: weight[:, :32] if name == "blk.0.ffn_down.weight" else weight},
     r"blk\.0\.ffn_down\.weight, of shape \[64, 32\]"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "said"), REFUSED)
def test_a_template_that_is_not_of_this_model_is_refused_with_the_tensor(damage, said, tmp_path):
    folder = write_olmo(tmp_path / "model")
    template = template_of(folder, tmp_path / "t.gguf", **damage)
    with pytest.raises(SourceError, match=said):
        outlierq.quantize(str(folder), "rtn-w4", out=str(tmp_path / "m.gguf"), settings=FOUR_BITS, like=template)
    assert not (tmp_path / "m.gguf").exists()


def test_a_template_of_another_model_is_refused(tmp_path):
    folder, other = write_olmo(tmp_path / "model"), write_olmo(tmp_path / "other", seed=1)
    template = template_of(other, tmp_path / "t.gguf")
    with pytest.raises(SourceError, match="whose values differ"):
        outlierq.quantize(str(folder), "rtn-w4", out=str(tmp_path / "m.gguf"), settings=FOUR_BITS, like=template)
    with pytest.raises(OutlierqError, match="is not a GGUF file"):
        shutil.copy(folder / "config.json", tmp_path / "no.gguf")
        outlierq.plan(str(folder), "rtn-w4", settings=FOUR_BITS, like=tmp_path / "no.gguf")


def test_what_is_said_of_a_tokenizer_without_pieces_for_bytes_works(tmp_path):
    folder, template, out = write_model(tmp_path / "model", "qwen2"), tmp_path / "t.gguf", tmp_path / "m.gguf"
    outlierq.quantize(str(folder), "dense", out=str(template), settings=[GGUF])
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["byte_fallback"] = True  # as of SentencePiece
    content |= {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}}
    (folder / "tokenizer.json").write_text(json.dumps(content | {"pre_tokenizer": None}))
    with pytest.raises(SourceError, match="no pieces for 256 of the 256 bytes") as caught:
        outlierq.quantize(str(folder), "rtn-w4", out=str(out), settings=FOUR_BITS)
    assert caught.value.hint.endswith("--like model-f16.gguf")
    outlierq.quantize(str(folder), "rtn-w4", out=str(out), settings=FOUR_BITS, like=template)
    assert outlierq.verify(str(out), str(folder)).sound


def test_a_mixture_in_a_gguf_file_is_not_calibrated_and_the_hint_says_what_is_done_instead(tmp_path):
    folder = write_model(tmp_path / "model", "mixtral", dtype="float16")
    outlierq.quantize(str(folder), "dense", out=str(tmp_path / "a.gguf"), settings=[GGUF])
    with pytest.raises(SourceError, match=r"experts\.gate_up_proj of .*a\.gguf holds all experts") as caught:
        outlierq.plan(str(tmp_path / "a.gguf"), "gguf-q4_k_m")
    assert "--stats" in caught.value.hint


def test_a_gguf_file_that_a_calibrated_recipe_runs_keeps_its_metadata(tmp_path):
    folder = write_model(tmp_path / "model", "qwen2", dtype="float16")
    outlierq.quantize(str(folder), "dense", out=str(tmp_path / "a.gguf"), settings=[GGUF])
    settings = [*FOUR_BITS, *SMALL]
    outlierq.quantize(str(tmp_path / "a.gguf"), "gptq-w4", out=str(tmp_path / "b.gguf"), settings=settings)
    before, after = (GGUFReader(tmp_path / name).fields for name in ("a.gguf", "b.gguf"))
    keys = [key for key in before if not key.startswith(("GGUF.", "general.file_type"))]
    assert len(keys) > 15 and all(after[key].contents() == before[key].contents() for key in keys)
    assert outlierq.verify(str(tmp_path / "b.gguf"), str(tmp_path / "a.gguf")).sound
