"""The skeleton: the model without weights, the structure found in it, and filling it part by part."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import SourceError, nearest
from outlierq.core.machine.installed import check_versions
from outlierq.core.machine.untrusted import brief
from outlierq.core.machine.utf8_path import utf8_path
from outlierq.core.model import EXPERT_COUNTS, FLOAT32, IN_FLOAT32, Block, LinearSite, Structure, largest
from outlierq.load.model.decoder import block_list, towers
from outlierq.load.model.names import checkpoint_names

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from outlierq.core.model import Checkpoint, TensorSource

# Keys of config.json that would change how the skeleton computes, not what it is.
NOT_FOR_THE_SKELETON = ("quantization_config", "compression_config", "attn_implementation", "_attn_implementation")

# Far above any model there is.
LAYERS, MOST_LAYERS = re.compile(r"(num|n)_\w*(layers?|blocks?)"), 10_000
MOST_EXPERTS, MOST_CHANNELS = 1 << 16, 1 << 20

# Read at a time, before it gets the dtype in which it is used.
PORTION_BYTES = 32 << 20


def build_skeleton(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model of the checkpoint's config: parameters on the meta device, buffers real, eval mode.

    It is of the class that `made_class` decides; experts are modules of their own where the checkpoint has them apart.
    Attention runs through torch's scaled_dot_product_attention where the class supports it. An already compressed
    checkpoint gives the plain model. SourceError when transformers cannot build the model.
    """
    check_versions()
    from outlierq.load.model.conversion.pieces import separate_pieces
    from outlierq.load.model.experts.fused import separate_experts

    model = empty_model(checkpoint)
    separate_experts(model, checkpoint)
    separate_pieces(model, checkpoint)
    _mark_float32(model)
    return model.eval().requires_grad_(False)


def empty_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """The class as transformers makes it, parameters on the meta device. SourceError when it cannot be made."""
    import torch

    from outlierq.core.machine.building import building
    from outlierq.load.model.classes import made_class

    if checkpoint.studied() is not None:
        raise SourceError(
            f"{checkpoint.source} is read under the names of the file, without a class that could run it",
            hint="start from the Hugging Face model",
        )
    config = skeleton_config(checkpoint)
    try:
        with building(checkpoint.source):
            return made_class(checkpoint, config, getattr(torch, checkpoint.dtype))
    except (*config_errors(), ImportError, AssertionError) as error:
        raise SourceError(
            f"transformers cannot build the model of {checkpoint.source} (model_type {config.model_type}): "
            f"{brief(error, 300)}",
            hint="check config.json, and whether what the model needs is installed",
        ) from error


def skeleton_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """The config object of transformers, without cache and without quantization. SourceError when it is not valid."""
    from transformers import CONFIG_MAPPING, AutoConfig

    content = {key: value for key, value in checkpoint.config.items() if key not in NOT_FOR_THE_SKELETON}
    model_type = content.get("model_type")
    own_code = checkpoint.trust_remote_code and content.get("auto_map")
    if not own_code and not (isinstance(model_type, str) and model_type in CONFIG_MAPPING):
        close = nearest(str(model_type), list(CONFIG_MAPPING.keys()))
        raise SourceError(
            f"config.json of {checkpoint.source} has model_type {model_type!r}, unknown to transformers",
            hint=f"did you mean {close}?" if close else None,
        )
    _check_content(checkpoint, content)
    try:
        if own_code:
            with utf8_path(checkpoint.path) as path:
                config = AutoConfig.from_pretrained(path, trust_remote_code=True)
        else:
            kind = CONFIG_MAPPING[model_type]
            config = kind.from_dict(kind._decode_special_floats(content))  # transformers writes infinity as an object
        parts = (config, config.get_text_config())
    except config_errors() as error:
        raise SourceError(f"config.json of {checkpoint.source} is not valid: {error}") from error
    _check_sizes(checkpoint, parts)
    for part in parts:
        part.use_cache = False
        part.__dict__.pop("quantization_config", None)
    return config


def config_errors() -> tuple[type[Exception], ...]:
    """What transformers raises for content that makes no config."""
    from huggingface_hub.errors import StrictDataclassError

    plain = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)
    return (StrictDataclassError, *plain)


def _check_content(checkpoint: Checkpoint, content: Mapping[str, Any]) -> None:
    """Refuse what transformers would take unseen: types that are no names, and numbers of layers that make endless
    lists before anybody can look at them.
    """
    most = max(MOST_LAYERS, len(checkpoint.tensors))
    for key, value in content.items():
        if key == "model_type" and not isinstance(value, str | None):
            raise SourceError(f"config.json of {checkpoint.source} has a part whose model_type is no name")
        if isinstance(value, dict):
            _check_content(checkpoint, value)
        elif isinstance(value, int | float) and value > most and LAYERS.fullmatch(key):
            raise SourceError(f"config.json of {checkpoint.source} asks for {value:,} layers ({key})")


def _check_sizes(checkpoint: Checkpoint, parts: Iterable[PreTrainedConfig]) -> None:
    """Refuse a config that asks for so many parts that building the empty model would take hours or all memory."""
    for part in parts:
        blocks = largest(part, "num_hidden_layers")
        if blocks > len(checkpoint.tensors):
            raise SourceError(
                f"config.json of {checkpoint.source} asks for {blocks} blocks, more than there are tensors "
                f"({len(checkpoint.tensors)})"
            )
        for key in EXPERT_COUNTS:
            experts = largest(part, key)
            if experts > MOST_EXPERTS:
                raise SourceError(f"config.json of {checkpoint.source} asks for {experts} experts in a block")
        for key in ("hidden_size", "head_dim", "qk_rope_head_dim", "rotary_dim"):
            channels = largest(part, key)
            if channels > MOST_CHANNELS:  # a table of frequencies is made, in real memory
                raise SourceError(f"config.json of {checkpoint.source} asks for {channels:,} channels ({key})")


def find_structure(checkpoint: Checkpoint, skeleton: torch.nn.Module) -> Structure:
    """Blocks, linear sites and all other tensors, in the order of their definition.

    Blocks are those of the text decoder (`block_list`). Tensors that the model class does not know are in
    `outside_tensors`. A tied head is no site: it has no tensor of its own (see `Structure.tied`).
    """
    names = checkpoint_names(checkpoint, skeleton)
    list_name, modules = block_list(skeleton)
    wide = _float32_modules(skeleton)
    blocks = _once(_block(f"{list_name}.{index}", index, module, names, wide) for index, module in enumerate(modules))
    inside = {tensor for block in blocks for tensor in block.tensors}
    tied = _ties(names)
    shared = {tensor for _, tensor in tied}
    sites = _sites(skeleton, "", names, None, wide)
    outside = [site for site in sites if site.weight not in inside and site.weight not in shared]
    beside = towers(skeleton, [site.module for site in outside])
    outside = tuple(replace(site, tower=beside.get(site.module)) for site in outside)
    covered = inside | {tensor for site in outside for tensor in (site.weight, site.bias)}
    return Structure(blocks, outside, tuple(name for name in checkpoint.tensors if name not in covered), tied)


def _once(blocks: Iterable[Block]) -> tuple[Block, ...]:
    """The blocks, tensors that several share in the first of them only."""
    seen: set[str] = set()
    own = []
    for block in blocks:
        sites = tuple(site for site in block.sites if site.weight not in seen)
        own.append(replace(block, sites=sites, tensors=tuple(name for name in block.tensors if name not in seen)))
        seen |= set(block.tensors)
    return tuple(own)


def _float32_modules(skeleton: torch.nn.Module) -> Collection[str]:
    """Modules that their class computes in float32, whatever the dtype of the model: a decoded weight would not fit."""
    names = (name for name, part in skeleton.named_modules() if "weight" in part.__dict__.get(IN_FLOAT32, ()))
    return frozenset(names)


def _mark_float32(skeleton: torch.nn.Module) -> None:
    """Let modules know which of their tensors the class keeps in float32, whatever the dtype of the model."""
    from transformers.core_model_loading import build_glob_alternation

    strict = list(getattr(skeleton, "_keep_in_fp32_modules_strict", None) or ())
    pattern = build_glob_alternation(strict)[0] if strict else None
    for name in (*_slots_of(skeleton, "", ()),) if pattern else ():
        if pattern.search(name):
            owner, _, leaf = name.rpartition(".")
            skeleton.get_submodule(owner).__dict__.setdefault(IN_FLOAT32, set()).add(leaf)


def _block(name: str, index: int, block: torch.nn.Module, names: Mapping[str, str], wide: Collection[str]) -> Block:
    """One block with its sites and its tensors."""
    tensors = dict.fromkeys(tensor for slot, tensor in names.items() if slot.startswith(f"{name}."))
    return Block(index, name, tuple(_sites(block, f"{name}.", names, index, wide)), tuple(tensors))


def _sites(
    module: torch.nn.Module, prefix: str, names: Mapping[str, str], block: int | None, wide: Collection[str]
) -> list[LinearSite]:
    """Every linear layer in the module, and the routers of its experts, in the order of definition.

    wide: names of what is computed in float32.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    from outlierq.load.model.experts.fused import expert_names, router_names

    routers, experts = router_names(module), set(expert_names(module))
    sites = []
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.Linear | Conv1D) or name in routers:
            full = f"{prefix}{name}".removesuffix(".")
            if f"{full}.weight" not in names:  # it is made of other tensors (`conversion/pieces.py`)
                continue
            transposed = isinstance(part, Conv1D)
            owner = name.rpartition(".")[0]
            rows, columns = reversed(part.weight.shape) if transposed else part.weight.shape
            sites.append(
                LinearSite(
                    module=full,
                    weight=names[f"{full}.weight"],
                    bias=names.get(f"{full}.bias"),
                    out_features=rows,
                    in_features=columns,
                    block=block,
                    kind="Router" if name in routers else FLOAT32 if full in wide else _kind(part),
                    transposed=transposed,
                    expert=f"{prefix}{owner}" if owner in experts else None,
                )
            )
    return sites


def _kind(part: torch.nn.Module) -> str:
    """ "Linear" for a linear layer, also of a class of the model's own that computes the same; else its class name."""
    import torch

    if type(part) is torch.nn.Linear or not isinstance(part, torch.nn.Linear):
        return type(part).__name__
    made = torch.Generator().manual_seed(0)
    weight, x = torch.randn(3, 2, generator=made), torch.randn(5, 2, generator=made)
    bias = None if part.bias is None else torch.randn(3, generator=made)
    tensors = {"weight": weight} | ({} if bias is None else {"bias": bias})
    try:
        y = torch.func.functional_call(part, tensors, (x,))
    except (RuntimeError, TypeError, ValueError, AttributeError):  # it does something else with its weight
        return type(part).__name__
    same = isinstance(y, torch.Tensor) and y.shape == (5, 3)
    plain = torch.nn.functional.linear(x, weight, bias)
    return "Linear" if same and torch.allclose(y, plain, atol=1e-5) else type(part).__name__


def _ties(names: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """(slot, tensor) for each slot that shares the tensor of an earlier one."""
    owners: dict[str, str] = {}
    tied = []
    for slot, tensor in names.items():
        if owners.setdefault(tensor, slot) != slot:
            tied.append((slot, tensor))
    return tuple(tied)


def load_tensors_into(
    module: torch.nn.Module,
    source: TensorSource,
    names: Mapping[str, str],
    *,
    prefix: str = "",
    skip: Iterable[str] = (),
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> None:
    """Give a part of the skeleton its weights from a checkpoint.

    module: the skeleton or a part of it; prefix: the full name of that part ("model.layers.3"). names: of
    `checkpoint_names`. skip: full names of parts to leave alone (all blocks, to fill what is outside of them). dtype:
    of the floating-point tensors, default `source.dtype`; what the class has in float32 is given so in any dtype. Slots
    that share a tensor share the parameter.
    """
    import torch

    dtype = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype or source.dtype)
    slots = _slots_of(module, f"{prefix}." if prefix else "", tuple(f"{part}." for part in skip))
    sources = {slot: names[full] for slot, full in slots.items() if full in names}
    wide = {tensor for slot, tensor in sources.items() if _is_in_float32(module, slot)}
    filled = {
        name: tensor.to(device=device, dtype=_dtype_in(tensor, torch.float32 if name in wide else dtype))
        for some in _portions(source, dict.fromkeys(sources.values()))
        for name, tensor in source.read_many(some).items()
    }
    shared: dict[str, torch.nn.Parameter] = {}
    for slot, tensor in sources.items():
        _assign(module, slot, tensor, filled[tensor], shared)
    _move_buffers(module, slots, device)


def _dtype_in(tensor: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a tensor is given in a model of some dtype: its own where it holds no floating-point numbers."""
    return dtype if tensor.is_floating_point() else tensor.dtype


def _is_in_float32(module: torch.nn.Module, slot: str) -> bool:
    """Whether the class has a parameter or buffer in float32 in any dtype."""
    owner, _, leaf = slot.rpartition(".")
    return leaf in module.get_submodule(owner).__dict__.get(IN_FLOAT32, ())


def _slots_of(module: torch.nn.Module, prefix: str, skip: tuple[str, ...]) -> dict[str, str]:
    """Name within the module -> full name, of every parameter and buffer that is not skipped."""
    parameters = (name for name, _ in module.named_parameters(remove_duplicate=False))
    buffers = (name for name, _ in module.named_buffers(remove_duplicate=False))
    return {name: prefix + name for name in (*parameters, *buffers) if not (prefix + name).startswith(skip)}


def _portions(source: TensorSource, names: Iterable[str]) -> Iterator[list[str]]:
    """The names in runs of about PORTION_BYTES: a whole model is not in memory in two dtypes at once.

    What tells no sizes (random weights, for a look at the model) is read at once.
    """
    some, size = [], 0
    for name in names:
        some.append(name)
        size += source.tensors[name].nbytes if name in source.tensors else 0
        if size >= PORTION_BYTES:
            yield some
            some, size = [], 0
    if some:
        yield some


def _assign(module: torch.nn.Module, slot: str, tensor_name: str, value: torch.Tensor, shared: dict) -> None:
    """Put one tensor into its slot, as the very parameter that other slots of the same tensor hold."""
    import torch

    owner_name, _, name = slot.rpartition(".")
    owner = module.get_submodule(owner_name)
    if name in owner._buffers:
        owner._buffers[name] = value
        return
    if tensor_name not in shared:
        shared[tensor_name] = torch.nn.Parameter(value, requires_grad=False)
    owner._parameters[name] = shared[tensor_name]


def _move_buffers(module: torch.nn.Module, slots: Iterable[str], device: str | torch.device) -> None:
    """Bring the buffers that no file holds (rotary frequencies, masks) to the device."""
    for slot in slots:
        owner_name, _, name = slot.rpartition(".")
        owner = module.get_submodule(owner_name)
        if owner._buffers.get(name) is not None:
            owner._buffers[name] = owner._buffers[name].to(device)


def leave_empty(
    module: torch.nn.Module,
    dtype: torch.dtype,
    device: str | torch.device,
    skip: Iterable[torch.nn.Module] = (),
) -> None:
    """Give a part that is not to run parameters that take no memory: models ask any of theirs where and what they are.

    They are NaN, so that a part that runs all the same does not go unseen. skip: parts inside that are left alone.
    """
    import torch

    nothing = torch.full((), torch.nan, dtype=dtype, device=device)
    skipped = {part for inside in skip for part in inside.modules()}
    for part in module.modules():
        if part in skipped:
            continue
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(nothing.expand(parameter.shape), requires_grad=False)


def release(module: torch.nn.Module) -> None:
    """Drop the weights of a part: its parameters go back to the meta device. Buffers stay."""
    import torch

    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
