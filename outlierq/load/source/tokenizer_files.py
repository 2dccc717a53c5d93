"""What a checkpoint's tokenizer makes of a text, as a digest: statistics are of the tokens that it gives."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from outlierq.core.model import Checkpoint

# Files that decide which tokens a text becomes. Templates, names and limits in tokenizer_config.json do not.
DECIDING = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "special_tokens_map.json")
MODELS = (".model", ".tiktoken")
# Of tokenizer.json: what its user sets for each batch.
PASSING = ("truncation", "padding")


def tokenizer_digest(checkpoint: Checkpoint) -> str:
    """Sha256 hex of the tokenizer's files; the same for JSON that was only written in another way."""
    digest = hashlib.sha256()
    for file in checkpoint.files:
        if file.name in DECIDING or file.name.endswith(MODELS):
            digest.update(f"\n{file.name} ".encode() + hashlib.sha256(_plain(file.name, file.read())).digest())
    return digest.hexdigest()


def _plain(name: str, content: bytes) -> bytes:
    """The content, JSON in one form."""
    if not name.endswith(".json"):
        return content
    try:
        values: Any = json.loads(content)
    except (ValueError, RecursionError):
        return content  # whoever needs the tokenizer says what is wrong with it
    if name == "tokenizer.json" and isinstance(values, dict):
        values = {key: value for key, value in values.items() if key not in PASSING}
    return json.dumps(values, sort_keys=True).encode()
