"""Collecting `InputStats`: one pre-hook per input group, sums in float32 and float64, nothing of the raw input kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from outlierq.calibrate.experts import all_groups
from outlierq.calibrate.extremes import Places, add_to_top, top_tokens
from outlierq.calibrate.pairs import Pair
from outlierq.calibrate.trace import first_input, submodule
from outlierq.core.errors import NumbersError, StatsError
from outlierq.core.measured.block_stats import BLOCK_FIELDS
from outlierq.core.stats import (
    DERIVED,
    FIELDS,
    LOG2_BINS,
    LOG2_LOWEST,
    OF_TOKENS,
    PAIRED,
    TOKEN_BINS,
    TOP_TOKENS,
    InputStats,
)

if TYPE_CHECKING:
    import torch

    from outlierq.core.model import InputGroup
    from outlierq.core.scheme import ActivationScheme

LARGE = 6.0  # the outlier criterion of LLM.int8(), arXiv:2208.07339 section 3.2
HUGE = 20.0  # far beyond it: what no scale of a whole token survives
POSITIONAL = ("sequence_large", "first_abs_max", "first_rows", "first_rounded", "top_tokens")
# What a run over the original model can keep.
ALL_FIELDS = frozenset(FIELDS) - frozenset(PAIRED)
# Fields that are not running sums of one shape.
APART = frozenset({"rows", "first_rows", "top_tokens", *PAIRED})
NEED_ABSOLUTE = frozenset({"sum_abs", "token_histogram", "top_tokens"})
HISTOGRAM_STRIDE = 3  # counting every value would take as long as all power sums together
# Elements handled at a time: 256 KiB in float32 keep the passes over them in the cache of a core (2 MiB take twice the
# time); a GPU, and the matrix product anywhere, need large pieces instead: 128 MiB.
CHUNK_ELEMENTS = 1 << 16
CHUNK_ELEMENTS_DEVICE = 1 << 22


def stored_fields(needs: Iterable[str]) -> frozenset[str]:
    """The `InputStats` and `BlockStats` fields behind `needs`: derived ones ("abs_max") become what they come from."""
    names = frozenset(part for name in needs for part in DERIVED.get(name, (name,)))
    names |= {"first_rows"} if "hessian" in names else set()  # to weigh attention sinks
    names |= set(PAIRED) if "cross" in names else set()
    unknown = sorted(names - set(FIELDS) - BLOCK_FIELDS)
    if unknown:
        raise StatsError(f"unknown statistics {unknown}; there are {[*FIELDS, *DERIVED, *sorted(BLOCK_FIELDS)]}")
    return names


def pieces(sequences: torch.Tensor) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """[sequences, tokens, K] in float32 pieces that fit a cache: which sequences, which tokens, and their values."""
    if not sequences.numel():  # of an expert's few tokens none may be in a sample
        return
    count, length, channels = sequences.shape
    elements = CHUNK_ELEMENTS if sequences.device.type == "cpu" else CHUNK_ELEMENTS_DEVICE
    many, tokens = max(1, elements // (length * channels)), max(1, elements // channels)
    for first in range(0, count, many):
        for start in range(0, length, tokens):
            rows, columns = slice(first, min(first + many, count)), slice(start, min(start + tokens, length))
            yield rows, columns, sequences[rows, columns].float()


def token_stride(sequence_length: int, least: int) -> int:
    """Every how many tokens one is sampled: `least` or a little more, without a common divisor with the length.

    So every position of a sequence, the first one too, has its fair share over the sequences.
    """
    return next(n for n in range(least, least + sequence_length + 1) if math.gcd(n, sequence_length) == 1)


@dataclass(frozen=True)
class Sequences:
    """How the tokens come. length: tokens per sequence, to find positions in inputs that come as [tokens, K].

    skip_first: positions at the start of each sequence that are left out (they often are attention sinks);
    first_abs_max is of position 0 all the same. ids: of the whole token set [sequences, tokens], to name tokens by.
    """

    length: int
    skip_first: int = 0
    ids: torch.Tensor | None = None


class Collector:
    """Gathers the statistics of every input group while the module runs inside `with collector:`.

    module: the block (or model) that holds the sites. needs: `InputStats` fields, or "mean", "abs_mean", "abs_max".
    inputs: how the client rounds the input of a group, by its name; then the hessian and what goes with it are of that.
    reservoir: rows to keep; each token has the same chance, and all groups keep the same tokens. notes: what could not
    be done as asked.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        groups: Iterable[InputGroup],
        needs: Iterable[str],
        tokens: Sequences,
        *,
        reservoir: int = 512,
        seed: int = 0,
        inputs: Mapping[str, ActivationScheme] | None = None,
    ):
        if not 0 <= tokens.skip_first < tokens.length:
            raise StatsError(f"skip_first_tokens={tokens.skip_first} must be below the {tokens.length} of a sequence")
        stored = stored_fields(needs) & frozenset(FIELDS) - (frozenset() if reservoir else {"rows"})
        self._module = module
        self._sums = {
            group.name: _GroupSums(group, stored, tokens, _Reservoir(reservoir, seed) if "rows" in stored else None)
            for group in all_groups(list(groups))
        }
        for name in self._sums.keys() & (inputs or {}).keys():
            self._sums[name].rounding = (inputs or {})[name]
        self._handles: list[Any] = []

    def __enter__(self) -> Collector:
        for name, sums in self._sums.items():
            site = submodule(self._module, name)
            self._handles.append(site.register_forward_pre_hook(sums.hook, with_kwargs=True, prepend=True))
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def follow(self, other: Collector, weight: float) -> None:
        """Begin with the sums of `other` over other tokens, each of which counts `weight` times (`OF_TOKENS`).

        They are taken over and changed: a second hessian of each input would be the largest thing in memory.
        """
        for name, sums in self._sums.items():
            if name in other._sums:
                sums.follow(other._sums[name], weight)

    @contextmanager
    def of_original(self) -> Iterator[None]:
        """Inside of `with collector:`, a batch of which the next one outside of this is the quantized counterpart."""
        for sums in self._sums.values():
            sums.remembers = True
        try:
            yield
        finally:
            for sums in self._sums.values():
                sums.remembers = False

    @property
    def notes(self) -> list[str]:
        """One sentence for each group whose tokens had no positions, unless it is an expert's (`tokens_note`)."""
        return [
            f"{name}: its tokens are routed, so first tokens are not left out and positions are not counted"
            for name, sums in self._sums.items()
            if sums.routed and not sums.to_expert
        ]

    def finish(self) -> dict[str, InputStats]:
        """The statistics by group name, those of parts, too; an expert that saw no tokens has none.

        StatsError names any other group that saw no tokens.
        """
        return {name: sums.finish() for name, sums in self._sums.items() if sums.tokens or not sums.to_expert}


class _GroupSums:
    """Running sums of one input group."""

    def __init__(self, group: InputGroup, stored: frozenset[str], tokens: Sequences, rows: _Reservoir | None):
        self.name, self.fields, self.to_expert = group.name, stored, group.routed
        self.first: list[torch.Tensor] = []
        self.rounding: ActivationScheme | None = None
        self.first_rounded: list[torch.Tensor] = []
        self.sequence_length, self.skip, self.ids = tokens.length, tokens.skip_first, tokens.ids
        self.stride = token_stride(self.sequence_length - self.skip, HISTOGRAM_STRIDE)
        self.top: torch.Tensor | None = None
        self.tokens = self.sequences = self.tokens_before = 0
        self.before: dict[str, torch.Tensor] = {}  # sums that this one begins with
        self.routed = self.to_expert
        self.values: dict[str, torch.Tensor] = {}
        self.rows = rows
        self.pair = Pair() if "cross" in stored else None
        self.remembers = False

    def follow(self, other: _GroupSums, weight: float) -> None:
        """`Collector.follow`; each token counts as many times as makes a whole number of them."""
        if not other.tokens:
            return
        self.tokens_before = round(weight * other.tokens)
        factor = self.tokens_before / other.tokens
        self.before = {name: sums.mul_(factor) for name, sums in other.values.items() if name in OF_TOKENS}
        if self.pair and other.pair:
            self.pair.follow(other.pair, factor)
        other.values = {}

    def hook(self, part: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the group's first site."""
        import torch

        with torch.inference_mode():
            inputs = first_input(args, kwargs)
            if not self.remembers:
                self.add(inputs)
            elif self.pair:
                self.pair.remember(inputs)

    def add(self, inputs: torch.Tensor) -> None:
        """Add one batch: [..., tokens, K]."""
        import torch

        if not inputs.numel():  # an expert that no token was routed to
            return
        if not self.values:
            self._allocate(inputs.shape[-1], inputs.device)
        sequences = self._as_sequences(inputs)
        if "first_abs_max" in self.values and not self.routed:
            self._keep("first_abs_max", sequences[:, 0].float().abs().amax(0))
        if "first_rows" in self.fields and not self.routed and not self.skip:
            self.first.append(sequences[:, 0].to("cpu", torch.float32, copy=True))
        seen = self._as_seen(sequences)
        if self.skip and not self.routed:
            self._check(sequences[:, : self.skip].flatten(0, 1).float(), inputs)
            sequences, seen = sequences[:, self.skip :], seen[:, self.skip :]
        self._add_sequences(sequences)
        self._check(self.values["min"], inputs)
        self._check(self.values["max"], inputs)
        rows = sequences.flatten(0, 1)
        if "hessian" in self.values:
            from outlierq.ops.gram import add_gram
            from outlierq.ops.precision import matmul_operands

            with matmul_operands(rows.dtype):
                for some in seen.flatten(0, 1).split(max(1, CHUNK_ELEMENTS_DEVICE // rows.shape[1])):
                    add_gram(self.values["hessian"], some)
        if self.rows:
            self.rows.add(rows)

    def _as_seen(self, sequences: torch.Tensor) -> torch.Tensor:
        """[sequences, tokens, K] as the linears see it, rounded where the client rounds it; pairs are summed."""
        seen = sequences
        if self.rounding is not None:
            from outlierq.ops.activations import fake_quantize

            seen = fake_quantize(sequences, self.rounding)
            if "first_rounded" in self.fields and not self.routed and not self.skip:
                self.first_rounded.append(seen[:, 0].float().cpu().clone())
        if self.pair:
            alone = self.rounding is not None and not self.pair.remembers  # there is one run of the model
            if alone:
                self.pair.remember(sequences)
            self.pair.add(seen, self.skip, routed=self.routed, alone=alone)
        return seen

    def _check(self, values: torch.Tensor, inputs: torch.Tensor) -> None:
        """NumbersError when the values, which come from these inputs, are not finite."""
        if not values.isfinite().all():
            bad = int((~inputs.isfinite()).sum())
            raise NumbersError(f"{bad} of {inputs.numel()} inputs of {self.name} are NaN or Inf")

    def _allocate(self, channels: int, device: torch.device) -> None:
        """Zeroed sums. Outside of inference mode, or nobody could change them in place later."""
        import torch

        from outlierq.ops.gram import no_sum

        starts = {"min": float("inf"), "max": float("-inf")}
        shapes = {
            "hessian": (channels, channels),
            "log2_histogram": (channels, LOG2_BINS),
            "token_histogram": (TOKEN_BINS,),
        }
        with torch.inference_mode(False):
            for name in self.fields - APART | {"min", "max"}:  # the extremes also show NaN and Inf
                wide = torch.float32 if name in ("min", "max", "first_abs_max", "hessian") else torch.float64
                wide = torch.int64 if name in ("log2_histogram", "token_histogram") else wide
                shape = shapes.get(name, (channels,))
                if name in self.before:
                    self.values[name] = self.before.pop(name)
                elif name == "hessian" and device.type == "cpu":
                    self.values[name] = no_sum(channels)
                else:
                    self.values[name] = torch.full(shape, starts.get(name, 0), dtype=wide, device=device)
            if "log2_histogram" in self.fields:
                self.offsets = torch.arange(channels, dtype=torch.int32, device=device) * LOG2_BINS

    def _as_sequences(self, inputs: torch.Tensor) -> torch.Tensor:
        """[sequences, tokens, K]; a flat input is cut at `sequence_length`, and if that does not fit it is routed."""
        if inputs.dim() >= 3:
            return inputs.reshape(-1, *inputs.shape[-2:])
        self.routed = self.routed or inputs.shape[0] % self.sequence_length != 0
        length = inputs.shape[0] if self.routed else self.sequence_length
        return inputs.reshape(-1, length, inputs.shape[-1])

    def _keep(self, name: str, values: torch.Tensor) -> None:
        """Fold an extreme into its place, when it is wanted. NaN stays."""
        import torch

        if name in self.values:
            place = self.values[name]
            (torch.minimum if name == "min" else torch.maximum)(place, values, out=place)

    def _add_sequences(self, sequences: torch.Tensor) -> None:
        """Add everything but the matrix, over [sequences, tokens, K], piece by piece."""
        import torch

        count, length, _ = sequences.shape
        token_max = torch.zeros(count, length, device=sequences.device)
        for rows, columns, piece in pieces(sequences):
            self._add_piece(piece, length, token_max[rows, columns])
        if "token_histogram" in self.fields:
            bins = (2 * token_max.flatten().clamp_min(2.0**-20).log2()).floor().long() + TOKEN_BINS // 2
            self.values["token_histogram"] += bins.clamp_(0, TOKEN_BINS - 1).bincount(minlength=TOKEN_BINS)
        if "top_tokens" in self.fields and not self.routed:
            top = top_tokens(sequences, token_max, Places(self.ids, self.sequences, self.skip), TOP_TOKENS)
            self.top = add_to_top(self.top, top, TOP_TOKENS)
        if "log2_histogram" in self.fields:
            sample = sequences.flatten(0, 1)[-self.tokens % self.stride :: self.stride]
            for _, _, piece in pieces(sample[None]):
                self._add_histogram(piece[0].abs())
        self.tokens += count * length
        self.sequences += 0 if self.routed else count

    def _add_piece(self, x: torch.Tensor, length: int, token_max: torch.Tensor) -> None:
        """Add [S, T, K] float32: some sequences, or a piece of one that has `length` tokens. token_max is filled."""
        rows = x.flatten(0, 1)
        low, high = rows.amin(0), rows.amax(0)  # aminmax along the rows is 5 times slower than both
        self._keep("min", low)
        self._keep("max", high)
        absolute = rows.abs() if self.fields & NEED_ABSOLUTE else rows
        self._add_powers(rows, absolute)
        self._add_counts(rows, (-low).maximum(high), length)
        if self.fields & {"token_histogram", "top_tokens"}:
            token_max.copy_(absolute.amax(1).view(token_max.shape))

    def _add_counts(self, rows: torch.Tensor, largest: torch.Tensor, length: int) -> None:
        """Count thresholds passed in [N, K], in the channels whose `largest` |x| passes one: mostly few."""
        for threshold, names in ((LARGE, {"count_large": 1, "sequence_large": length}), (HUGE, {"count_huge": 1})):
            channels = (largest >= threshold).nonzero()[:, 0] if self.fields & names.keys() else largest[:0]
            if len(channels):
                hits = (rows[:, channels].abs() >= threshold).float().sum(0).double()
                for name in self.fields & names.keys():
                    self.values[name].index_add_(0, channels, hits / names[name])

    def _add_histogram(self, absolute: torch.Tensor) -> None:
        """Count |x| [N, K] float32 by its exponent bits, which are floor(log2 |x|) + 127 (subnormals and 0: 0)."""
        import torch

        lowest = 127 + LOG2_LOWEST
        bins = (absolute.view(torch.int32) >> 23).clamp_(lowest, lowest + LOG2_BINS - 1)
        flat = bins.add_(self.offsets - lowest).flatten()
        histogram = self.values["log2_histogram"]
        histogram += flat.bincount(minlength=histogram.numel()).view_as(histogram)

    def _add_powers(self, x: torch.Tensor, absolute: torch.Tensor) -> None:
        """Power sums of [N, K] float32."""
        if "sum_x" in self.fields:
            self.values["sum_x"] += x.sum(0)
        if "sum_abs" in self.fields:
            self.values["sum_abs"] += absolute.sum(0)
        if not self.fields & {"sum_sq", "sum_cube", "sum_fourth"}:
            return
        square = x * x
        powers: dict[str, Callable[[], torch.Tensor]] = {
            "sum_sq": lambda: square,
            "sum_cube": lambda: square * x,
            "sum_fourth": lambda: square * square,
        }
        for name, power in powers.items():
            if name in self.fields:
                self.values[name] += power().sum(0)

    def finish(self) -> InputStats:
        """The statistics; the running sums must not be used afterwards."""
        import torch

        if not self.tokens:
            raise StatsError(
                f"{self.name} saw no tokens during calibration",
                hint="calibrate on more text, or add this site to `ignore`",
            )
        total, stored = self.tokens + self.tokens_before, self.fields - set(POSITIONAL if self.routed else ())
        values = {name: value for name, value in self.values.items() if name in stored}
        if "hessian" in values:
            from outlierq.ops.gram import mirror

            values["hessian"] = mirror(values["hessian"]).div_(total)
        if self.rows:
            values["rows"] = self.rows.finish()
        if self.pair:
            values |= self.pair.finish(total)
        if self.first and "first_rows" in stored:
            values["first_rows"] = torch.cat(self.first)
        if self.first_rounded and "first_rounded" in stored:
            values["first_rounded"] = torch.cat(self.first_rounded)
        if self.top is not None and "top_tokens" in stored:
            values["top_tokens"] = self.top.clone()
        if "log2_histogram" in values:
            values["log2_histogram"] = values["log2_histogram"].int()
        return InputStats(total, self.sequences, **values)


class _Reservoir:
    """A uniform sample of rows: every row draws a number, and the rows with the smallest numbers stay."""

    def __init__(self, size: int, seed: int):
        import torch

        self.size = size
        self.generator = torch.Generator().manual_seed(seed)
        self.drawn = torch.empty(0)
        self.sample: torch.Tensor | None = None

    def add(self, rows: torch.Tensor) -> None:
        """Offer rows [N, K]."""
        import torch

        drawn = torch.cat([self.drawn, torch.rand(rows.shape[0], generator=self.generator)])
        order = drawn.argsort()[: self.size].sort().values  # in the order in which the rows came
        old = order[order < len(self.drawn)]
        new = order[order >= len(self.drawn)] - len(self.drawn)
        fresh = rows[new.to(rows.device)].to("cpu", torch.bfloat16)
        self.sample = fresh if self.sample is None else torch.cat([self.sample[old], fresh])
        self.drawn = drawn[order]

    def finish(self) -> torch.Tensor:
        """[R, K] bfloat16, in the order of the tokens."""
        assert self.sample is not None, "no rows were offered"
        return self.sample.clone()
