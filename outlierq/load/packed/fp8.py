"""FP8 checkpoints as DeepSeek and Qwen (`fp8`), AutoFP8 (`fp8`) and FBGEMM (`fbgemm_fp8`) write them.

A tensor of E4M3 numbers has its scales beside it under the same name with `_scale_inv` or `_scale`: one for each block
of 128 x 128 weights (ragged at the edges), for each output row, or one. They multiply, whatever their name says. Scales
may be powers of two, stored as E8M0. Fused experts are stacks [experts, ...] of the same. With numpy alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from outlierq.core.dtypes import DTYPES
from outlierq.core.errors import SourceError
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import ActivationScheme, QuantScheme
from outlierq.load.packed.codes.byte_codes import decode_float_quantized
from outlierq.load.packed.codes.numbers import as_floats
from outlierq.load.packed.decoded import DecodedCheckpoint, ServedLinear, StoredStack, checked_scales
from outlierq.load.packed.described import FLOATS, check_member, nothing_packed
from outlierq.load.packed.reading import presents

if TYPE_CHECKING:
    import numpy as np
    import torch

    from outlierq.core.model import Checkpoint, TensorInfo

SUFFIXES = ("_scale_inv", "_scale")
# What is stored beside a weight for its input, of which a plain model knows nothing.
OF_INPUTS = (".input_scale", ".activation_scale", ".input_scale_ub")
OF_CACHE = (".k_scale", ".v_scale")
BLOCK = (128, 128)  # where the config does not say it, as in transformers


@dataclass(frozen=True)
class Fp8Linear(ServedLinear):
    """How one weight is stored. block: rows and columns that share a scale, None for a row or the whole weight."""

    block: tuple[int, int] | None = None


class Fp8Checkpoint(DecodedCheckpoint):
    """An FP8 checkpoint presented as a plain one."""

    linears: dict[str, Fp8Linear]

    def decoded(self, name: str) -> torch.Tensor:
        """The linear with this weight, float32 [out, in]. SourceError when its scales are not positive numbers."""
        import torch

        scale = self.original.read(self.linears[name].members["scale"])
        return torch.from_numpy(self._with(name, checked_scales(name, numbers_of(scale), partial(self._with, name))))

    def check_scales(self, name: str) -> None:
        """SourceError when a scale is no positive number, or 0 over codes that are not."""
        scale = numbers_of(self.original.read(self.members(name)["scale"]))
        if name in self.stacks:
            scale = _over(scale, self.stacks[name].shape[1:])
        checked_scales(name, scale, partial(self._with, name))

    def _with(self, name: str, scale: torch.Tensor, experts: Sequence[int] | None = None) -> np.ndarray:
        """The weight that there would be with these scales. experts: those of a stack that are meant, all if None."""
        if name in self.linears:
            linear = self.linears[name]
            return decode_float_quantized(self.original.read(linear.members["weight"]), scale, block=linear.block)
        stack = self.stacks[name]
        chosen = range(stack.shape[0]) if experts is None else experts
        codes = self.original.read_some_rows(stack.members["weight"], chosen)
        values = decode_float_quantized(codes.flatten(0, 1), scale.new_ones(1)).reshape(codes.shape)
        return values * as_floats(scale)

    def decoded_experts(self, name: str, experts: Iterable[int]) -> torch.Tensor:
        """Some experts of a stack, float32 [experts, ...] in the order of the file."""
        import torch

        stack, chosen = self.stacks[name], list(experts)
        scale = _over(numbers_of(self.original.read_some_rows(stack.members["scale"], chosen)), stack.shape[1:])
        decode = partial(self._with, name, experts=chosen)
        return torch.from_numpy(decode(checked_scales(name, scale, decode)))

    def quantized(self, name: str) -> QuantTensor:
        """Codes [out, in] and scales as they are stored, one for each row where one holds for the whole weight."""
        linear, parts = self.linears[name], self.parts(name)
        scale = numbers_of(parts["scale"])
        scheme = scheme_of(linear, str(scale.dtype).removeprefix("torch."))
        shape = scheme.scale_shape(*linear.shape)
        scale = scale.reshape(1, 1).expand(shape).contiguous() if scale.numel() == 1 else scale.reshape(shape)
        static = linear.inputs is not None and not linear.inputs.dynamic
        inputs = parts["input_scale"].reshape(1).to(scale.dtype) if static else None
        return QuantTensor(parts["weight"], scale, None, scheme, inputs)

    def code_scheme(self, name: str) -> QuantScheme | None:
        """The scheme of these codes."""
        linear = self.linears[name]
        if type(linear) is not Fp8Linear:
            return None
        dtype = self.original.tensors[linear.members["scale"]].dtype
        return scheme_of(linear, DTYPES[dtype][0] if dtype in FLOATS else "float32")


def scheme_of(linear: Fp8Linear, scale_dtype: str) -> QuantScheme:
    """What is stored. Blocks of one row are groups of columns."""
    block = linear.block
    group = block[1] if block is not None and block[0] == 1 else None
    block = None if group else block
    return QuantScheme(8, group, True, scale_dtype, kind="float", block=block, activations=linear.inputs)


def numbers_of(scale: torch.Tensor) -> torch.Tensor:
    """Scales as floating-point numbers; exponents of E8M0, also those stored as bytes, are 2^(byte - 127)."""
    import torch

    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return scale.float() if scale.dtype == torch.float8_e8m0fnu else scale


@presents("fp8")
@presents("fbgemm_fp8")
def fp8_checkpoint(stored: Checkpoint, config: Mapping[str, Any]) -> Fp8Checkpoint:
    """The presentation of an FP8 folder. config: its quantization_config. SourceError when weights and scales do not
    belong together.
    """
    linears, stacks = fp8_linears(stored, config)
    if not linears and not stacks:
        raise nothing_packed(stored)
    aside = [name for name in stored.tensors if name.endswith((*OF_INPUTS, *OF_CACHE))]
    return Fp8Checkpoint(stored, linears, aside, stacks)


def fp8_linears(
    stored: Checkpoint, config: Mapping[str, Any], without: Collection[str] = ()
) -> tuple[dict[str, Fp8Linear], dict[str, StoredStack]]:
    """Every E4M3 weight with its scales: linears, and stacks of experts. without: tensors of another kind."""
    linears: dict[str, Fp8Linear] = {}
    stacks: dict[str, StoredStack] = {}
    for name, scale in scale_names(stored, without).items():
        members = {"weight": name, "scale": scale}
        if len(stored.tensors[name].shape) == 3:
            stacks[name] = StoredStack(_stack_shape(stored, name, scale), members)
        else:
            linears[name] = _linear(stored, members, config)
    return linears, stacks


def scale_names(stored: Checkpoint, without: Collection[str] = ()) -> dict[str, str]:
    """The scales of every E4M3 tensor by its name. without: tensors of another kind.

    SourceError when one has none, or when they stand beside a plain weight.
    """
    scales: dict[str, str] = {}
    tensors = {name: info for name, info in stored.tensors.items() if name not in without}
    for name in tensors:
        suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
        owner = name.removesuffix(suffix) if suffix else ""
        if owner in tensors and not name.endswith((*OF_INPUTS, *OF_CACHE)):
            scales[owner] = name
    for name, info in tensors.items():
        is_fp8 = info.dtype.startswith("F8_E")
        if is_fp8 and name not in scales and info.dtype != "F8_E8M0":
            raise SourceError(
                f"{stored.source} is mixed: {name} is stored as {info.dtype}, and has no scales ({name}{SUFFIXES[0]})",
                hint="get the file again; without its scales nobody knows what the weight is",
            )
        if name in scales and not is_fp8:
            raise SourceError(
                f"{stored.source} is mixed: {name} is stored as {info.dtype}, but has scales ({scales[name]})",
                hint="remove these scales if the weight is plain, or get the file again",
            )
    return scales


def _linear(stored: Checkpoint, members: dict[str, str], config: Mapping[str, Any]) -> Fp8Linear:
    """How one weight is stored. SourceError for scales of another shape than the config says."""
    weight, scale = stored.tensors[members["weight"]], stored.tensors[members["scale"]]
    check_member(weight, "fp8 weight")
    check_member(scale, "fp8 scale")
    rows, columns = weight.shape
    block = _block(weight, scale, config)
    of_input = _input_scale(stored, weight.name, config)
    if of_input is not None:
        members = {**members, "input_scale": of_input}
    inputs = _inputs(config, block, static=of_input is not None)
    return Fp8Linear((rows, columns), members, symmetric=True, inputs=inputs, block=block)


def _input_scale(stored: Checkpoint, name: str, config: Mapping[str, Any]) -> str | None:
    """The fixed scale of a linear's input; None where it is found at run time. SourceError when it is lost."""
    module, scheme = name.rpartition(".")[0], config.get("activation_scheme")
    found = next((f"{module}{end}" for end in OF_INPUTS if f"{module}{end}" in stored.tensors), None)
    if scheme == "dynamic" or (found is None and scheme != "static"):
        return None
    if found is None:
        raise SourceError(f"{stored.source} says that inputs have fixed scales, but has no {module}.input_scale")
    check_member(stored.tensors[found], "input_scale")
    return found


def _inputs(config: Mapping[str, Any], block: tuple[int, int] | None, *, static: bool) -> ActivationScheme | None:
    """How the input of a linear is rounded: as the config says, and as fine as its weight."""
    if static:
        return ActivationScheme("float", 8, False, "tensor")
    if str(config.get("quant_algo") or "").upper().endswith("WO"):  # ModelOpt: weights only
        return None
    return ActivationScheme("float", 8) if block is None else ActivationScheme("float", 8, True, "group", block[1])


def _block(weight: TensorInfo, scale: TensorInfo, config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None when there is one, or one a row. SourceError when nothing fits."""
    rows, columns = weight.shape
    if scale.shape in ((), (1,), (1, 1)) and not (scale.shape == (1, 1) and config.get("weight_block_size")):
        return None
    if scale.shape in ((rows,), (rows, 1)) and not (config.get("weight_block_size") and rows > 1):
        return None
    height, width = config.get("weight_block_size") or BLOCK
    if scale.shape != (-(-rows // height), -(-columns // width)):
        raise SourceError(
            f"{scale.name} is {list(scale.shape)}; a weight of {rows} x {columns} has {-(-rows // height)} x "
            f"{-(-columns // width)} blocks of {height} x {width}",
            hint="correct weight_block_size in the quantization_config, or get the file again",
        )
    return height, width


def _stack_shape(stored: Checkpoint, name: str, scale: str) -> tuple[int, int, int]:
    """The shape of a stack of experts. SourceError for scales that are not one for each expert, or each of its rows."""
    info, scales = stored.tensors[name], stored.tensors[scale]
    check_member(info, "fp8 weight")
    check_member(scales, "fp8 scale")
    experts, rows, columns = info.shape
    if scales.shape not in [(experts, *each) for each in ((), (1,), (1, 1), (rows, 1), (1, columns), (columns, 1))]:
        raise SourceError(f"{scale} is {list(scales.shape)}, which are no scales of experts {list(info.shape)}")
    return experts, rows, columns


def _over(scale: torch.Tensor, shape: Iterable[int]) -> torch.Tensor:
    """Scales of a stack as [experts, rows, 1], [experts, 1, columns] or [experts, 1, 1]. FBGEMM stores those of the
    columns as a column."""
    rows, columns = shape
    scale = scale.reshape(len(scale), *scale.shape[1:], *(1,) * (3 - scale.ndim))
    return scale.transpose(1, 2) if scale.shape[1:] == (columns, 1) and rows != columns else scale
