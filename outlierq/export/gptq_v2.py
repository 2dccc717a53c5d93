"""`gptq-v2`: the layout of `gptq.py` with zero points stored as they are ("gptq_v2")."""

from __future__ import annotations

from outlierq.export.gptq import GptqFormat


class GptqV2Format(GptqFormat, name="gptq-v2"):
    """Version 2."""

    version = 2
