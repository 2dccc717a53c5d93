"""Which norm or linear can absorb a per-channel scale on the input of a group: proved by numbers, not listed.

A fold is admitted when dividing the producer's channels by random scales and multiplying the consumers' input columns
by them leaves the block's float32 output unchanged, while the consumers' change alone is plainly visible. Whatever
stands between producer and consumers (attention, an activation function, a second reader of the norm) is thereby part
of the proof. It is a proof by random numbers: a coincidence could fool it, a structure nobody thought of cannot.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from outlierq.calibrate.trace import RunOnce, Trace, submodule, trace_block
from outlierq.core.errors import NumbersError
from outlierq.core.model import Fold, sizes

if TYPE_CHECKING:
    import torch

    from outlierq.core.model import Block, InputGroup, LinearSite

# A right fold changes the output by the rounding of float32: by 8e-8 to 1.4e-6 for the 120 folds of SmolLM2-135M, whose
# controls are 0.13 to 1.5. Every wrong fold in the tests changes it by more than 1e-3.
MAX_ERROR = 1e-5
MIN_CONTROL = 1e-3
SCALE_RANGE = 4.0  # largest over smallest random scale


@dataclass(frozen=True)
class Proof:
    """What a trial of a fold showed, as max |difference| / max |output| of the block.

    error: with producer and consumers changed. control: with only the consumers changed; None when the error was
    already too large to go on.
    """

    error: float
    control: float | None

    @property
    def admitted(self) -> bool:
        """The output stays with the fold and moves without it."""
        return self.error <= MAX_ERROR and self.control is not None and self.control > MIN_CONTROL


def prove_folds(
    block_module: torch.nn.Module,
    block: Block,
    groups: list[InputGroup],
    run_once: RunOnce,
    config: Any,
    *,
    seed: int = 0,
) -> list[InputGroup]:
    """The groups with `fold` and `fold_note` filled: for each the first candidate that passes its proof.

    config: of transformers, for the numbers of heads. The passed module is not touched: trials run on a float32 copy.
    """
    trial = Trial(block_module, block, run_once, seed=seed)
    trace = trace_block(trial.module, block, run_once)
    called = list(trace.inputs)
    heads = _heads(config)
    proved = []
    for group in groups:
        if group.sites[0].module in called:
            candidates = [*_norm_candidates(trial, trace, group), *_linear_candidates(block, called, group, heads)]
            group = _first_admitted(trial, group, candidates)
        proved.append(group)
    return proved


def without_shared(groups: list[InputGroup], shared: Collection[str]) -> list[InputGroup]:
    """The groups without folds that would change a tensor of several blocks: the proof saw only one of them."""
    kept = []
    for group in groups:
        changed = [site.weight for site in group.sites] + ([group.fold.weight] if group.fold else [])
        common = next((name for name in changed if name in shared), None)
        if group.fold is not None and common is not None:
            group = replace(group, fold=None, fold_note=f"nothing is folded: other blocks use {common}, too")
        kept.append(group)
    return kept


def _first_admitted(trial: Trial, group: InputGroup, candidates: list[tuple[str, Fold]]) -> InputGroup:
    """The group with the first fold that is admitted, or with a note on the best one that was not."""
    rejected: list[tuple[float, str, Proof]] = []
    for producer, fold in candidates:
        proof = trial.check(group, fold)
        if proof.admitted:
            note = (
                f"{producer} absorbs the scale: output changed by {proof.error:.1g}, by {proof.control:.1g} without it"
            )
            return replace(group, fold=_with_shift(trial, group, fold), fold_note=note)
        rejected.append((proof.error, producer, proof))
    return replace(group, fold=None, fold_note=_rejection(group, rejected))


def _with_shift(trial: Trial, group: InputGroup, fold: Fold) -> Fold:
    """The fold, and whether a shift of the input can be absorbed beside the scale: proved in the same way."""
    without = [site.module for site in group.sites if site.bias is None]
    if fold.bias is None:
        return replace(fold, shift_note=f"no shift: there is no bias beside {fold.weight} to take it off")
    if without:
        return replace(fold, shift_note=f"no shift: {without[0]} has no bias to put it back")
    proof = trial.check_shift(group, fold)
    if not proof.admitted:
        return replace(fold, shift_note=f"no shift: {fold.bias} would change the output by {proof.error:.1g}")
    note = f"{fold.bias} absorbs a shift: output changed by {proof.error:.1g}, by {proof.control:.1g} without it"
    return replace(fold, shift=True, shift_note=note)


def _rejection(group: InputGroup, rejected: list[tuple[float, str, Proof]]) -> str:
    """Why nothing was admitted, with the figures of the best candidate."""
    if not rejected:
        channels = group.sites[0].in_features
        return f"no norm of the block writes this input, and no linear has rows for its {channels} channels"
    _, producer, best = min(rejected, key=lambda entry: entry[0])
    if best.error > MAX_ERROR:
        return f"nothing absorbs the scale; best of {len(rejected)}: {producer} changes the output by {best.error:.1g}"
    return f"the proof on {producer} shows nothing: even without the fold the output changes by only {best.control:.1g}"


def check_fold(
    block_module: torch.nn.Module, block: Block, group: InputGroup, fold: Fold, run_once: RunOnce, *, seed: int = 0
) -> Proof:
    """Try one fold on a float32 copy of the block."""
    return Trial(block_module, block, run_once, seed=seed).check(group, fold)


class Trial:
    """A float32 copy of a block on which folds are tried; its weights are restored after each trial."""

    def __init__(self, block_module: torch.nn.Module, block: Block, run_once: RunOnce, *, seed: int = 0):
        self.module = copy.deepcopy(block_module).float()
        self.parameters = tensor_parameters(self.module, block)
        self.run_once, self.seed = run_once, seed
        self.original = run_once(self.module)
        if not self.original.isfinite().all():
            raise NumbersError(f"the float32 output of {block.name} on random input is not finite")

    def check(self, group: InputGroup, fold: Fold) -> Proof:
        """Error and control of one fold with random scales. A producer that is its own consumer proves nothing."""
        import torch

        if fold.weight in {site.weight for site in group.sites}:
            return Proof(float("inf"), None)
        index = torch.tensor(fold.index)
        drawn = torch.rand(int(index.max()) + 1, generator=torch.Generator().manual_seed(self.seed))
        scale = (SCALE_RANGE ** (drawn - 0.5))[index]  # [K], log-uniform in [1/2, 2]
        names = [name for name in (fold.weight, fold.bias) if name]
        producer = apply_fold({name: self.parameters[name].detach() for name in names}, fold, scale)
        consumers = {site.weight: self._unscaled(site, scale) for site in group.sites}
        return self._proof(producer, consumers)

    def check_shift(self, group: InputGroup, fold: Fold) -> Proof:
        """Error and control of a random shift: the producer's bias takes it off, the sites' biases put it back."""
        import torch

        index = torch.tensor(fold.index)
        shift = torch.randn(int(index.max()) + 1, generator=torch.Generator().manual_seed(self.seed))[index]
        names = [name for name in (fold.weight, fold.bias) if name]
        tensors = {name: self.parameters[name].detach() for name in names}
        producer = apply_fold(tensors, fold, torch.ones_like(shift), shift)
        return self._proof(producer, {site.known_bias: self._with_shift(site, shift) for site in group.sites})

    def _proof(self, producer: Mapping[str, torch.Tensor], consumers: Mapping[str, torch.Tensor]) -> Proof:
        """The change of the output with both replaced, and with the consumers alone."""
        error = self._change({**producer, **consumers})
        return Proof(error, self._change(consumers) if error <= MAX_ERROR else None)

    def _with_shift(self, site: LinearSite, shift: torch.Tensor) -> torch.Tensor:
        """The site's bias plus the site's answer to the shift."""
        weight, bias = self.parameters[site.weight].detach(), self.parameters[site.known_bias].detach()
        shift = shift.to(weight.device)
        return bias + (shift @ weight if site.transposed else weight @ shift)

    def _unscaled(self, site: LinearSite, scale: torch.Tensor) -> torch.Tensor:
        """The site's weight with input columns multiplied by the scale."""
        weight = self.parameters[site.weight].detach()
        scale = scale.to(weight.device)
        return weight * (scale[:, None] if site.transposed else scale)

    def _change(self, tensors: Mapping[str, torch.Tensor]) -> float:
        """Relative change of the block's output when these tensors are put in."""
        with self._put(tensors):
            output = self.run_once(self.module)
        change = float((output - self.original).abs().max() / self.original.abs().max())
        return change if change == change else float("inf")

    @contextmanager
    def _put(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """The copy with other weights while the context lasts."""
        before = {name: self.parameters[name].data for name in tensors}
        try:
            for name, value in tensors.items():
                self.parameters[name].data = value
            yield
        finally:
            for name, value in before.items():
                self.parameters[name].data = value


def tensor_parameters(module: torch.nn.Module, block: Block) -> dict[str, torch.nn.Parameter]:
    """Checkpoint tensor name -> parameter, for the sites and every norm-like part of the block.

    The checkpoint may use another prefix than the model ("h.0." for "transformer.h.0."): it is learned from the sites.
    """
    parameters: dict[str, torch.nn.Parameter] = {}
    for site in block.sites:
        part = submodule(module, site.module)
        parameters[site.weight] = part.get_parameter("weight")
        if site.bias:
            parameters[site.bias] = part.get_parameter("bias")
    prefixes = {_prefix(block, site) for site in block.sites}
    known = set(block.tensors)
    for name, parameter in module.named_parameters():
        names = [prefix + name for prefix in sorted(prefixes) if prefix + name in known]
        if len(names) == 1:
            parameters.setdefault(names[0], parameter)
    return parameters


def _prefix(block: Block, site: LinearSite) -> str:
    """What the checkpoint writes before the name of a tensor relative to its block."""
    inside = site.module.removeprefix(f"{block.name}.") + "."
    end = site.weight.rfind(inside)
    return site.weight[:end] if end >= 0 else f"{block.name}."


def _norm_candidates(trial: Trial, trace: Trace, group: InputGroup) -> list[tuple[str, Fold]]:
    """The norms whose output is the group's input, first as gain w and then as gain 1 + w."""
    names = {id(parameter): name for name, parameter in trial.parameters.items()}
    key, channels = trace.inputs[group.sites[0].module], group.sites[0].in_features
    candidates = []
    for producer, written in trace.written.items():
        part = trial.module.get_submodule(producer)
        weight, bias = names.get(id(part.weight)), getattr(part, "bias", None)
        if written == key and part.weight.shape == (channels,) and weight:
            bias = None if bias is None else names.get(id(bias))
            for kind in ("norm", "offset-norm"):
                candidates.append((producer, Fold(kind, weight, bias, tuple(range(channels)))))
    return candidates


def _linear_candidates(
    block: Block, called: list[str], group: InputGroup, heads: list[tuple[int, int]]
) -> list[tuple[str, Fold]]:
    """Sites called before the group with an index map to its channels; the last called first."""
    before = called[: called.index(group.sites[0].module)]
    sites = {site.module: site for site in block.sites}
    candidates = []
    for name in reversed(before):
        site = sites[name]
        for index in index_maps(site.out_features, group.sites[0].in_features, heads):
            short = name.removeprefix(f"{block.name}.")
            candidates.append((short, Fold("linear", site.weight, site.bias, index, site.transposed)))
    return candidates


def index_maps(rows: int, channels: int, heads: list[tuple[int, int]]) -> list[tuple[int, ...]]:
    """The ways in which `rows` output channels may feed `channels` input channels, likely ones first.

    heads: possible (attention heads, key-value heads). In order: one to one; the last head_dim rows of each key-value
    head's share, repeated for its query heads (v_proj itself, [q, k, v] fused per head, MLA's [k, v]); the last
    key-value heads of a fused [q, k, v]; the second and the first part of a fused [gate, up].
    """
    maps: dict[tuple[int, ...], None] = {}
    if rows == channels:
        maps[tuple(range(channels))] = None
    for count, kv_count in heads:
        if channels % count == 0:
            maps |= dict.fromkeys(_attention_maps(rows, channels, count, kv_count))
    if rows > channels:
        maps[tuple(range(rows - channels, rows))] = None
        maps[tuple(range(channels))] = None
    return list(maps)


def _attention_maps(rows: int, channels: int, heads: int, kv_heads: int) -> Iterator[tuple[int, ...]]:
    """Maps from value rows to the channels of the attention output, [heads, head_dim]."""
    head_dim, repeats = channels // heads, heads // kv_heads
    places = [(channel // head_dim // repeats, channel % head_dim) for channel in range(channels)]
    share = rows // kv_heads
    if rows % kv_heads == 0 and share >= head_dim:
        yield tuple(head * share + share - head_dim + place for head, place in places)
    start = rows - kv_heads * head_dim
    if start > 0:
        yield tuple(start + head * head_dim + place for head, place in places)


def _heads(config: Any) -> list[tuple[int, int]]:
    """Possible (attention heads, key-value heads) of the text model, what the config says first.

    Also none shared and all shared: Falcon's config, for one, has another number than its multi-query code uses.
    """
    text = config.get_text_config()
    heads = [number for number in sizes(text, "num_attention_heads") if isinstance(number, int) and number > 0]
    said = [number for key in ("num_key_value_heads", "num_kv_heads") for number in sizes(text, key)]
    shared = [number for number in said if isinstance(number, int) and number > 0]
    pairs = [(number, count) for number in heads for count in (*shared, number, 1) if number % count == 0]
    return list(dict.fromkeys(pairs))


def producer_scale(fold: Fold, scale: torch.Tensor, rows: int | None = None) -> torch.Tensor:
    """The scale by producer channel, [rows], 1 where a channel does not feed the group; see `_by_producer`."""
    return _by_producer(fold, scale, rows, 1.0, "scale")


def _by_producer(fold: Fold, values: torch.Tensor, rows: int | None, rest: float, what: str) -> torch.Tensor:
    """Values of the group's channels by producer channel, [rows], `rest` where a channel does not feed the group.

    values: [K]. rows: output channels of the producer, by default as many as the map reaches. ValueError when input
    channels that share a producer channel have different values.
    """
    import torch

    index = torch.tensor(fold.index, device=values.device)
    if values.shape != index.shape:
        raise ValueError(f"the {what} has {values.numel()} channels, the fold {index.numel()}")
    by_row = torch.full((rows or int(index.max()) + 1,), rest, dtype=values.dtype, device=values.device)
    by_row[index] = values
    if not torch.equal(by_row[index], values):
        differing = int((by_row[index] != values).sum())
        raise ValueError(
            f"{differing} of {values.numel()} channels differ in {what} from one they share a producer with"
        )
    return by_row


def apply_fold(
    tensors: Mapping[str, torch.Tensor], fold: Fold, scale: torch.Tensor, shift: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """The producer's changed tensors, so that channel j of the group's input comes out as (x_j - shift[j]) / scale[j].

    tensors: float32, with at least the fold's weight and bias. scale: [K] > 0. shift: [K], only for a producer with a
    bias. Nothing is changed in place.
    """
    weight = tensors[fold.weight]
    rows = weight.shape[-1] if fold.transposed else weight.shape[0]
    divisor = producer_scale(fold, scale.to(weight.device), rows)
    if fold.kind == "linear":
        changed = weight / (divisor if fold.transposed else divisor[:, None])
    elif fold.kind == "offset-norm":
        changed = (1 + weight) / divisor - 1
    elif fold.kind == "norm":
        changed = weight / divisor
    else:
        raise ValueError(f"unknown kind of fold: {fold.kind}")
    result = {fold.weight: changed}
    if shift is not None and not fold.bias:
        raise ValueError(f"{fold.weight} has no bias to take a shift off")
    if fold.bias:
        offset = 0 if shift is None else _by_producer(fold, shift.to(weight.device), rows, 0.0, "shift")
        result[fold.bias] = (tensors[fold.bias] - offset) / divisor
    return result
