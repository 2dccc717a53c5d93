"""Tiny random models that see or hear, as transformers saves them, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 260
IMAGE, VIDEO, BEGIN, END, AUDIO = 3, 4, 5, 6, 7
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.05, "tie_word_embeddings": False,
}  # fmt: skip
PLACES = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": BEGIN, "vision_end_token_id": END}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
# The tower of each is larger than its text decoder: the blocks are not found by size.
SIGHT = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
SIGHT |= {"image_size": 16, "patch_size": 4, "vision_use_head": False}
QWEN_SIGHT = {"depth": 3, "num_heads": 4, "intermediate_size": 256, "patch_size": 4, "temporal_patch_size": 1}
QWEN_SIGHT |= {"spatial_merge_size": 2, "in_channels": 3}


def _llama() -> Any:
    return transformers.LlamaConfig(**TEXT)


def _siglip() -> Any:
    return transformers.SiglipVisionConfig(**SIGHT)


def _qwen2_vl() -> Any:
    sight = {**QWEN_SIGHT, "embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2}
    return transformers.Qwen2VLConfig(text_config={**TEXT, **MROPE}, vision_config=sight, **PLACES)


def _qwen2_5_vl() -> Any:
    sight = {**QWEN_SIGHT, "hidden_size": 64, "out_hidden_size": 64, "fullatt_block_indexes": [1], "window_size": 16}
    return transformers.Qwen2_5_VLConfig(text_config={**TEXT, **MROPE}, vision_config=sight, **PLACES)


def _qwen3_vl() -> Any:
    sight = {**QWEN_SIGHT, "hidden_size": 64, "out_hidden_size": 64, "deepstack_visual_indexes": [0, 1]}
    sight["num_position_embeddings"] = 64
    rope = {"rope_parameters": {**MROPE["rope_parameters"], "mrope_interleaved": True}}
    return transformers.Qwen3VLConfig(text_config={**TEXT, **rope}, vision_config=sight, **PLACES)


def _qwen3_5() -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25}
    linear = {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    linear |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    kinds = ["linear_attention", "full_attention"]
    sight = {**QWEN_SIGHT, "hidden_size": 64, "out_hidden_size": 64, "num_position_embeddings": 64}
    text = {**TEXT, **linear, "rope_parameters": rope, "layer_types": kinds}
    return transformers.Qwen3_5Config(text_config=text, vision_config=sight, **PLACES)


def _glm4v() -> Any:
    sight = {**QWEN_SIGHT, "hidden_size": 64, "out_hidden_size": 64, "image_size": 16}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
    places = {
        "image_start_token_id": BEGIN,
        "image_end_token_id": END,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
    }
    places |= {"video_start_token_id": 8, "video_end_token_id": 9}
    return transformers.Glm4vConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=sight, **places)


def _gemma3() -> Any:
    return transformers.Gemma3Config(
        text_config={**TEXT, "sliding_window": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": True},
        vision_config={**SIGHT, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4, image_token_index=IMAGE, boi_token_index=BEGIN, eoi_token_index=END,
    )  # fmt: skip


def _gemma4() -> Any:
    kinds = ["sliding_attention", "full_attention"]
    text = {**TEXT, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16, "layer_types": kinds}
    text |= {"global_head_dim": 32, "tie_word_embeddings": True}
    sight = {**SIGHT, "num_key_value_heads": 4, "head_dim": 16, "position_embedding_size": 64, "pooling_kernel_size": 2}
    sight.pop("vision_use_head")
    return transformers.Gemma4Config(
        text_config=text, vision_config=sight, audio_config=None,
        image_token_id=IMAGE, boi_token_id=BEGIN, eoi_token_id=END, audio_token_id=AUDIO, video_token_id=VIDEO,
    )  # fmt: skip


def _llava() -> Any:
    return transformers.LlavaConfig(
        text_config=_llama(), vision_config=_siglip(), image_token_id=IMAGE, vision_feature_select_strategy="full"
    )


def _llava_next() -> Any:
    grid = {"image_grid_pinpoints": [[16, 32], [32, 16]], "vision_feature_select_strategy": "full"}
    return transformers.LlavaNextConfig(text_config=_llama(), vision_config=_siglip(), image_token_id=IMAGE, **grid)


def _llava_onevision() -> Any:
    grid = {"image_grid_pinpoints": [[16, 32], [32, 16]]}
    text = transformers.Qwen2Config(**TEXT)
    return transformers.LlavaOnevisionConfig(
        text_config=text, vision_config=_siglip(), image_token_id=IMAGE, video_token_id=VIDEO, **grid
    )


def _mistral3() -> Any:
    sight = {key: SIGHT[key] for key in SIGHT if key != "vision_use_head"}
    return transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**TEXT),
        vision_config=transformers.PixtralVisionConfig(**sight, head_dim=16),
        image_token_id=IMAGE,
    )


def _internvl() -> Any:
    sight = {key: SIGHT[key] for key in SIGHT if key != "vision_use_head"}
    return transformers.InternVLConfig(
        text_config=transformers.Qwen2Config(**TEXT), image_token_id=IMAGE, image_seq_length=4,
        vision_config={**sight, "image_size": [16, 16], "patch_size": [4, 4], "model_type": "internvl_vision"},
    )  # fmt: skip


def _idefics(kind: str) -> Callable[[], Any]:
    def made() -> Any:
        sight = {**SIGHT}
        sight.pop("vision_use_head")
        return getattr(transformers, kind)(
            text_config=_llama(), vision_config=sight, image_token_id=IMAGE, scale_factor=2, pad_token_id=0
        )

    return made


def _paligemma() -> Any:
    text = {**TEXT, "tie_word_embeddings": True, "model_type": "gemma"}
    return transformers.PaliGemmaConfig(
        text_config=text, vision_config={**SIGHT, "model_type": "siglip_vision_model"}, projection_dim=64,
        image_token_id=IMAGE, hidden_size=64, vocab_size=VOCABULARY,
    )  # fmt: skip


def _aya() -> Any:
    text = transformers.Cohere2Config(**{**TEXT, "tie_word_embeddings": True, "logit_scale": 1.0})
    return transformers.AyaVisionConfig(
        text_config=text,
        vision_config=_siglip(),
        image_token_id=IMAGE,
        downsample_factor=2,
        adapter_layer_norm_eps=1e-6,
    )


def _mllama() -> Any:
    sight = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_global_layers": 1}
    sight |= {"attention_heads": 4, "image_size": 16, "patch_size": 4, "vision_output_dim": 128, "max_num_tiles": 1}
    sight |= {"intermediate_layers_indices": [1], "supported_aspect_ratios": [[1, 1]], "num_channels": 3}
    text = {**TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1]}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    return transformers.MllamaConfig(text_config=text, vision_config=sight, image_token_index=IMAGE)


def _lfm2_vl() -> Any:
    sight = {key: SIGHT[key] for key in SIGHT if key != "image_size"}
    text = {**TEXT, "layer_types": ["conv", "full_attention"], "model_type": "lfm2"}
    return transformers.Lfm2VlConfig(
        text_config=text, vision_config={**sight, "num_patches": 16, "model_type": "siglip2_vision_model"},
        image_token_id=IMAGE, downsample_factor=2, projector_hidden_size=64,
    )  # fmt: skip


def _qwen2_audio() -> Any:
    hearing = {"d_model": 64, "encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 256}
    hearing |= {"num_mel_bins": 16, "max_source_positions": 50}
    return transformers.Qwen2AudioConfig(
        text_config=transformers.Qwen2Config(**TEXT), audio_token_index=AUDIO, audio_config=hearing
    )


def _voxtral() -> Any:
    hearing = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    hearing |= {"num_mel_bins": 16, "max_source_positions": 48, "head_dim": 16}
    return transformers.VoxtralConfig(text_config=_llama(), audio_config=hearing, audio_token_id=AUDIO)


def _llama4() -> Any:
    sight = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    sight |= {"image_size": 16, "patch_size": 4, "vision_output_dim": 64, "pixel_shuffle_ratio": 0.5}
    sight |= {"projector_input_dim": 64, "projector_output_dim": 64}
    text = {**TEXT, "intermediate_size_mlp": 96, "num_local_experts": 2, "interleave_moe_layer_step": 1}
    return transformers.Llama4Config(text_config=text, vision_config=sight, image_token_index=IMAGE)


MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    "qwen2-vl": ("Qwen2VLForConditionalGeneration", _qwen2_vl),
    "qwen2.5-vl": ("Qwen2_5_VLForConditionalGeneration", _qwen2_5_vl),
    "qwen3-vl": ("Qwen3VLForConditionalGeneration", _qwen3_vl),
    "qwen3.5": ("Qwen3_5ForConditionalGeneration", _qwen3_5),
    "glm4v": ("Glm4vForConditionalGeneration", _glm4v),
    "gemma3": ("Gemma3ForConditionalGeneration", _gemma3),
    "gemma4": ("Gemma4ForConditionalGeneration", _gemma4),
    "llava": ("LlavaForConditionalGeneration", _llava),
    "llava-next": ("LlavaNextForConditionalGeneration", _llava_next),
    "llava-onevision": ("LlavaOnevisionForConditionalGeneration", _llava_onevision),
    "mistral3": ("Mistral3ForConditionalGeneration", _mistral3),
    "internvl": ("InternVLForConditionalGeneration", _internvl),
    "idefics3": ("Idefics3ForConditionalGeneration", _idefics("Idefics3Config")),
    "smolvlm": ("SmolVLMForConditionalGeneration", _idefics("SmolVLMConfig")),
    "paligemma": ("PaliGemmaForConditionalGeneration", _paligemma),
    "aya": ("AyaVisionForConditionalGeneration", _aya),
    "mllama": ("MllamaForConditionalGeneration", _mllama),
    "lfm2-vl": ("Lfm2VlForConditionalGeneration", _lfm2_vl),
    "qwen2-audio": ("Qwen2AudioForConditionalGeneration", _qwen2_audio),
    "voxtral": ("VoxtralForConditionalGeneration", _voxtral),
    "llama4": ("Llama4ForConditionalGeneration", _llama4),
}


def write_model(name: str, folder: Path, write_tokenizer: Callable[[Path], None]) -> Path:
    """One of MODELS in bfloat16 with random norms, so that folds are not trivial, and a tokenizer of bytes."""
    kind, config = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config())
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if "norm" in part and parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            elif "gate_attn" in part or "gate_ffwd" in part or part.endswith("_gate"):
                parameter.fill_(0.5)
    model.bfloat16().save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def inputs_of(name: str, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """One sequence of text with an image (or a sound) in it, as the model's processor would give it."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(model.dtype)

    def text(
        count: int, mark: int = IMAGE, before: tuple[int, ...] = (BEGIN,), after: tuple[int, ...] = (END,)
    ) -> dict:
        words = torch.randint(10, VOCABULARY - 2, (24,), generator=generator).tolist()
        return {"input_ids": torch.tensor([[*words[:6], BEGIN, *[mark] * count, END, *words[6:]]])}

    if name in ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3.5", "glm4v"):
        given = text(4)
        return given | {
            "pixel_values": noise(16, 3 * 4 * 4 * QWEN_SIGHT["temporal_patch_size"]),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
            "mm_token_type_ids": (given["input_ids"] == IMAGE).long(),
        }
    image = noise(1, 3, 16, 16)
    if name in ("llava", "mistral3", "internvl", "gemma3", "paligemma", "aya", "llama4"):
        extra = {"image_sizes": torch.tensor([[16, 16]])} if name == "mistral3" else {}
        given = text({"llava": 16, "paligemma": 16}.get(name, 4))
        types = {"token_type_ids": (given["input_ids"] == IMAGE).long()} if name in ("gemma3", "paligemma") else {}
        return {**given, "pixel_values": image, **extra, **types}
    if name in ("idefics3", "smolvlm"):
        return text(4) | {"pixel_values": image[None], "pixel_attention_mask": torch.ones(1, 1, 16, 16).long()}
    if name == "mllama":
        given = text(1)
        length = given["input_ids"].shape[1]
        return given | {
            "pixel_values": noise(1, 1, 1, 3, 16, 16), "aspect_ratio_ids": torch.ones(1, 1).long(),
            "aspect_ratio_mask": torch.ones(1, 1, 1).long(),
            "cross_attention_mask": torch.ones(1, length, 1, 1).long(),
        }  # fmt: skip
    if name == "lfm2-vl":
        shapes = {"spatial_shapes": torch.tensor([[4, 4]]), "pixel_attention_mask": torch.ones(1, 16).long()}
        return text(4) | {"pixel_values": noise(1, 16, 48), **shapes}
    if name == "gemma4":
        places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).reshape(1, 16, 2)
        given = text(4)
        types = {"mm_token_type_ids": (given["input_ids"] == IMAGE).long()}
        return given | types | {"pixel_values": noise(1, 16, 48), "image_position_ids": places}
    if name in ("llava-next", "llava-onevision"):
        patches = {"image_sizes": torch.tensor([[16, 32]])}
        return text(52) | {"pixel_values": noise(1, 3, 3, 16, 16), **patches}
    if name == "qwen2-audio":
        mask = {"feature_attention_mask": torch.ones(1, 100).long()}
        return text(25, mark=AUDIO) | {"input_features": noise(1, 16, 100), **mask}
    if name == "voxtral":
        return text(12, mark=AUDIO) | {"input_features": noise(1, 16, 96)}
    raise KeyError(name)
