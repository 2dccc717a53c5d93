"""What a GGUF file says of its model, or llama.cpp takes for granted, and transformers leaves at its defaults.

Such as the width of Qwen3-MoE's experts, and that the weights of the chosen ones are made to sum to one: without that
the model would be built with other shapes, or, worse, with the same shapes and other logits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any

# Blocks of the models whose attention llama.cpp scales by the width of the model over its heads instead of that of a
# head: the two largest Gemmas, which it tells by them.
SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}


def unread(fields: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of config.json that are missing in `content`, by the table that also tells how such files are written.

    fields: the file's metadata. content: what transformers made of them, with its `model_type`.
    """
    text = (resources.files("outlierq") / "data" / "gguf_architectures.json").read_text(encoding="utf-8")
    table = json.loads(text)
    row = table["models"].get(content["model_type"], {})
    if row.get("name") != fields.get("general.architecture"):
        return {}
    said = {**_head_size(fields, content), **dict(_said(table, row, fields))}
    known = {**said, **content}
    missing = {**_assumed(row, known), **_by_width(fields, known), **said}
    return {key: value for key, value in missing.items() if key not in content}


def _head_size(fields: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    """The width of a head, where the class of the model has it as a key of its own."""
    from transformers import CONFIG_MAPPING

    size = fields.get(f"{fields['general.architecture']}.attention.key_length")
    own = size is not None and hasattr(CONFIG_MAPPING[content["model_type"]](), "head_dim")
    return {"head_dim": size} if own else {}


def _assumed(row: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """What llama.cpp takes for granted of such a model: values, or names of other keys that have the value."""
    must = row.get("must", {}).items()
    values = {key: known.get(value) if isinstance(value, str) else value for key, value in must}
    return {key: value for key, value in values.items() if value is not None}


def _by_width(fields: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """The scale of attention of the models that have it from their width."""
    blocks = SCALED_BY_WIDTH.get(fields["general.architecture"])
    if blocks is None or known.get("num_hidden_layers") != blocks:
        return {}
    return {"query_pre_attn_scalar": known["hidden_size"] // known["num_attention_heads"]}


def _said(table: Mapping[str, Any], row: Mapping[str, Any], fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The metadata that has one key of config.json, with that key."""
    keys = {**(table["experts"] if row.get("experts") else {}), **row.get("keys", {})}
    for key, (_, *names) in keys.items():
        field = f"{row['name']}.{key}"
        if field in fields and len(names) == 1 and not names[0].startswith("_"):
            yield names[0], fields[field]
