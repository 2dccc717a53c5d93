"""The whole model with its weights, for evaluation; compressed weights are decoded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from outlierq.load.decode import unpacked
from outlierq.load.gguf.file import read_gguf_header
from outlierq.load.gguf.tokenizer import with_spaces_of
from outlierq.load.model.foreign import tokenizer_faults
from outlierq.load.model.names import checkpoint_names
from outlierq.load.model.skeleton import build_skeleton, load_tensors_into

if TYPE_CHECKING:
    import torch

    from outlierq.core.model import Checkpoint


def load_model(
    checkpoint: Checkpoint, *, dtype: str = "float32", device: str = "cpu", trust_remote_code: bool = False
) -> torch.nn.Module:
    """The model with every parameter from the checkpoint, in eval mode.

    Compressed weights are decoded; inputs of linears and the KV cache are rounded in every forward where the checkpoint
    says so, so that the model computes what a server does. dtype: torch dtype name of the floating-point parameters.
    SourceError for compression formats that cannot be decoded.
    """
    plain = unpacked(checkpoint)
    skeleton = build_skeleton(plain, trust_remote_code=trust_remote_code)
    names = checkpoint_names(plain, skeleton)
    load_tensors_into(skeleton, plain, names, dtype=dtype, device=device)
    if hasattr(plain, "install"):  # what else the format means: rounded inputs and cache, outlier columns
        plain.install(skeleton, names)
    return skeleton


def load_tokenizer(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of the checkpoint's folder, or the one in the metadata of its GGUF file."""
    from transformers import AutoTokenizer

    path = checkpoint.path.resolve()
    place = {"gguf_file": path.name} if checkpoint.kind == "gguf" else {}
    folder = path.parent if place else checkpoint.path
    with tokenizer_faults(checkpoint.source):
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **place)
    return with_spaces_of(found, read_gguf_header(path).fields) if place else found
