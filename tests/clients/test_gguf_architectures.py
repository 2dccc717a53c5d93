"""llama.cpp computes the logits of transformers on the files that we write of each architecture, without a template.

Of tiny random models in float32, with a cache in float32: what differs is the order of summation. GELU, which llama.cpp
looks up in a table of float16 numbers, is rounded so in transformers, too; the last bits of inputs then choose entries.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_models import CONFIGS, write_model

from clients.jobs import run_job
from outlierq.export.gguf.architectures import architectures

pytestmark = pytest.mark.clients

# Of logits with a standard deviation of 0.2 to 0.9: 2.4e-5 was the most that was measured, 5e-3 with GELU. YaRN's
# bounds of gpt-oss are no whole numbers, and llama.cpp rounds them: 2e-3.
EXACT, LOOKED_UP = 5e-5, 8e-3
ROUNDED = ("gemma2", "gemma3_text", "gemma4_text", "starcoder2", "gpt_oss")
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 10000.0,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1 + number / 10 for number in range(8)],
    "long_factor": [2 + number / 10 for number in range(8)],
}  # fmt: skip
WIDER = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
         "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}  # fmt: skip
WIDE_STILL = {"full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1e6},
              "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}  # fmt: skip
TIMES = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_interleaved": True,
         "mrope_section": [11, 11, 10]}  # fmt: skip
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_parameters": LLAMA3}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"rope_parameters": YARN}),
    ("qwen3", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    ("qwen3_next", {"linear_num_value_heads": 2}),
    ("qwen3_5_text", {"rope_parameters": TIMES, "layer_types": ["full_attention", *["linear_attention"] * 3]}),
    ("phi3", {"max_position_embeddings": 2048, "original_max_position_embeddings": 1024, "rope_parameters": LONG}),
    ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    ("gemma3_text", {"rope_parameters": WIDER}),
    ("gemma3_text", {"final_logit_softcapping": 5.0}),
    ("gemma4_text", {"hidden_size_per_layer_input": 32, "num_kv_shared_layers": 3, "use_double_wide_mlp": True}),
    ("gemma4_text", {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}),
    ("gemma4_text", {"attention_k_eq_v": False, "final_logit_softcapping": 5.0, "rope_parameters": WIDE_STILL}),
    ("glm4_moe", {"routed_scaling_factor": 2.0, "norm_topk_prob": False}),
    ("deepseek_v2", {"num_hidden_layers": 3, "q_lora_rank": 32, "routed_scaling_factor": 2.0}),
    ("deepseek_v2", {"rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}}),
    ("deepseek_v3", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}),
    ("deepseek_v3", {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}),
]


def ids(vocabulary: int = 250, count: int = 40) -> list[int]:
    """More tokens than any window has."""
    return [3 + (7 * number * number + 5 * number) % vocabulary for number in range(count)]


def look_gelu_up(model: Any) -> None:
    """Round GELU and what it is of to float16, as llama.cpp's table does between -10 and 10."""
    import torch
    from torch.nn.functional import gelu

    class LookedUp(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found = gelu(x.half().float(), approximate="tanh").half().float()
            return torch.where(x.abs() < 10, found, x.clamp(min=0))

    for module in model.modules():
        for name, child in module.named_children():
            if "GELU" in type(child).__name__:
                setattr(module, name, LookedUp())


def transformers_logits(folder: Path) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    look_gelu_up(model)
    with torch.inference_mode():
        return model(torch.tensor([ids()])).logits[0].numpy()


def llama_logits(file: Path, work: Path) -> np.ndarray:
    asked = {"folder": str(file), "prompt": ids()[:1], "new_tokens": 0, "windows": [], "logits": [ids()]}
    return np.array(run_job("llama.cpp", {**asked, "options": {"exact": True}}, work)["logits"][0])


@pytest.mark.parametrize(("model_type", "more"), [*((name, {}) for name in CONFIGS), *VARIANTS], ids=str)
def test_llama_cpp_computes_the_logits_of_transformers(model_type, more, tmp_path):
    import outlierq

    folder, file = write_model(tmp_path / "model", model_type, **more), tmp_path / "model.gguf"
    outlierq.quantize(str(folder), "dense", out=str(file), settings=["export.format=gguf"])
    expected, found = transformers_logits(folder), llama_logits(file, tmp_path)
    limit = LOOKED_UP if model_type in ROUNDED else EXACT
    assert expected.std() > 0.1 and np.abs(found - expected).max() < limit


@pytest.mark.parametrize("model_type", [name for name, row in architectures().items() if row.scaled])
def test_llama_cpp_multiplies_by_the_number_beside_each_matrix_of_nvfp4(model_type, tmp_path):
    """Of 1 / 1024, which leaves nothing of the logits where it is forgotten; with it the file errs about as Q4_0."""
    import outlierq

    folder = write_model(tmp_path / "model", model_type, intermediate_size=128)
    expected, errors = transformers_logits(folder), {}
    for name, recipe, settings in (("four", "rtn-w4", ["quantize.group_size=32"]), ("nv", "nvfp4", [])):
        file = tmp_path / f"{name}.gguf"
        outlierq.quantize(str(folder), recipe, out=str(file), settings=["export.format=gguf", *settings])
        errors[name] = np.sqrt(np.square(llama_logits(file, tmp_path) - expected).mean())
    assert errors["nv"] < 1.5 * errors["four"]
