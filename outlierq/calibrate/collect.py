"""Collecting `InputStats`: one pre-hook per input group, sums in float32 and float64, nothing of the raw input kept."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from outlierq.calibrate.trace import first_input, submodule
from outlierq.core.errors import NumbersError, StatsError
from outlierq.core.stats import InputStats

if TYPE_CHECKING:
    import torch

    from outlierq.core.model import InputGroup

LARGE = 6.0  # the outlier criterion of LLM.int8(), arXiv:2208.07339 section 3.2
FIELDS = (
    "min", "max", "sum_x", "sum_abs", "sum_sq", "sum_cube", "sum_fourth", "count_large", "sequence_large",
    "first_abs_max", "hessian", "rows", "first_rows",
)  # fmt: skip
DERIVED = {"mean": ("sum_x",), "abs_mean": ("sum_abs",), "abs_max": ("min", "max")}
POSITIONAL = ("sequence_large", "first_abs_max", "first_rows")
ALL_FIELDS = frozenset(FIELDS)
# Elements handled at a time: 256 KiB in float32 keep the passes over them in the cache of a core (2 MiB take twice the
# time); a GPU, and the matrix product anywhere, need large pieces instead: 128 MiB.
CHUNK_ELEMENTS = 1 << 16
CHUNK_ELEMENTS_DEVICE = 1 << 22


def stored_fields(needs: Iterable[str]) -> frozenset[str]:
    """The `InputStats` fields behind the statistics in `needs`: derived ones ("abs_max") become what they come from."""
    fields = frozenset(part for name in needs for part in DERIVED.get(name, (name,)))
    fields |= {"first_rows"} if "hessian" in fields else set()  # to weigh attention sinks
    unknown = sorted(fields - ALL_FIELDS)
    if unknown:
        raise StatsError(f"unknown statistics {unknown}; there are {[*FIELDS, *DERIVED]}")
    return fields


class Collector:
    """Gathers the statistics of every input group while the module runs inside `with collector:`.

    module: the block (or model) that holds the sites. needs: `InputStats` fields, or "mean", "abs_mean", "abs_max".
    sequence_length: tokens per sequence, to find positions in inputs that come as [tokens, K].
    skip_first_tokens: positions at the start of each sequence that are left out (they often are attention sinks);
    first_abs_max is of position 0 all the same. reservoir: rows to keep; each token has the same chance, and all
    groups keep the same tokens. notes: what could not be done as asked.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        groups: Iterable[InputGroup],
        needs: Iterable[str],
        *,
        sequence_length: int,
        skip_first_tokens: int = 0,
        reservoir: int = 512,
        seed: int = 0,
    ):
        if not 0 <= skip_first_tokens < sequence_length:
            raise StatsError(f"skip_first_tokens={skip_first_tokens} must be below the {sequence_length} of a sequence")
        fields = stored_fields(needs) - (frozenset() if reservoir else {"rows"})
        self._module = module
        self._sums = {
            group.name: _GroupSums(group.name, fields, sequence_length, skip_first_tokens, reservoir, seed)
            for group in groups
        }
        self._handles: list[Any] = []

    def __enter__(self) -> Collector:
        for name, sums in self._sums.items():
            site = submodule(self._module, name)
            self._handles.append(site.register_forward_pre_hook(sums.hook, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    @property
    def notes(self) -> list[str]:
        """One sentence for each group whose tokens had no positions."""
        return [
            f"{name}: its tokens are routed, so first tokens are not left out and positions are not counted"
            for name, sums in self._sums.items()
            if sums.routed
        ]

    def finish(self) -> dict[str, InputStats]:
        """The statistics by group name; StatsError names a group that saw no tokens."""
        return {name: sums.finish() for name, sums in self._sums.items()}


class _GroupSums:
    """Running sums of one input group."""

    def __init__(
        self,
        name: str,
        fields: frozenset[str],
        sequence_length: int,
        skip: int,
        reservoir: int,
        seed: int,
    ):
        self.name, self.fields = name, fields
        self.first: list[torch.Tensor] = []
        self.sequence_length, self.skip = sequence_length, skip
        self.tokens = self.sequences = 0
        self.routed = False
        self.values: dict[str, torch.Tensor] = {}
        self.rows = _Reservoir(reservoir, seed) if "rows" in fields else None

    def hook(self, part: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the group's first site."""
        import torch

        with torch.inference_mode():
            self.add(first_input(args, kwargs))

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
        if self.skip and not self.routed:
            self._check(sequences[:, : self.skip].flatten(0, 1).float(), inputs)
            sequences = sequences[:, self.skip :]
        self._add_sequences(sequences)
        self._check(self.values["min"], inputs)
        self._check(self.values["max"], inputs)
        rows = sequences.flatten(0, 1)
        if "hessian" in self.values:
            from outlierq.ops.gram import add_gram
            from outlierq.ops.precision import matmul_operands

            with matmul_operands(rows.dtype):
                for some in rows.split(max(1, CHUNK_ELEMENTS_DEVICE // rows.shape[1])):
                    add_gram(self.values["hessian"], some.float())
        if self.rows:
            self.rows.add(rows)

    def _check(self, values: torch.Tensor, inputs: torch.Tensor) -> None:
        """NumbersError when the values, which come from these inputs, are not finite."""
        if not values.isfinite().all():
            bad = int((~inputs.isfinite()).sum())
            raise NumbersError(f"{bad} of {inputs.numel()} inputs of {self.name} are NaN or Inf")

    def _allocate(self, channels: int, device: torch.device) -> None:
        """Zeroed sums. Outside of inference mode, or nobody could change them in place later."""
        import torch

        starts = {"min": float("inf"), "max": float("-inf")}
        with torch.inference_mode(False):
            for name in self.fields - {"rows", "first_rows"} | {"min", "max"}:  # the extremes also show NaN and Inf
                wide = torch.float32 if name in ("min", "max", "first_abs_max", "hessian") else torch.float64
                shape = (channels, channels) if name == "hessian" else (channels,)
                self.values[name] = torch.full(shape, starts.get(name, 0.0), dtype=wide, device=device)

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
        count, length, channels = sequences.shape
        self.tokens += count * length
        self.sequences += 0 if self.routed else count
        elements = CHUNK_ELEMENTS if sequences.device.type == "cpu" else CHUNK_ELEMENTS_DEVICE
        for some in sequences.split(max(1, elements // (length * channels))):
            for piece in some.split(max(1, elements // channels), dim=1):
                self._add_piece(piece.float(), length)

    def _add_piece(self, x: torch.Tensor, length: int) -> None:
        """Add [S, T, K] float32: some sequences, or a piece of one that has `length` tokens."""
        rows = x.flatten(0, 1)
        low, high = rows.amin(0), rows.amax(0)  # aminmax along the rows is 5 times slower than both
        self._keep("min", low)
        self._keep("max", high)
        self._add_powers(rows)
        if self.fields & {"count_large", "sequence_large"} and float((-low).maximum(high).max()) >= LARGE:
            hits = (x.abs() >= LARGE).sum(1).double().sum(0)
            for name, per in (("count_large", 1), ("sequence_large", length)):
                if name in self.fields:
                    self.values[name] += hits / per

    def _add_powers(self, x: torch.Tensor) -> None:
        """Power sums of [N, K] float32."""
        square = x * x if self.fields & {"sum_sq", "sum_cube", "sum_fourth"} else None
        terms = {
            "sum_x": lambda: x,
            "sum_abs": x.abs,
            "sum_sq": lambda: square,
            "sum_cube": lambda: square * x,
            "sum_fourth": lambda: square * square,
        }
        for name, term in terms.items():
            if name in self.fields:
                self.values[name] += term().sum(0)

    def finish(self) -> InputStats:
        """The statistics; the running sums must not be used afterwards."""
        import torch

        if not self.tokens:
            raise StatsError(
                f"{self.name} saw no tokens during calibration",
                hint="calibrate on more text, or add this site to `ignore`",
            )
        kept = self.fields - set(POSITIONAL if self.routed else ())
        values = {name: value for name, value in self.values.items() if name in kept}
        if "hessian" in values:
            from outlierq.ops.gram import mirror

            values["hessian"] = mirror(values["hessian"]).div_(self.tokens)
        if self.rows:
            values["rows"] = self.rows.finish()
        if self.first and "first_rows" in kept:
            values["first_rows"] = torch.cat(self.first)
        return InputStats(self.tokens, self.sequences, **values)


class _Reservoir:
    """A uniform sample of rows: every row draws a number, and the rows with the smallest numbers stay."""

    def __init__(self, size: int, seed: int):
        import torch

        self.size = size
        self.generator = torch.Generator().manual_seed(seed)
        self.drawn = torch.empty(0)
        self.kept: torch.Tensor | None = None

    def add(self, rows: torch.Tensor) -> None:
        """Offer rows [N, K]."""
        import torch

        drawn = torch.cat([self.drawn, torch.rand(rows.shape[0], generator=self.generator)])
        chosen = drawn.argsort()[: self.size].sort().values  # in the order in which the rows came
        old = chosen[chosen < len(self.drawn)]
        new = chosen[chosen >= len(self.drawn)] - len(self.drawn)
        fresh = rows[new.to(rows.device)].to("cpu", torch.bfloat16)
        self.kept = fresh if self.kept is None else torch.cat([self.kept[old], fresh])
        self.drawn = drawn[chosen]

    def finish(self) -> torch.Tensor:
        """[R, K] bfloat16, in the order of the tokens."""
        return self.kept.clone()
