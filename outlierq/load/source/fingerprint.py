"""The fingerprint of a checkpoint: the same for the same model, cheap for a model of any size.

It is the sha256 of (1) the bytes of config.json (GGUF: of everything before the tensor bytes), (2) the name, dtype,
shape and size of every tensor, in the order of their names, and (3) the first 4 KiB of every tensor. Reading all bytes
would take minutes for a large model; fine-tuning moves every tensor it trains, so a sample of each one notices it. An
edit that leaves the first 4 KiB of every tensor alone is not noticed here, but where all bytes are read:
`Checkpoint.bytes_read`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping

from outlierq.core.model import TensorInfo

SAMPLE_BYTES = 4096


def fingerprint(
    config: Iterable[bytes],
    tensors: Mapping[str, TensorInfo],
    sample: Callable[[list[str], int], Iterator[tuple[str, bytes]]],
) -> str:
    """Sha256 hex. config: the model's description, in pieces. sample(names, length): first bytes by tensor name."""
    digest = hashlib.sha256()
    for piece in config:
        digest.update(piece)
    names = sorted(tensors)
    samples = {name: hashlib.sha256(raw).digest() for name, raw in sample(names, SAMPLE_BYTES)}
    for name in names:
        info = tensors[name]
        digest.update(f"\n{name} {info.dtype} {info.shape} {info.nbytes} ".encode())
        digest.update(samples[name])
    return digest.hexdigest()
