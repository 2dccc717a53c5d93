"""`text: self`: calibration text that the model itself writes, sampled from what it predicts, and kept.

Such text has the topics, languages and forms that the model was trained on in the shares that it knows them, without a
data set (LLM-QAT, Liu et al. 2023, arXiv:2305.17888). Writing costs a forward pass of the whole model for each token.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq.calibrate.text.unseen import ordinary_tokens
from outlierq.core.errors import OutputError
from outlierq.core.machine.own_files import write_atomically
from outlierq.core.machine.untrusted import json_object
from outlierq.core.model import Checkpoint
from outlierq.core.windows import opening_tokens
from outlierq.evaluate.generation import TOGETHER, sampled
from outlierq.pipeline.asked.events import Event
from outlierq.pipeline.asked.resources import Resources

if TYPE_CHECKING:
    import torch

    from outlierq.calibrate.text.windows import TokenSet
    from outlierq.recipe import Calibration

OWN_TEXT = "own-text.json"


class Writer:
    """Writes windows of text: `writer(count, length)` is a LongTensor [count, length]. The model is loaded when needed.

    A window begins with what the tokenizer puts before a text, and where that is nothing, behind a token that ends or
    begins one, which is left out; a tokenizer without any gives each window a first token by chance.
    """

    def __init__(self, checkpoint: Checkpoint, tokenizer: Any, seed: int | None, resources: Resources):
        self.checkpoint, self.tokenizer = checkpoint, tokenizer
        self.seed, self.resources = seed or 0, resources

    def __call__(self, count: int, length: int) -> torch.Tensor:
        import torch

        from outlierq.load import load_model

        dtype = "float32" if self.checkpoint.dtype == "float32" else "bfloat16"
        model = load_model(self.checkpoint, dtype=dtype, device=self.resources.device)
        opening, starts = self._starts(count)
        parts = []
        for first in range(0, count, TOGETHER):
            step = Event("calibrate", 0, 1, step="writing text to calibrate on", share=first / count)
            self.resources.listen(step)
            some = starts[first : first + TOGETHER]
            new = length - opening
            written = sampled(model, some, new, self.seed + first, len(self.tokenizer))
            parts.append(written[:, some.shape[1] - opening :])
        return torch.cat(parts)

    def _starts(self, count: int) -> tuple[int, torch.Tensor]:
        """What every window is written behind [count, tokens], and how many of these tokens belong to the window."""
        import torch

        opening = opening_tokens(self.tokenizer)
        ends = (getattr(self.tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
        begin = opening or [token for token in ends if token is not None][:1]
        if begin:
            return len(opening), torch.tensor(begin).expand(count, -1)
        known = ordinary_tokens(self.tokenizer, None)
        chance = torch.randint(len(known), (count, 1), generator=torch.Generator().manual_seed(self.seed))
        return 1, known[chance]


def kept_tokens(folder: Path, checkpoint: Checkpoint, settings: Calibration) -> TokenSet | None:
    """The windows that an earlier run of the same kind kept in a folder; None when there are none.

    OutputError when the file is damaged.
    """
    from outlierq.calibrate.text.windows import TokenSet

    path = folder / OWN_TEXT
    if not path.is_file():
        return None
    hint = "delete it; the text is then written again"
    values = json_object(path.read_bytes(), f"{path}", OutputError)
    if values.get("asked") != _asked(checkpoint, settings):
        return None
    ids = _ids(values.get("windows"))
    if ids is None or digest_of(ids) != values.get("sha256"):
        raise OutputError(f"{path} is damaged: its windows are not those of its sha256", hint=hint)
    return TokenSet(ids, str(values["fingerprint"]), str(values["description"]), tuple(values["notes"]))


def keep_tokens(folder: Path, checkpoint: Checkpoint, settings: Calibration, tokens: TokenSet) -> None:
    """Write the windows into a folder, as ids and as text, with their digest, unless it has some."""
    from outlierq.load import load_tokenizer

    path = folder / OWN_TEXT
    if path.is_file():
        return
    values = {
        "asked": _asked(checkpoint, settings),
        "sha256": digest_of(tokens.ids),
        "fingerprint": tokens.fingerprint,
        "description": tokens.description,
        "notes": tokens.notes,
        "windows": tokens.ids.tolist(),
        "text": load_tokenizer(checkpoint).batch_decode(tokens.ids),
    }
    write_atomically(path, json.dumps(values, ensure_ascii=False).encode("utf-8", "replace"))


def _asked(checkpoint: Checkpoint, settings: Calibration) -> dict[str, Any]:
    """What the windows depend on, as JSON has it."""
    names = {"text", "samples", "sequence_length", "seed", "chat_template"}
    return {"model": checkpoint.fingerprint, **settings.model_dump(mode="json", include=names)}


def _ids(windows: Any) -> torch.Tensor | None:
    """Windows of a file as a LongTensor [windows, tokens]; None where they are not a table of numbers."""
    import torch

    try:
        ids = torch.tensor(windows, dtype=torch.long)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
    return ids if ids.dim() == 2 else None


def digest_of(ids: torch.Tensor) -> str:
    """Sha256 hex of ids [windows, tokens]."""
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()
