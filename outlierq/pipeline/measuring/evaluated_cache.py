"""A model whose attention finds keys and values as a cache of the literature would give them back (`ops/caches`).

What such a cache learns beforehand, it learns from the calibration part of the mix. Keys before RoPE are those after
it, turned back by the model's own function; where that does not give the same keys again, the model is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import SourceError
from outlierq.core.model import Checkpoint
from outlierq.ops.caches import kivi
from outlierq.ops.caches.evaluated import EVALUATED, EvaluatedCache

if TYPE_CHECKING:
    import torch

    from outlierq.load.model.attention import Seen

WINDOWS, LENGTH = 8, 512  # of text that a cache learns from
SLOT = "outlierq_evaluated_cache"
MOST_OFF = 1e-3  # relative, of keys turned back by RoPE and turned again


def evaluate_through(model: torch.nn.Module, name: str, checkpoint: Checkpoint) -> None:
    """Have the attention of a model see what a cache of `EVALUATED` gives back. SourceError where it cannot be had."""
    from outlierq.load import attend_through, attention_names

    attentions = [model.get_submodule(name) for name in attention_names(model)]
    if not attentions:
        raise SourceError(f"{type(model).__name__} does not call transformers' attention interface: no cache is seen")
    cache = EVALUATED[name]
    kept = [_KeptBy(cache, module) for module in attentions]
    if cache.largest:
        _watch_blocks(model, kept)
    attend_through(model, "evaluated", _seen)
    if cache.learn is not None:
        _learn(model, kept, checkpoint)


def _seen(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
) -> Seen:
    """What the attention of a module sees."""
    kept: _KeptBy | None = vars(module).get(SLOT)
    return (key, value, mask) if kept is None else kept.seen(query, key, value, mask)


class _KeptBy:
    """The cache of one attention. learned: what it was taught; loud: bool [sequences, tokens], who is kept as it is."""

    def __init__(self, cache: EvaluatedCache, module: torch.nn.Module):
        self.cache, self.module, self.rope = cache, module, None
        self.learned: Any = None
        self.loud: torch.Tensor | None = None
        self.samples: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        vars(module)[SLOT] = self
        module.register_forward_pre_hook(self._note_rope, with_kwargs=True)

    def _note_rope(self, _: torch.nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.rope = options.get("position_embeddings")

    def seen(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> Seen:
        """Keys, values [sequences, kv heads, tokens, D] and mask as the cache gives them back."""
        before = self._turned(key, back=True) if self.cache.before_rope else key
        if self.samples is not None:
            self.samples.append((by_token(before), by_token(value)))
            return key, value, mask
        read, values = self.cache.rounded(before, value, self.learned)
        read = self._turned(read, back=False) if self.cache.before_rope else read
        exact = self._exact(key)
        if exact is not None:
            read, values = exact_where(exact, key, read), exact_where(exact, value, values)
        if not self.cache.recent:
            return read, values, mask
        return beside_newest(self.module, query, (key, read), (value, values), mask, self.cache.recent)

    def _exact(self, key: torch.Tensor) -> torch.Tensor | None:
        """Bool [sequences, tokens]: the tokens that are kept as they are."""
        import torch

        if self.loud is not None:
            return self.loud
        return (torch.arange(key.shape[2]) < self.cache.first).expand(len(key), -1) if self.cache.first else None

    def _turned(self, key: torch.Tensor, *, back: bool) -> torch.Tensor:
        """Keys through RoPE, or back."""
        if self.rope is None:
            return key
        apply = getattr(sys.modules[type(self.module).__module__], "apply_rotary_pos_emb", None)
        if apply is None or not isinstance(self.rope, tuple) or len(self.rope) != 2:
            raise _unknown_rope(self.module)
        cos, sin = self.rope
        if not back:
            return apply(key, key, cos, sin)[1]
        length = cos.square() + sin.square()  # not 1 where RoPE is stretched
        before: torch.Tensor = apply(key, key, cos / length, -sin / length)[1]
        again = apply(before, before, cos, sin)[1]
        if (again - key).norm() > MOST_OFF * key.norm():
            raise _unknown_rope(self.module)
        return before


def _unknown_rope(module: torch.nn.Module) -> SourceError:
    return SourceError(
        f"the keys of {type(module).__name__} before RoPE are not to be had: it applies its own",
        hint="take a cache of keys after RoPE: kivi-4, ksort-4, int4",
    )


def by_token(x: torch.Tensor) -> torch.Tensor:
    """[sequences, kv heads, tokens, D] as [tokens of all sequences, kv heads, D]."""
    return x.transpose(1, 2).flatten(0, 1)


def exact_where(tokens: torch.Tensor, exact: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """[sequences, kv heads, tokens, D], the exact ones where bool [sequences, tokens] says so."""
    return exact.where(tokens[:, None, :, None].to(exact.device), rounded)


def beside_newest(
    module: torch.nn.Module,
    query: torch.Tensor,
    keys: tuple[torch.Tensor, torch.Tensor],
    values: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
    recent: int,
) -> Seen:
    """Each query sees older tokens rounded and its newest ones exact: both stand behind each other, and the mask says
    which of the two counts.

    keys, values: exact and rounded, [sequences, kv heads, tokens, D].
    """
    import torch

    count = query.shape[2]
    causal = getattr(module, "is_causal", True)
    every = torch.ones(count, count, dtype=torch.bool, device=query.device)
    rounded = kivi.seen_rounded(count, recent).to(query.device)
    allowed = (every.tril() if causal else every)[None, None]
    lowest = torch.finfo(query.dtype).min
    if mask is None:
        added = torch.zeros_like(allowed, dtype=query.dtype).masked_fill(~allowed, lowest)
    elif mask.dtype == torch.bool:
        added = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)
    else:
        added = mask.to(query.dtype)
    both = torch.cat([added.masked_fill(~rounded, lowest), added.masked_fill(rounded, lowest)], -1)
    return torch.cat(keys[::-1], 2), torch.cat(values[::-1], 2), both


def _watch_blocks(model: torch.nn.Module, kept: list[_KeptBy]) -> None:
    """Before each block, its attention is told which tokens hold the largest entries of the hidden states."""
    from outlierq.load import block_list

    for block in block_list(model)[1]:
        inside = [each for each in kept if any(part is each.module for part in block.modules())]
        block.register_forward_pre_hook(_telling(inside), with_kwargs=True)


def _telling(inside: list[_KeptBy]) -> Callable[..., None]:
    """A hook of a block."""

    def tell(_: torch.nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        hidden = args[0] if args else options["hidden_states"]
        for each in inside:
            each.loud = loud_tokens(hidden, each.cache.largest)

    return tell


def loud_tokens(hidden: torch.Tensor, count: int) -> torch.Tensor:
    """Bool [sequences, tokens]: who holds one of the `count` largest entries of a sequence. hidden: [sequences, tokens,
    channels]."""
    import torch

    largest = hidden.abs().flatten(1).topk(min(count, hidden[0].numel()), 1).indices // hidden.shape[-1]
    return torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device).scatter_(1, largest, True)


def _learn(model: torch.nn.Module, kept: list[_KeptBy], checkpoint: Checkpoint) -> None:
    """Show every cache some text, and let it learn."""
    import torch

    from outlierq.calibrate.text.windows import token_windows
    from outlierq.core.windows import limit_of
    from outlierq.load import load_tokenizer

    length = min(LENGTH, limit_of(model, "max_position_embeddings") or LENGTH)
    tokenizer = load_tokenizer(checkpoint)
    ids = token_windows(tokenizer, "mix", samples=WINDOWS, sequence_length=length, seed=0).ids
    for each in kept:
        each.samples = []
    with torch.inference_mode():
        for window in ids.split(1):
            model(input_ids=window.to(next(model.parameters()).device), use_cache=False)
    for each in kept:
        assert each.cache.learn is not None and each.samples is not None, "a cache that learns"
        if each.samples:
            keys, values = (torch.cat(part) for part in zip(*each.samples, strict=True))
            each.learned = each.cache.learn(keys, values)
        each.samples = None
