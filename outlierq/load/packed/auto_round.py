"""AutoRound checkpoints: codes in the layouts of GPTQ or AWQ, told apart by `packing_format`.

"auto_round:auto_gptq" stores zero points less one (version 1), "auto_round" alone as they are (version 2), both mostly
without g_idx; "auto_round:auto_awq" is AutoAWQ's. `extra_config` holds what differs for single modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import SourceError
from outlierq.load.packed.awq import awq_checkpoint
from outlierq.load.packed.gptq import gptq_presentation
from outlierq.load.packed.reading import presents

if TYPE_CHECKING:
    from outlierq.core.model import Checkpoint
    from outlierq.load.packed.codes.word_packed import WordPackedCheckpoint

# Kernels that read the layout of "auto_round" itself, as older versions name them.
PLAIN = ("", "exllamav2", "triton", "gptq_v2")


@presents("auto-round")
@presents("intel/auto-round")
def auto_round_checkpoint(stored: Checkpoint, config: Mapping[str, Any]) -> WordPackedCheckpoint:
    """The presentation of an AutoRound folder. config: its quantization_config. SourceError for other numbers."""
    said = str(config.get("packing_format") or config.get("backend") or "auto_round:auto_gptq")
    layout = said.partition(":")[2] if ":" in said else said.removeprefix("auto_round")
    if config.get("data_type", "int") != "int":
        raise SourceError(
            f"{stored.source} is an AutoRound checkpoint of {config['data_type']} numbers; integers are decoded here"
        )
    if "awq" in layout:
        return awq_checkpoint(stored, config)
    if layout not in PLAIN and "gptq" not in layout:
        raise SourceError(
            f"{stored.source} is an AutoRound checkpoint in the layout {said}",
            hint="auto_round, auto_round:auto_gptq and auto_round:auto_awq are decoded here",
        )
    extra = config.get("extra_config") or {}
    version = 2 if layout in PLAIN else 1
    return gptq_presentation(stored, lambda stem: {**config, **(extra.get(stem) or {})}, version, in_order=True)
