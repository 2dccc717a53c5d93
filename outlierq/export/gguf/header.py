"""What stands before the tensors of a GGUF file: metadata, tokenizer, tensor headers, written by the gguf package."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import SourceError
from outlierq.core.machine.printable import printable
from outlierq.core.machine.untrusted import brief, json_object
from outlierq.core.model import Checkpoint
from outlierq.export.gguf.architectures import (
    LIKE,
    Architecture,
    adjusted,
    check_config,
    known_architecture,
    own_keys,
    text_of,
    usual_keys,
    whole_config,
)
from outlierq.export.gguf.piece_model import pieces_of_model
from outlierq.export.gguf.rotation import SCALINGS, head_size, rope_type, rotation_keys, theta
from outlierq.export.gguf.sentencepiece import UNKNOWN, Pieces, is_sentencepiece, pieces_of

if TYPE_CHECKING:
    from gguf import GGUFWriter, SpecialVocab

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "added_tokens.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
# With these names llama.cpp takes a whole word that is a token before it merges; beside each the name of the same way
# of splitting without that, None where there is none.
WHOLE_WORDS = {"llama-bpe": "dbrx", "tekken": None}
ALIGNMENT = 32
PACKED = ("Q", "IQ", "MX", "NV")  # how the names of packed ggml types begin
# What llama.cpp calls a file by its most frequent type, where that is not MOSTLY_ and the type.
FILE_TYPES = {
    "F32": "ALL_F32",
    "Q3_K": "MOSTLY_Q3_K_S",
    "Q4_K": "MOSTLY_Q4_K_S",
    "Q5_K": "MOSTLY_Q5_K_S",
    "MXFP4": "MOSTLY_MXFP4_MOE",
}

HeaderEntry = tuple[str, str, tuple[int, ...], int]


def gguf_header(
    checkpoint: Checkpoint, tensors: Sequence[HeaderEntry], mix: str | None = None
) -> tuple[bytes, tuple[str, ...]]:
    """The bytes before the first tensor, padded to 32, and sentences on text that llama.cpp splits in another way.

    tensors: (name, ggml type or safetensors dtype, shape or [rows, bytes of a row], bytes) in file order. mix: the name
    of their types together. SourceError for a model that llama.cpp would run in another way than transformers.
    """
    import logging

    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter

    architecture, config = _check_model(checkpoint)
    logging.getLogger("gguf.gguf_writer").setLevel(logging.WARNING)
    with TemporaryDirectory() as folder:
        writer = GGUFWriter(Path(folder) / "header.gguf", architecture.name)
        _add_model(writer, architecture, config, checkpoint.source)
        writer.add_file_type(file_type(((kind, nbytes) for _, kind, _, nbytes in tensors), mix))
        differences = _add_tokenizer(writer, checkpoint)
        for name, kind, shape, nbytes in tensors:
            quantized = kind.startswith(PACKED)
            given = np.uint8 if quantized else np.float32  # of bytes, gguf tells the logical shape from the type
            writer.add_tensor_info(name, shape, np.dtype(given), nbytes, GGMLQuantizationType[kind])
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        except (struct.error, OverflowError, ValueError, TypeError) as error:
            raise SourceError(
                f"the config or tokenizer of {checkpoint.source} holds what GGUF has no place for: {error}"
            ) from error
        finally:
            writer.close()
        header = (Path(folder) / "header.gguf").read_bytes()
    return header + b"\0" * (-len(header) % ALIGNMENT), differences


def _check_model(checkpoint: Checkpoint) -> tuple[Architecture, dict[str, Any]]:
    """The row of the architecture and the whole config. SourceError for what llama.cpp does not compute as transformers
    does, or what is not written here yet."""
    architecture = known_architecture(checkpoint.config, checkpoint.source)
    if rope_type(checkpoint.config) not in SCALINGS:
        raise SourceError(
            f"{checkpoint.source} scales its rotary embedding ({rope_type(checkpoint.config)}), which is not written "
            "into GGUF files here",
            hint=LIKE,
        )
    theta(checkpoint.config)
    config = whole_config(checkpoint.config)
    check_config(architecture, config, checkpoint.source)
    if not architecture.untied and not config.get("tie_word_embeddings"):
        raise SourceError(f"{checkpoint.source} has an output head of its own; llama.cpp reads none here", hint=LIKE)
    return architecture, adjusted(architecture, config)


def _add_model(writer: GGUFWriter, architecture: Architecture, config: Mapping[str, Any], source: str) -> None:
    """Sizes and constants of the architecture."""
    writer.add_type("model")
    # llama.cpp treats the special tokens of whatever is called Phi-3 as those of Phi-3.
    writer.add_name(re.sub("phi-?3", "phi_3", printable(Path(source).name), flags=re.IGNORECASE) or "model")
    writer.add_quantization_version(2)
    _add_keys(writer, architecture, usual_keys(config))
    _add_keys(writer, architecture, rotation_keys(config, architecture.part))
    writer.add_vocab_size(config["vocab_size"])
    is_usual = head_size(config) == config["hidden_size"] // config["num_attention_heads"]
    if not is_usual and "attention.key_length" not in architecture.keys:
        writer.add_key_length(head_size(config))
        writer.add_value_length(head_size(config))
    _add_keys(writer, architecture, own_keys(architecture, config))


def _add_keys(writer: GGUFWriter, architecture: Architecture, keys: Iterable[tuple[str, str, Any]]) -> None:
    """Metadata of the architecture. keys: (name behind that of the architecture, type, value)."""
    for name, kind, value in keys:
        key = f"{architecture.name}.{name}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif kind == "u32":
            writer.add_uint32(key, int(value))
        elif kind == "f32":
            writer.add_float32(key, float(value))
        elif kind == "bool":
            writer.add_bool(key, bool(value))
        else:
            writer.add_string(key, str(value))


def file_type(tensors: Iterable[tuple[str, int]], mix: str | None = None) -> int:
    """llama.cpp's number of a mix, else of the type of most weights, of packed ones where there are any.

    tensors: (type, bytes). mix: as llama-quantize names it. "Guessed" where the installed gguf has no number for it:
    0.18 has none for MXFP4.
    """
    from gguf import LlamaFileType

    if mix is not None:
        return int(LlamaFileType[f"MOSTLY_{mix}"])
    bytes_of: dict[str, int] = {}
    for kind, nbytes in tensors:
        bytes_of[kind] = bytes_of.get(kind, 0) + nbytes
    packed = [kind for kind in bytes_of if kind.startswith(PACKED)]
    most = max(packed or bytes_of, key=lambda kind: bytes_of[kind])
    return int(LlamaFileType.__members__.get(FILE_TYPES.get(most, f"MOSTLY_{most}"), LlamaFileType.GUESSED))


def _add_tokenizer(writer: GGUFWriter, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Vocabulary, merges or scores, special tokens and chat template.

    Returns sentences on text that llama.cpp splits in another way; SourceError where it would do so throughout, and for
    files that are not what they should be.
    """
    files = {file.name: file.read() for file in checkpoint.files if file.name in TOKENIZER_FILES}
    if not files.keys() & {"tokenizer.json", "tokenizer.model"}:
        raise SourceError(
            f"{checkpoint.source} has no tokenizer.json and no tokenizer.model to write into a GGUF file",
            hint=LIKE,
        )
    try:
        return _add_described(writer, files, text_of(checkpoint.config), checkpoint.source)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise SourceError(f"the tokenizer of {checkpoint.source} is damaged: {type(error).__name__} {error}") from error


def _add_described(
    writer: GGUFWriter, files: dict[str, bytes], config: Mapping[str, Any], source: str
) -> tuple[str, ...]:
    """The tokenizer that these files describe."""
    settings, size = _settings(files), config["vocab_size"]
    files["tokenizer_config.json"] = json.dumps(settings).encode()
    tokenizer = _content(files, "tokenizer.json") if "tokenizer.json" in files else None
    if tokenizer is not None and not is_sentencepiece(tokenizer):
        _add_bytes(writer, tokenizer, size, source)
        _special(files, config, merges=True).add_to_gguf(writer, quiet=True)
        return ()
    special = _special(files, config, merges=False)
    if tokenizer is not None:
        told = {**settings, "model_type": config["model_type"]}
        pieces = pieces_of(tokenizer, size, told, special.special_token_ids)
        ids = {"unk": pieces.types.index(UNKNOWN)} if UNKNOWN in pieces.types else {}
    else:
        added = _content(files, "added_tokens.json")
        pieces, ids = pieces_of_model(files["tokenizer.model"], size, settings, added)
    _add_pieces(writer, pieces)
    special.special_token_ids = {**ids, **special.special_token_ids}
    # llama.cpp puts a begin of text before everything unless it is told not to.
    special.add_special_token = dict(zip(("bos", "eos"), pieces.ends, strict=True))
    special.add_to_gguf(writer, quiet=True)
    return pieces.differences


def _special(files: Mapping[str, bytes], config: Mapping[str, Any], *, merges: bool) -> SpecialVocab:
    """gguf's reading of special tokens and chat template."""
    import logging

    from gguf import SpecialVocab

    # What it guesses is put around text is not used where there are no merges.
    logging.getLogger("gguf.vocab").setLevel(logging.WARNING if merges else logging.ERROR)
    with TemporaryDirectory() as folder:
        for file, content in files.items():
            (Path(folder) / file).write_bytes(content)
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return SpecialVocab(folder, load_merges=merges, n_vocab=config["vocab_size"])


def _content(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no such file."""
    return json_object(files.get(name, b"{}"), name, SourceError)


def _settings(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The content of tokenizer_config.json, with special tokens as text, as older files describe them by objects."""
    settings = _content(files, "tokenizer_config.json")
    texts = {key: value["content"] for key, value in settings.items() if isinstance(value, dict) and "content" in value}
    return {**settings, **texts}


def _add_pieces(writer: GGUFWriter, pieces: Pieces) -> None:
    """A SentencePiece vocabulary."""
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    _add_tokens(writer, pieces.tokens, pieces.types)
    writer.add_token_scores(pieces.scores)
    writer.add_add_space_prefix(pieces.space_prefix)


def _add_bytes(writer: GGUFWriter, tokenizer: Mapping[str, Any], size: int, source: str) -> None:
    """A byte-level vocabulary, with the name of the way it splits text."""
    from gguf import TokenType

    name = pre_tokenizer_name(tokenizer)
    if name is None:
        raise SourceError(
            f"the way the tokenizer of {source} splits text has no name in llama.cpp that is known here "
            "(known: byte-level BPE as in GPT-2, SmolLM, Llama 3, Qwen 2 and 3.5, GPT-4o, DeepSeek 3 and Tekken; "
            "SentencePiece BPE as in Llama 2)",
            hint=LIKE,
        )
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [TokenType.UNUSED] * size
    entries = [(number, token, TokenType.NORMAL) for token, number in tokenizer["model"]["vocab"].items()]
    for added in tokenizer.get("added_tokens", []):
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        entries.append((added["id"], added["content"], kind))
    for number, token, kind in entries:
        if not 0 <= number < size:
            raise SourceError(f"the tokenizer of {source} has {token!r} as token {number} of {size}")
        tokens[number], types[number] = token, kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    _add_tokens(writer, tokens, types)


def _add_tokens(writer: GGUFWriter, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Texts and kinds of all tokens; TypeError where one is no text."""
    wrong = [token for token in tokens if not isinstance(token, str)]
    if wrong:
        raise TypeError(f"{brief(wrong[0])} is no text of a token")
    writer.add_token_list(tokens)
    writer.add_token_types(types)


def pre_tokenizer_name(tokenizer: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for the way a tokenizer.json splits text; None when it is none of data/gguf_pretokenizers.json.

    A wrong name would change the tokens of every text without a word, so only an equal description counts.
    """
    model, pre = tokenizer.get("model") or {}, tokenizer.get("pre_tokenizer") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        return None
    steps = [_step(step) for step in (pre.get("pretokenizers") or [pre])]
    known = json.loads((resources.files("outlierq") / "data" / "gguf_pretokenizers.json").read_text(encoding="utf-8"))
    name = next((name for name, described in known.items() if described == steps), None)
    if model.get("ignore_merges"):
        return name if name in WHOLE_WORDS else None
    return WHOLE_WORDS.get(str(name), name)


def _step(step: Mapping[str, Any]) -> list[Any] | None:
    """A step of a pre-tokenizer by its kind and the one setting that matters; None for any other setting."""
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space", True):
        return [kind, step.get("use_regex", True)]
    if kind == "Digits":
        return [kind, bool(step.get("individual_digits"))]
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return [kind, (step.get("pattern") or {}).get("Regex")]
    return None
