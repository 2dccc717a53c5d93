"""`gptq-v2`: the layout of `gptq.py` with zero points stored as they are ("gptq_v2")."""

from __future__ import annotations

from functools import partial

from outlierq.export import gptq
from outlierq.export.gptq import SCALE_DTYPE, clients, conflict, obstacle, tensor_specs

__all__ = ["SCALE_DTYPE", "clients", "conflict", "encode", "obstacle", "quantization_config", "tensor_specs"]

encode = partial(gptq.encode, version=2)
quantization_config = partial(gptq.quantization_config, version=2)
