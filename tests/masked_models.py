"""Tiny masked-diffusion models: one of transformers' own classes, and two with code of their own."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from conftest import write_llama

MASK = "<mask>"

CONFIGURATION = """
from transformers import PreTrainedConfig

class TinyConfig(PreTrainedConfig):
    model_type = "tiny_masked"

    def __init__(self, d_model=64, n_heads=4, n_layers=2, mlp=96, vocab_size=260, shift=0, **rest):
        self.d_model, self.n_heads, self.n_layers, self.mlp, self.shift = d_model, n_heads, n_layers, mlp, shift
        super().__init__(vocab_size=vocab_size, **rest)

    @property
    def num_hidden_layers(self):
        return self.n_layers
"""
# As the code of LLaDA does it: blocks in model.transformer.blocks, which return a tuple, attention without a mask.
MODELING = """
import torch
from torch.nn import Embedding, Linear, ModuleDict, ModuleList, functional
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from .configuration_tiny import TinyConfig

class TinyBlock(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, width = config.n_heads, config.d_model
        self.attn_norm, self.ff_norm = torch.nn.RMSNorm(width), torch.nn.RMSNorm(width)
        for name in ("q_proj", "k_proj", "v_proj", "attn_out"):
            setattr(self, name, Linear(width, width, bias=False))
        self.ff_proj, self.up_proj = Linear(width, config.mlp, bias=False), Linear(width, config.mlp, bias=False)
        self.ff_out = Linear(config.mlp, width, bias=False)

    def forward(self, x, attention_bias=None, layer_past=None, use_cache=False):
        normed = self.attn_norm(x)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (part(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in projections)
        x = x + self.attn_out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        normed = self.ff_norm(x)
        return x + self.ff_out(functional.silu(self.ff_proj(normed)) * self.up_proj(normed)), None

class TinyModel(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.transformer = ModuleDict(
            dict(
                wte=Embedding(config.vocab_size, config.d_model),
                wpe=Embedding(512, config.d_model),
                blocks=ModuleList([TinyBlock(config) for _ in range(config.n_layers)]),
                ln_f=torch.nn.RMSNorm(config.d_model),
                ff_out=Linear(config.d_model, config.vocab_size, bias=False),
            )
        )

class TinyModelLM(PreTrainedModel):
    config_class = TinyConfig
    base_model_prefix = "model"
    _no_split_modules = ["TinyBlock"]

    def __init__(self, config, **_):
        super().__init__(config)
        self.model = TinyModel(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.transformer.wte

    def get_output_embeddings(self):
        return self.model.transformer.ff_out

    def forward(self, input_ids=None, attention_mask=None, use_cache=None, **_):
        parts = self.model.transformer
        x = parts.wte(input_ids) + parts.wpe.weight[: input_ids.shape[1]]
        for block in parts.blocks:
            x, _ = block(x, attention_bias=None, layer_past=None, use_cache=False)
        return CausalLMOutput(logits=parts.ff_out(parts.ln_f(x)))
"""


def with_mask_token(folder: Path, **config) -> Path:
    """The folder, its tokenizer with a mask token, whose id is 259, and keys added to its config."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"mask_token": MASK})
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def write_masked_llama(folder: Path, **config) -> Path:
    """A Llama whose tokens see all others, with a mask token."""
    return with_mask_token(write_llama(folder, is_causal=False, **config), mask_token_id=259)


def write_own_code(folder: Path, auto_class: str) -> Path:
    """A model with code of its own, known to one Auto class: AutoModelForCausalLM (LLaDA) or AutoModel (Dream)."""
    from safetensors.torch import save_file

    write_llama(folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / "configuration_tiny.py").write_text(CONFIGURATION)
    (folder / "modeling_tiny.py").write_text(MODELING)
    auto_map = {"AutoConfig": "configuration_tiny.TinyConfig", auto_class: "modeling_tiny.TinyModelLM"}
    content = {"model_type": "tiny_masked", "architectures": ["TinyModelLM"], "auto_map": auto_map, "d_model": 64}
    content |= {"vocab_size": 260, "dtype": "float32", "mask_token_id": 259, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(content))
    with_mask_token(folder)
    save_file(own_tensors(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def own_tensors() -> dict[str, torch.Tensor]:
    """Random weights of it."""
    torch.manual_seed(0)
    tensors = {"wte": (260, 64), "wpe": (512, 64), "ff_out": (260, 64)}
    named = {f"model.transformer.{name}.weight": 0.3 * torch.randn(shape) for name, shape in tensors.items()}
    named["model.transformer.ln_f.weight"] = torch.ones(64)
    for number in range(2):
        shapes = dict.fromkeys(("q_proj", "k_proj", "v_proj", "attn_out"), (64, 64))
        shapes |= {"ff_proj": (96, 64), "up_proj": (96, 64), "ff_out": (64, 96)}
        for name, shape in shapes.items():
            named[f"model.transformer.blocks.{number}.{name}.weight"] = 0.1 * torch.randn(shape)
        for name in ("attn_norm", "ff_norm"):
            named[f"model.transformer.blocks.{number}.{name}.weight"] = 0.5 + torch.rand(64)
    return named
