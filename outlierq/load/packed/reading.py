"""The tables of readers: what decodes a stored linear, presents a compressed checkpoint, or reads a file's header.

A reader registers itself, in a module of `load/packed` or `load/gguf`, or in one of an installed package
(`outlierq.formats`). It shares no code with the writer of its format, whose work it verifies.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.load.packed.codes.numbers import Parts
from outlierq.load.source.shards import StoredTensor, read_header

if TYPE_CHECKING:
    import torch

    from outlierq.core.model import Checkpoint

RowReader = Callable[[Parts, QuantScheme, tuple[int, int], int, int], "QuantTensor | torch.Tensor"]
Presentation = Callable[["Checkpoint", dict[str, Any]], "Checkpoint"]
HeaderReader = Callable[[Path], dict[str, StoredTensor]]
R = TypeVar("R", bound=RowReader)
P = TypeVar("P", bound=Presentation)
H = TypeVar("H", bound=HeaderReader)

# By the name of a format, then by the roles of the tensors that the reader cannot do without.
ROWS: dict[str, dict[frozenset[str], RowReader]] = {}
# By the `quant_method` of a quantization_config.
PRESENTATIONS: dict[str, Presentation] = {}
# By the container of a format.
HEADERS: dict[str, HeaderReader] = {"safetensors": read_header}


def reads_rows(format: str, *roles: str) -> Callable[[R], R]:
    """Register `function(stored, scheme, shape, start, stop)`, which gives output rows [start, stop) of a linear.

    As a `QuantTensor` where codes and scales can be told from the stored tensors (then each of them must be the one
    meant, bit for bit), or the dense rows in the dtype they are stored in. roles: last parts of the tensors' names.
    """

    def keep(function: R) -> R:
        ROWS.setdefault(format, {})[frozenset(roles)] = function
        return function

    return keep


def presents(quant_method: str) -> Callable[[P], P]:
    """Register `function(checkpoint, quantization_config)`, which gives the checkpoint as a plain one."""

    def keep(function: P) -> P:
        PRESENTATIONS[quant_method] = function
        return function

    return keep


def reads_headers(container: str) -> Callable[[H], H]:
    """Register `function(path)`, which gives every tensor of a file by its header, with its place."""

    def keep(function: H) -> H:
        HEADERS[container] = function
        return function

    return keep
