"""Models that llama.cpp keeps under the architecture of Llama, and transformers does not read there: Mixtral, and
Llamas with biases. The number of experts and the tensors tell them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from outlierq.load.gguf.file import GgufHeader

if TYPE_CHECKING:
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor

LLAMA, MIXTRAL = "llama", "mixtral"
# Key of the config -> a tensor of the first block that is there when it is true.
BIASES = {"attention_bias": "blk.0.attn_output.bias", "mlp_bias": "blk.0.ffn_down.bias"}


def kin(header: GgufHeader) -> dict[str, Any]:
    """Keys of config.json that such a model needs, beside those of a plain Llama."""
    fields = header.fields
    if fields["general.architecture"] != LLAMA:
        return {}
    experts, used = (fields.get(f"{LLAMA}.{key}") for key in ("expert_count", "expert_used_count"))
    if experts:
        return {"model_type": MIXTRAL, "num_local_experts": experts, "num_experts_per_tok": used}
    return {key: True for key, tensor in BIASES.items() if tensor in header.tensors}


def processor_of(architecture: str, config: Mapping[str, Any]) -> TensorProcessor:
    """What undoes the changes of llama.cpp's converter. config: as transformers reads it, with the keys above."""
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        GGUFTensor,
        LlamaTensorProcessor,
        Qwen2MoeTensorProcessor,
        TensorProcessor,
    )

    class Mixtral(Qwen2MoeTensorProcessor):
        """Queries and keys of a Llama, experts as Qwen's."""

        def process(self, weights: Any, name: str, **options: Any) -> GGUFTensor:
            is_turned = ".attn_q." in name or ".attn_k." in name
            owner = LlamaTensorProcessor if is_turned else Qwen2MoeTensorProcessor
            return owner(self.config).process(weights, name, **options)

    if config["model_type"] == MIXTRAL:
        return Mixtral(config=config)
    return TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)
