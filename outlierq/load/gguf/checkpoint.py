"""A GGUF file as a `Checkpoint` with Hugging Face names, shapes and config.

Names, config keys and the undoing of what llama.cpp's converter did to weights (permuted q and k rows of Llama, norm
+ 1 of Gemma, ...) come from transformers' own GGUF tables. What those tables drop without a word is restored here or
refused: rotary scaling, and tensors that have no place in the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from outlierq.core.errors import SourceError
from outlierq.core.model import CarriedFile, Checkpoint, TensorInfo
from outlierq.load.gguf.file import WITHOUT_A_CLASS, GgufHeader, check_decodable, dequantized, head_bytes
from outlierq.load.gguf.kin import kin, processor_of
from outlierq.load.gguf.rope import ROPE_FACTORS, restore_rope
from outlierq.load.gguf.split import read_gguf
from outlierq.load.gguf.tokenizer import gguf_tokenizer
from outlierq.load.gguf.unread import unread
from outlierq.load.model.skeleton import config_errors
from outlierq.load.source.fingerprint import fingerprint
from outlierq.load.source.shards import lookup, sample, stored_digest
from outlierq.load.source.unchanged import stamps_of

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
STORED_NAMES = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4)}

# Tensors that no converter changes; being the largest ones, they are rounded to the dtype of use while being read.
UNTOUCHED = ("token_embd.weight", "output.weight")


class GgufCheckpoint(Checkpoint):
    """A GGUF file; `read` dequantizes to `dtype`.

    path: the file, or a part of a split one. dtype: "bfloat16", or that of the matrices when all are plain F16 or F32.
    """

    kind = "gguf"
    most_threads = 1  # the processors of transformers keep state

    def __init__(self, path: Path, *, source: str | None = None):
        self.path, self.source = path, source or str(path)
        self._header = read_gguf(path)
        for tensor in self._header.tensors.values():
            check_decodable(tensor)
        self.stamps = stamps_of(self._header.parts)
        self.bytes_read: dict[str, str] = {}
        self.dtype = _dtype(self._header)
        self._parsed_config = _parsed_config(self._header)
        self.config: dict[str, Any] = _full_config(self._header, self._parsed_config, self.dtype)
        # Until the names are known, which takes the skeleton, the tensors are those of the file.
        self.tensors = {t.name: TensorInfo(t.name, t.type, t.shape, t.nbytes) for t in self._header.tensors.values()}
        self._parts, self.tensors = self._named_tensors()

    @cached_property
    def files(self) -> tuple[CarriedFile, ...]:
        """Tokenizer and chat template rebuilt from the metadata, if it has one, and a generation config."""
        contents = {"generation_config.json": _generation_config(self.config)}
        if "tokenizer.ggml.model" in self._header.fields:
            contents.update(self._tokenizer_files())
        return tuple(CarriedFile(name, content=content) for name, content in sorted(contents.items()))

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 hex, see `outlierq.load.source.fingerprint`."""
        return fingerprint(self._head_bytes(), self.tensors, self._sample)

    def read(self, name: str) -> torch.Tensor:
        """The tensor in `dtype`, in the shape of its header, which is Hugging Face's."""
        import torch

        dtype, shape = getattr(torch, self.dtype), lookup(self.tensors, name).shape
        parts = self._parts[name]
        if parts == (UNTOUCHED[0],) or parts == (UNTOUCHED[1],):
            return dequantized(self._header.tensors[parts[0]], dtype, self.bytes_read).reshape(shape)
        value = self._processed(name, parts).to(dtype).contiguous()
        if [size for size in value.shape if size > 1] != [size for size in shape if size > 1]:
            raise SourceError(f"tensor {name} became {list(value.shape)} instead of {list(shape)} when converted")
        return value.reshape(shape)

    def digest(self, name: str) -> str:
        """XXH3-128 of the bytes of a tensor, by its name in the file, as they are now; as hex."""
        tensor = lookup(self._header.tensors, name)
        return stored_digest(name, tensor.path, tensor.start, tensor.nbytes)

    @property
    def packed(self) -> list[str]:
        """Hugging Face names of the tensors whose ggml type is a quantized one."""
        types = {name: self._header.tensors[parts[0]].type for name, parts in self._parts.items()}
        return [name for name, kind in types.items() if kind not in ("F32", "F16", "BF16")]

    def _processed(self, name: str, parts: tuple[str, ...]) -> torch.Tensor:
        """Float32 values after transformers' per-architecture processing; several parts are merged by the processor."""
        import torch

        merged: dict[str, dict[str, torch.Tensor]] = {"tensors": {}}
        for part in parts:
            plain = dequantized(self._header.tensors[part], torch.float32, self.bytes_read).numpy()
            result = self._processor.process(
                weights=plain, name=part, tensor_key_mapping=self._name_map, parsed_parameters=merged
            )
            if result.name is not None:
                return torch.from_numpy(result.weights.copy())
        return merged["tensors"][name]

    def _named_tensors(self) -> tuple[dict[str, tuple[str, ...]], dict[str, TensorInfo]]:
        """The GGUF tensors behind each Hugging Face tensor, and the headers under those names."""
        from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

        from outlierq.load.model.skeleton import build_skeleton

        skeleton = build_skeleton(self)
        architecture = self._header.fields["general.architecture"]
        self._processor = processor_of(architecture, self._parsed_config)
        try:
            self._name_map = get_gguf_hf_weights_map(_Trunk(skeleton), self._processor, architecture)
        except NotImplementedError as error:
            raise SourceError(f"the tensor names of {self.source} are unknown: {error}") from error
        parts = _parts(self._header, _with_expert_names(self._header, self._name_map))
        slots = skeleton.state_dict()
        dtype, width = STORED_NAMES[self.dtype]
        tensors = {}
        for name, members in parts.items():
            shape = _hf_shape(self._header, name, members, slots)
            tensors[name] = TensorInfo(name, dtype, shape, prod(shape) * width)
        return parts, tensors

    def _tokenizer_files(self) -> dict[str, bytes]:
        """What transformers writes for the tokenizer in the metadata."""
        with TemporaryDirectory() as folder:
            gguf_tokenizer(self._header.path, self.source).save_pretrained(folder)
            return {entry.name: entry.read_bytes() for entry in Path(folder).iterdir() if entry.is_file()}

    def _head_bytes(self) -> Iterator[bytes]:
        """Everything before the tensors, in pieces of 1 MiB."""
        return head_bytes(self._header)

    def _sample(self, names: list[str], length: int) -> Iterator[tuple[str, bytes]]:
        """First bytes of each tensor as the file stores it; of merged tensors, of every part."""
        for name in names:
            stored = (self._header.tensors[part] for part in self._parts[name])
            parts = ((name, tensor.path, tensor.start, tensor.nbytes) for tensor in stored)
            yield name, b"".join(raw for _, raw in sample(parts, length))


class _Trunk:
    """A module as transformers' name map sees it, without the members of its module lists.

    The map asks every submodule for names again, for files converted from the base model; in a deep model that takes
    minutes for names that no block can answer.
    """

    def __init__(self, module: torch.nn.Module):
        self._module = module
        self.config, self.state_dict = getattr(module, "config", None), module.state_dict

    def named_children(self) -> list[tuple[str, _Trunk]]:
        """The children that have children of their own and are no lists."""
        from torch.nn import ModuleList

        children = self._module.named_children()
        return [
            (name, _Trunk(part)) for name, part in children if not isinstance(part, ModuleList) and any(part.children())
        ]


def _dtype(header: GgufHeader) -> str:
    """The dtype of use, from the types of the matrices."""
    types = {tensor.type for tensor in header.tensors.values() if len(tensor.shape) > 1}
    if types and types <= {"F16", "F32"}:
        return "float32" if "F32" in types else "float16"
    return "bfloat16"


def _parsed_config(header: GgufHeader) -> dict[str, Any]:
    """The config as transformers reads it from the metadata."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    if "general.architecture" not in header.fields:
        raise SourceError(f"{header.path.name} does not say its architecture (general.architecture)")
    try:
        return load_gguf_checkpoint(str(header.path), return_tensors=False)["config"] | kin(header)
    except config_errors() as error:
        why = f": {error}" if isinstance(error, ValueError) else ""  # others speak of its code
        raise SourceError(
            f"transformers cannot read the config of {header.path.name} "
            f"(architecture {header.fields['general.architecture']}){why}",
            hint=WITHOUT_A_CLASS,
        ) from error


def _full_config(header: GgufHeader, parsed: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The content of a config.json: what the metadata says, the class that runs it, and the dtype."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    content = {key: _short(value) for key, value in parsed.items() if key != "_model_name_or_path"}
    content.update(_table_sizes(header, content))
    if header.parts[1:]:  # transformers looks for the head in the first part alone
        content["tie_word_embeddings"] = "output.weight" not in header.tensors
    content.update(restore_rope(header, content))
    model_type = content["model_type"]
    content.update(unread(header.fields, content))
    if model_type not in CONFIG_MAPPING or model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise SourceError(f"{header.path.name} holds a {model_type} model, not a causal language model")
    content.setdefault("architectures", [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]])
    try:
        config = CONFIG_MAPPING[model_type].from_dict({**content, "dtype": dtype})
    except config_errors() as error:
        raise SourceError(f"the metadata of {header.path.name} gives no valid config: {error}") from error
    full = json.loads(config.to_json_string(use_diff=True))
    return {**full, "dtype": dtype, "tie_word_embeddings": content["tie_word_embeddings"]}


def _table_sizes(header: GgufHeader, content: dict[str, Any]) -> dict[str, int]:
    """Sizes that the embedding tables know better than the metadata: a vocabulary may be padded, positions unsaid."""
    sizes = {}
    if "token_embd.weight" in header.tensors:
        sizes["vocab_size"] = header.tensors["token_embd.weight"].shape[0]
    if content["model_type"] == "gpt2" and "position_embd.weight" in header.tensors:
        sizes["n_positions"] = header.tensors["position_embd.weight"].shape[0]
    return sizes


def _short(value: T) -> T | float:
    """Metadata holds float32; the shortest decimal of the same float32 (1e-05, not 9.999999747378752e-06)."""
    import numpy as np

    return float(str(np.float32(value))) if isinstance(value, float) else value


def _with_expert_names(header: GgufHeader, name_map: dict[str, str]) -> dict[str, str]:
    """The name map with an entry for each stacked expert tensor, which transformers lists without its suffix."""
    bare = {
        name: name_map[name.removesuffix(".weight")]
        for name in header.tensors
        if name.removesuffix(".weight") in name_map
    }
    return {**name_map, **bare}


def _parts(header: GgufHeader, name_map: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """Hugging Face name -> names in the file. SourceError for a tensor without a place in the model."""
    parts: dict[str, tuple[str, ...]] = {}
    for name in header.tensors:
        if name in ROPE_FACTORS:
            continue
        if name not in name_map:
            raise SourceError(
                f"tensor {name} of {header.path.name} has no place in the model that transformers builds for "
                f"{header.fields['general.architecture']}; without it the model would be a different one",
                hint=WITHOUT_A_CLASS,
            )
        parts[name_map[name]] = (*parts.get(name_map[name], ()), name)
    return parts


def _hf_shape(header: GgufHeader, name: str, members: tuple[str, ...], slots: dict[str, Any]) -> tuple[int, ...]:
    """The shape of the model's own tensor, held against the number of values in the file."""
    shape = tuple(slots[name].shape)
    stored = sum(prod(header.tensors[member].shape) for member in members)
    if stored != prod(shape):
        shown = ", ".join(f"{member} {list(header.tensors[member].shape)}" for member in members)
        raise SourceError(f"{header.path.name} holds {shown}, but its metadata asks for {name} of {list(shape)}")
    return shape


def _generation_config(config: dict[str, Any]) -> bytes:
    """generation_config.json with the special token ids of the config."""
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None}
    return (json.dumps(ids, indent=2, sort_keys=True) + "\n").encode()
