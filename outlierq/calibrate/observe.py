"""Collecting `BlockStats`: a block's output, its attention as transformers calls it, and its router, seen by hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from outlierq.calibrate.attention import AttentionSums
from outlierq.calibrate.collect import pieces, token_stride
from outlierq.calibrate.extremes import Places, add_to_top, top_entries, top_of_sequences
from outlierq.calibrate.runner import hidden_of
from outlierq.calibrate.trace import submodule
from outlierq.core.measured.block_stats import BLOCK_FIELDS, BlockStats
from outlierq.core.model import EXPERT_COUNTS

if TYPE_CHECKING:
    import torch

    from outlierq.core.model import Block

    Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]

TOP_ENTRIES = 20
SAMPLE_STRIDE = 7
RESIDUAL = frozenset(name for name in BLOCK_FIELDS if name.startswith("residual_"))
OUTPUT = frozenset(name for name in BLOCK_FIELDS if name.startswith("output_"))
EXPERTS = frozenset({"expert_tokens", "expert_saliency"})
ATTENTION = BLOCK_FIELDS - RESIDUAL - EXPERTS

NO_INTERFACE = (
    "the attention does not go through transformers' attention interface: nothing is known of queries, keys, values "
    "and attention"
)


class BlockObserver:
    """Gathers the statistics of one block while it runs inside `with observer:`.

    fields: of `BlockStats`. sequence_length: tokens per sequence. ids: [sequences, tokens] of the whole token set, to
    name tokens by. classes: [sequences, tokens], the class of each token as attention sees it (`MASS_COLUMNS`); without
    it there is no attention_mass. first_sequence: number of the first one that will run. notes: what could not be
    observed, in sentences.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        block: Block,
        fields: frozenset[str] = BLOCK_FIELDS,
        *,
        sequence_length: int,
        ids: torch.Tensor | None = None,
        classes: torch.Tensor | None = None,
        first_sequence: int = 0,
    ):
        self._module, self._block, self._fields = module, block, fields & BLOCK_FIELDS
        self._residual = _ResidualSums(self._fields, sequence_length, ids)
        self._attention = AttentionSums(self._fields, classes)
        self._experts = _ExpertCounts()
        self._sequences = first_sequence
        self._open = ExitStack()

    def __enter__(self) -> BlockObserver:
        with ExitStack() as opening:
            if self._fields & ATTENTION:
                opening.enter_context(attention_calls(self._see_attention))
            if self._fields & OUTPUT:
                for site in self._block.sites:
                    part = submodule(self._module, site.module)
                    _hook(opening, part.register_forward_hook(self._keep_output(site.module)))
            if "expert_tokens" in self._fields:
                for part, hook in self._experts.hooks(self._module):
                    _hook(opening, part.register_forward_pre_hook(hook, with_kwargs=True))
            if "expert_saliency" in self._fields:
                for part, hook in self._experts.output_hooks(self._module):
                    _hook(opening, part.register_forward_hook(hook))
            _hook(opening, self._module.register_forward_hook(self._see_output))
            self._open = opening.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @property
    def notes(self) -> list[str]:
        """What could not be observed."""
        if not self._fields & ATTENTION:
            return []
        return self._attention.notes if self._attention.seen else [NO_INTERFACE]

    def parts(self) -> list[dict[str, Any]]:
        """The running sums as plain values, for an observer of earlier sequences to `absorb`."""
        return [self._residual.parts(), self._attention.parts(), self._experts.parts()]

    def absorb(self, parts: list[dict[str, Any]]) -> None:
        """Add what another observer of the same block saw in later sequences."""
        residual, attention, experts = parts
        self._residual.absorb(residual)
        self._attention.absorb(attention)
        self._experts.absorb(experts)

    def finish(self) -> BlockStats:
        """The statistics that could be observed, in the memory of the host."""
        values = {**self._residual.finish(), **self._attention.finish(), **self._experts.finish()}
        names = values.pop("output_names", ())
        return BlockStats(**{k: v.cpu() for k, v in values.items() if k in self._fields}, output_names=names)

    def _keep_output(self, name: str) -> Callable[..., None]:
        """A hook that keeps what a linear returns until the attention is called."""

        def hook(part: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._attention.pending[name] = output

        return hook

    def _see_attention(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        """One call of the attention."""
        self._attention.add(self._sequences, module, *args, **kwargs)

    def _see_output(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The block returns one batch of hidden states."""
        hidden = hidden_of(output, module)
        if self._fields & RESIDUAL and hidden.dim() == 3:
            self._residual.add(hidden, self._sequences)
        self._attention.pending.clear()
        self._sequences += hidden.shape[0]


def _hook(opening: ExitStack, handle: Any) -> None:
    """Let a hook go when the stack is closed."""
    opening.callback(handle.remove)


@contextmanager
def attention_calls(see: Callable[..., None]) -> Iterator[None]:
    """Inside, `see` gets the arguments of every attention function that a transformers model looks up.

    What models ask is wrapped, not what they are set to: they run the function that they always run, also the `eager`
    one of their own file, and the masks that were recorded with it stay valid.
    """
    from transformers import AttentionInterface

    original = AttentionInterface.get_interface

    def get_interface(self: AttentionInterface, implementation: str, default: Attention) -> Attention:
        attention: Attention = original(self, implementation, default)

        def watched(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
            see(*args, **kwargs)
            return attention(*args, **kwargs)

        return watched

    # The only place that all models ask.
    AttentionInterface.get_interface = get_interface  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        AttentionInterface.get_interface = original  # type: ignore[method-assign]


class _ResidualSums:
    """Running extremes of the hidden states that a block returns.

    Medians and kurtosis are of every 7th token or so (see `token_stride`); sorting all of them and their fourth moments
    would cost as much as all the rest. The largest kurtosis also looks at the largest token of every sequence.
    """

    def __init__(self, fields: frozenset[str], sequence_length: int, ids: torch.Tensor | None):
        self.fields, self.ids, self.stride = fields, ids, token_stride(sequence_length, SAMPLE_STRIDE)
        self.seen = 0
        self.abs_max: torch.Tensor | None = None
        self.top: torch.Tensor | None = None
        self.first: list[torch.Tensor] = []
        self.medians: list[torch.Tensor] = []
        self.kurtosis: list[torch.Tensor] = []
        self.peaks: list[torch.Tensor] = []

    def add(self, hidden: torch.Tensor, sequences: int) -> None:
        """Add one batch [sequences, tokens, H]; `sequences` came before."""
        import torch

        token_max = torch.empty(hidden.shape[:2], device=hidden.device)
        for rows, columns, piece in pieces(hidden):
            absolute = piece.abs()
            token_max[rows, columns] = absolute.amax(2)
            high = absolute.amax((0, 1))
            self.abs_max = high if self.abs_max is None else self.abs_max.maximum(high)
        places = Places(self.ids, sequences)
        self.top = add_to_top(self.top, top_entries(hidden, token_max, places, TOP_ENTRIES), TOP_ENTRIES)
        self.first.append(top_of_sequences(hidden, token_max, places))
        self._add_sample(hidden, token_max.argmax(1))

    def _add_sample(self, hidden: torch.Tensor, largest: torch.Tensor) -> None:
        """Medians and kurtosis of some tokens, and kurtosis of the largest one of every sequence [sequences]."""
        flat = hidden.flatten(0, 1)
        sample = flat[-self.seen % self.stride :: self.stride].float()
        self.seen += len(flat)
        self.medians.append(sample.abs().median(1).values)
        self.kurtosis.append(kurtosis(sample))
        self.peaks.append(kurtosis(hidden.gather(1, largest[:, None, None].expand(-1, 1, hidden.shape[2])).float()))

    def parts(self) -> dict[str, Any]:
        """The running extremes and samples."""
        samples = {"first": self.first, "medians": self.medians, "kurtosis": self.kurtosis, "peaks": self.peaks}
        return {"abs_max": self.abs_max, "top": self.top, **samples}

    def absorb(self, parts: dict[str, Any]) -> None:
        """Add those of later sequences."""
        if parts["abs_max"] is None:
            return
        self.abs_max = parts["abs_max"] if self.abs_max is None else self.abs_max.maximum(parts["abs_max"])
        self.top = add_to_top(self.top, parts["top"], TOP_ENTRIES)
        for name in ("first", "medians", "kurtosis", "peaks"):
            getattr(self, name).extend(parts[name])

    def finish(self) -> dict[str, Any]:
        """The fields by name."""
        import torch

        if self.abs_max is None or self.top is None:
            return {}
        per_token, peaks = torch.cat(self.kurtosis), torch.cat(self.peaks).flatten()
        return {
            "residual_top": self.top.clone(),
            "residual_first": torch.cat(self.first),
            "residual_abs_max": self.abs_max.clone(),
            "residual_median": torch.cat(self.medians).median(),
            "residual_kurtosis": torch.stack([per_token.mean(), torch.cat([per_token, peaks]).max()]),
        }


class _ExpertCounts:
    """Tokens that the router sent to each expert.

    Experts are found by what they are given, not by name: a module with a number of experts that receives integers
    (the chosen experts of each token), or, in older code, a list of experts that each receive their own tokens.
    """

    def __init__(self) -> None:
        self.counts: torch.Tensor | None = None
        self.saliency: torch.Tensor | None = None

    def hooks(self, module: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, Callable[..., None]]]:
        """The parts to watch, each with its pre-hook."""
        import torch

        for name, part in module.named_modules():
            number = next((getattr(part, key) for key in EXPERT_COUNTS if isinstance(getattr(part, key, None), int)), 0)
            if isinstance(part, torch.nn.ModuleList) and name.rpartition(".")[2] == "experts":
                for index, expert in enumerate(part):
                    yield expert, self._one(index, len(part))
            elif number:
                yield part, self._routed_to(number)

    def output_hooks(self, module: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, Callable[..., None]]]:
        """Separate experts, each with a hook for what it adds to the output."""
        for part in module.modules():
            if hasattr(part, "routing"):
                experts = {name: expert for name, expert in part.named_children() if name.isdigit()}
                for name, expert in experts.items():
                    yield expert, self._added(int(name), len(experts))

    def _added(self, index: int, number: int) -> Callable[..., None]:
        """A hook of one expert, whose output is weighted by the router."""

        def hook(part: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            import torch

            if self.saliency is None:
                self.saliency = torch.zeros(number, dtype=torch.float64, device=output.device)
            self.saliency[index] += output.float().norm(dim=-1).double().sum()

        return hook

    def _routed_to(self, number: int) -> Callable[..., None]:
        """A pre-hook of a module that gets the chosen experts of all tokens."""

        def hook(part: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            import torch

            for value in (*args, *kwargs.values()):
                if isinstance(value, torch.Tensor) and value.dtype in (torch.int64, torch.int32):
                    self._add(value.flatten().bincount(minlength=number)[:number])  # one more stands for "none"
                    return

        return hook

    def _one(self, index: int, number: int) -> Callable[..., None]:
        """A pre-hook of one expert."""

        def hook(part: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            import torch

            given = args[0] if args else next(iter(kwargs.values()))
            counts = torch.zeros(number, dtype=torch.int64, device=given.device)
            counts[index] = given.numel() // given.shape[-1]
            self._add(counts)

        return hook

    def _add(self, counts: torch.Tensor) -> None:
        """Add the counts of one call."""
        self.counts = counts if self.counts is None else self.counts + counts

    def parts(self) -> dict[str, Any]:
        """The running sums."""
        return {"counts": self.counts, "saliency": self.saliency}

    def absorb(self, parts: dict[str, Any]) -> None:
        """Add those of later sequences."""
        self.counts, self.saliency = _sum(self.counts, parts["counts"]), _sum(self.saliency, parts["saliency"])

    def finish(self) -> dict[str, Any]:
        """The fields, when there are experts."""
        sums = {"expert_tokens": self.counts, "expert_saliency": self.saliency}
        return {name: value.clone() for name, value in sums.items() if value is not None}


def _sum(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    """The sum of what is there."""
    return one + other if one is not None and other is not None else one if other is None else other


def kurtosis(x: torch.Tensor) -> torch.Tensor:
    """E[(x - mean)^4] / var^2 over the last axis; 3 for normal values, 1 at least. 0 where all values are equal."""
    centred = x - x.mean(-1, keepdim=True)
    square = centred * centred
    variance = square.mean(-1)
    return (square * square).mean(-1) / (variance * variance).clamp_min(1e-30)
