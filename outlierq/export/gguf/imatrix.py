"""Writes an importance matrix as `llama-imatrix` does: a GGUF file of sums of squares of the inputs of tensors."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from outlierq.core.machine.installed import needs_extra
from outlierq.core.machine.own_files import write_atomically

if TYPE_CHECKING:
    import torch


def write_imatrix(
    path: Path, entries: Mapping[str, tuple[torch.Tensor, torch.Tensor]], text: str, *, chunks: int, chunk_size: int
) -> None:
    """entries: name of a tensor in a GGUF file -> (sums of squares [matrices, in], counts of tokens [matrices]).

    text: what was read. chunks: of `chunk_size` tokens each.
    """
    needs_extra("gguf")
    import numpy as np
    from gguf import GGUFWriter

    logging.getLogger("gguf.gguf_writer").setLevel(logging.WARNING)
    with TemporaryDirectory() as folder:
        writer = GGUFWriter(Path(folder) / "imatrix.gguf", "")
        writer.kv_data[0].pop("general.architecture", None)  # it is no model
        writer.add_string("general.type", "imatrix")
        writer.add_array("imatrix.datasets", [text])
        writer.add_uint32("imatrix.chunk_count", chunks)
        writer.add_uint32("imatrix.chunk_size", chunk_size)
        for name, (sums, counts) in sorted(entries.items()):
            writer.add_tensor(f"{name}.in_sum2", sums.float().numpy().astype(np.float32))
            writer.add_tensor(f"{name}.counts", counts.float().numpy().astype(np.float32)[:, None])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        write_atomically(path, (Path(folder) / "imatrix.gguf").read_bytes())
