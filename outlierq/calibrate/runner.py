"""Running a model one block at a time: what a block receives is recorded, not rebuilt.

The model runs once per batch with every block replaced by a stub that notes its arguments and hands the hidden states
on. From then on each block can run alone, on hidden states kept in memory or in a mapped file. A container that blocks
share to hand each other more than hidden states (the keys and values of Gemma 4) is kept for each batch, so such a
block can only run after the ones before it.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar, cast

from outlierq.calibrate.experts import routing
from outlierq.calibrate.rounding import rounding_inputs
from outlierq.core.errors import NumbersError, OutputError, SourceError, during
from outlierq.core.forward import StopForward, forward_of, head_of, several_rounds, stopping_at_head
from outlierq.core.masking import sees_later_tokens

if TYPE_CHECKING:
    import torch

    from outlierq.calibrate.collect import Collector
    from outlierq.calibrate.trace import RunOnce
    from outlierq.core.model import Structure
    from outlierq.core.scheme import ActivationScheme

T = TypeVar("T")
Returned: TypeAlias = "torch.Tensor | tuple[Any, ...] | list[Any]"  # by the code of a block
SPILL_BYTES = 4 << 30
# Tokens of the probe run. Twice as many than the 16 at which torch switches kernels, and still cheap on every block.
PROBE_TOKENS = 32

PLAIN = (bool, int, float, str, bytes)

Progress = Callable[[float], None]
Inputs: TypeAlias = "Mapping[str, torch.Tensor]"


class Handed(int):
    """Stands among the arguments of a block for the value of that number in what the block before it returned."""


@dataclass(frozen=True)
class Call:
    """What a block is called with beside the hidden states: positional arguments after them, and keyword arguments.

    name: the keyword of the hidden states, None when they are the first positional argument. added: what the model
    adds to the hidden states before the block, [sequences, tokens, H]: features of images that enter late.
    """

    after: tuple[Any, ...]
    keyword: dict[str, Any]
    name: str | None
    added: torch.Tensor | None = None

    @property
    def shared(self) -> list[UserDict[Any, Any]]:
        """Containers that blocks write for each other; they are passed on as they are, not copied."""
        return [value for value in (*self.after, *self.keyword.values()) if isinstance(value, UserDict)]

    @property
    def takes_over(self) -> bool:
        """Whether an argument is what the block before returned beside the hidden states."""
        return _holds((self.after, self.keyword), Handed)

    def run(
        self, module: torch.nn.Module, hidden: torch.Tensor, dtype: torch.dtype, before: Sequence[Any] = ()
    ) -> Returned:
        """What the module returns, with hidden states in the shape of `hidden` in it (`hidden_of`).

        Floating-point arguments are given in `dtype`. before: what the block before returned, for a call that
        `takes_over`.
        """

        def cast(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        for shared in self.shared:
            shared.update({key: _map_tensors(value, cast) for key, value in shared.items()})
        after, keyword = _map_kind((self.after, self.keyword), Handed, lambda number: before[number])
        after, keyword = _map_tensors((after, keyword), cast)
        if self.added is not None:
            hidden = hidden + self.added.to(hidden)
        named = {} if self.name is None else {self.name: hidden}
        returned: Returned = module(*(() if named else (hidden,)), *after, **named, **keyword)
        return returned


class Spill(NamedTuple):
    """Where hidden states go that are larger than `above` bytes: a mapped file in the folder."""

    folder: str | Path
    above: int = SPILL_BYTES


class HiddenStates:
    """Hidden states of all sequences between two blocks, read and replaced by batch.

    They are kept as [sequences, ...] and given in the model's own shape, mostly [sequences, tokens, channels]: in some
    models there are several streams, before the sequences or behind the tokens.
    They are in memory, or in a mapped file of which only the batch in use is resident; see `Spill`.
    The file has no name any more once it is mapped, so nothing is left behind by a run that was killed.
    inputs: how linears round theirs while these states pass, by module.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        batch_size: int,
        *,
        spill: Spill | None = None,
        sequence_axis: int = 0,
    ):
        import torch

        size = prod(shape)
        self.batch_size, self.sequence_axis = batch_size, sequence_axis
        self.inputs: Mapping[str, ActivationScheme] = {}
        self.spilled = spill is not None and size * dtype.itemsize > spill.above
        self._map = _mapped(Path(spill.folder), size * dtype.itemsize) if spill and self.spilled else None
        if self._map is None:
            self.values = torch.empty(shape, dtype=dtype)
        else:
            self.values = torch.frombuffer(self._map, dtype=dtype).view(shape)

    def copied(self, spill: Spill) -> HiddenStates:
        """The same values in memory, or a file, of their own."""
        copy = HiddenStates(
            tuple(self.values.shape), self.values.dtype, self.batch_size, spill=spill, sequence_axis=self.sequence_axis
        )
        for batch in range(len(self)):
            copy.write(batch, self[batch])
            self.done_with(batch)
            copy.done_with(batch)
        return copy

    def __len__(self) -> int:
        """Number of batches."""
        return -(-self.values.shape[0] // self.batch_size)

    def __getitem__(self, batch: int) -> torch.Tensor:
        """A view of batch number `batch`, in the model's shape; the last batch may be smaller."""
        return self._kept(batch).movedim(0, self.sequence_axis)

    def _kept(self, batch: int) -> torch.Tensor:
        """The memory of one batch, [sequences, ...]."""
        if not 0 <= batch < len(self):
            raise IndexError(f"batch {batch} of {len(self)}")
        return self.values[batch * self.batch_size : (batch + 1) * self.batch_size]

    def write(self, batch: int, values: torch.Tensor) -> None:
        """Replace the hidden states of one batch."""
        self[batch].copy_(values)

    def done_with(self, batch: int) -> None:
        """Nobody needs this batch for now: what is spilled need not stay resident. Its values are not lost."""
        if self._map is not None:
            stride = self.values[:1].nbytes * self.batch_size
            start = batch * stride // mmap.PAGESIZE * mmap.PAGESIZE
            stop = min((batch + 1) * stride, self.values.nbytes)
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write them to a safetensors file, batch by batch, and force it onto the disk."""
        name, nbytes = {"torch.bfloat16": "BF16", "torch.float32": "F32"}[str(self.values.dtype)], self.values.nbytes
        info = {"dtype": name, "shape": [*self.values.shape], "data_offsets": [0, nbytes]}
        header = json.dumps({"__metadata__": dict(metadata), "hidden": info}).encode()
        header += b" " * (-len(header) % 8)
        with open(path, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for batch in range(len(self)):
                file.write(self._bytes(batch))
                self.done_with(batch)
            file.flush()
            os.fsync(file.fileno())

    def load(self, path: Path) -> None:
        """Take the values of a file that `save` wrote for hidden states of this shape."""
        with open(path, "rb", buffering=0) as file:
            file.seek(8 + int.from_bytes(file.read(8), "little"))
            for batch in range(len(self)):
                left = self._bytes(batch)
                while left:
                    count = file.readinto(left)
                    if not count:
                        raise OutputError(f"{path} is cut off", hint="delete it and run the same command again")
                    left = left[count:]
                self.done_with(batch)

    def _bytes(self, batch: int) -> memoryview:
        """The memory of one batch."""
        import torch

        return self._kept(batch).view(-1).view(torch.uint8).numpy().data


class Originals(NamedTuple):
    """The same tokens in the original model, and whether a block's outputs replace its inputs there."""

    states: HiddenStates
    replace: bool = True


def _mapped(folder: Path, nbytes: int) -> mmap.mmap:
    """A new mapped file without a name."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            # A disk that is full later would end the process without a word.
            os.posix_fallocate(file.fileno(), 0, nbytes)
            return mmap.mmap(file.fileno(), nbytes)
    except OSError as error:
        raise OutputError(
            f"the hidden states of the calibration text need {nbytes:,} bytes in {folder}: {error.strerror or error}",
            hint="free some space, or calibrate on less text",
        ) from error


@dataclass
class _Record:
    """The calls of one block: each different call once, and which of them each batch made."""

    calls: list[Call | None] = field(default_factory=list)
    of_batch: list[int] = field(default_factory=list)
    probe: Call | None = None

    def add(self, call: Call | None) -> None:
        """Note the call of the next batch; None where the model passes the block over."""
        for number, known in enumerate(self.calls):
            if _same(known, call):
                self.of_batch.append(number)
                return
        self.calls.append(call)
        self.of_batch.append(len(self.calls) - 1)


class PartWeights(NamedTuple):
    """Gives the weights to the block of a name and takes them away; the empty name is what is outside of the blocks."""

    materialise: Callable[[str], Any]
    release: Callable[[str], Any]


class BlockRunner:
    """Runs the blocks of a model one by one on the hidden states of a token set.

    model: the skeleton. dtype: in which blocks run (their weights, too, must have it). spill: where large hidden states
    go; without it they stay in memory.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        structure: Structure,
        weights: PartWeights,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        batch_size: int = 8,
        spill: Spill | None = None,
    ):
        import torch

        self.model, self.structure, self.weights = model, structure, weights
        self.device, self.dtype, self.batch_size = torch.device(device), dtype or torch.bfloat16, batch_size
        self.spill = spill
        self._records: list[_Record] = []
        self._known: dict[tuple[Any, ...], list[torch.Tensor]] = {}
        self._probe_shape: tuple[int, ...] = ()  # of the hidden states of one short sequence
        self._sequence_axis = 0
        self._wrap = Wrap()
        self._given: Inputs = {}  # what the model gets beside the tokens of the batch at hand
        self._returned: dict[tuple[int, int], Sequence[Any]] = {}  # by block and batch, where the next block takes it

    def start(
        self,
        ids: torch.Tensor,
        *,
        inputs: Sequence[Inputs] = (),
        progress: Progress | None = None,
        whole: bool = False,
    ) -> HiddenStates:
        """Record what every block receives and return the hidden states that enter the first one.

        ids: LongTensor [sequences, tokens]. inputs: what the model gets beside the tokens of each sequence (its
        images), by argument; then a batch must be one sequence. whole: run the model past its last block, too, to see
        whether it comes back to the first. SourceError when the model does not hand hidden states from block to block,
        or does come back.
        """
        import torch

        self._records = [_Record() for _ in self.structure.blocks]
        self._known = {}
        batches = ids.split(self.batch_size)
        hidden: HiddenStates | None = None
        self.model.eval()
        self.weights.materialise("")
        try:
            # Not inference_mode: recorded arguments may later take part in a forward with gradients.
            with torch.no_grad(), self._stubs() as stubs:
                self._given = inputs[0] if inputs else {}
                probed = ids[:1] if inputs else ids[:1, :PROBE_TOKENS]  # no image is cut
                self._wrap = self._probe(probed, stubs)
                self._sequence_axis = self._find_sequences(probed, stubs)
                if whole:
                    self._check_called_once(probed, stubs)
                for number, batch in enumerate(batches):
                    self._given = inputs[number] if inputs else {}
                    first = self._record(batch, stubs, self._wrap)
                    if hidden is None:
                        hidden = self._hidden_states(len(ids), first.shape)
                    hidden.write(number, first)
                    hidden.done_with(number)
                    if progress:
                        progress((number + 1) / len(batches))
        finally:
            self._given = {}
            self.weights.release("")
        assert hidden is not None, "there are no sequences"
        return hidden

    def sees_later_tokens(self, ids: torch.Tensor) -> bool:
        """Whether the first block lets tokens see later ones. ids: of one short sequence, [1, tokens]."""
        import torch

        name = self.structure.blocks[0].name
        for part in ("", name):
            self.weights.materialise(part)
        try:
            with torch.no_grad(), self._stubs() as stubs:
                stubs[0].run_real = True

                def first_block(ids: torch.Tensor) -> torch.Tensor:
                    self._forward_model(ids)
                    return hidden_of(stubs[0].returned, stubs[0].module)

                return sees_later_tokens(first_block, ids)
        finally:
            for part in ("", name):
                self.weights.release(part)

    def run(
        self,
        block_module: torch.nn.Module,
        index: int,
        hidden: HiddenStates,
        collect: Collector | None = None,
        *,
        replace: bool = True,
        originals: Originals | None = None,
        progress: Progress | None = None,
    ) -> HiddenStates:
        """Run block `index` over all batches; `hidden` then holds its outputs (unless `replace` is off).

        collect: sees the inputs of the block's sites on the way. originals: the same tokens in the original model,
        which run before each batch, for a collector of pairs.
        NumbersError when the output is not finite.
        """
        import torch

        name = self.structure.blocks[index].name
        with torch.inference_mode(), during("calibrate", name), collect or nullcontext():
            for batch in range(len(hidden)):
                if originals is not None:
                    with collect.of_original() if collect else nullcontext():
                        self._step(block_module, index, batch, originals.states, replace=originals.replace)
                self._step(block_module, index, batch, hidden, replace=replace)
                if progress:
                    progress((batch + 1) / len(hidden))
        return hidden

    def _step(self, module: torch.nn.Module, index: int, batch: int, hidden: HiddenStates, *, replace: bool) -> None:
        """Run block `index` on one batch of hidden states, which its output replaces if asked. NumbersError."""
        with self.rounding(module, index, hidden):
            output = self.forward(module, index, batch, hidden[batch])
        if not output.isfinite().all():
            bad, name = int((~output.isfinite()).sum()), self.structure.blocks[index].name
            raise NumbersError(
                f"{bad} of {output.numel()} outputs of {name} are NaN or Inf in batch {batch}",
                hint="run in bfloat16 or float32: float16 overflows above 65504",
            )
        if replace:
            hidden.write(batch, output)
        hidden.done_with(batch)

    def rounding(self, module: torch.nn.Module, index: int, hidden: HiddenStates) -> AbstractContextManager[None]:
        """Inside, linears of block `index`, which `module` is, round their inputs as these hidden states ask for."""
        inside = (site.module for site in self.structure.blocks[index].sites if site.module in hidden.inputs)
        return rounding_inputs(module, {name: hidden.inputs[name] for name in inside})

    def forward(
        self,
        block_module: torch.nn.Module,
        index: int,
        batch: int,
        hidden: torch.Tensor,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Output hidden states of block `index` for one batch of the token set; gradients flow if they are enabled.

        hidden: of that batch, in the model's shape. It is copied: some blocks add to their input in place. dtype: in
        which the block runs, as its weights are; the usual one when left out.
        """
        call, dtype = self._call(index, batch), dtype or self.dtype
        if call is None:
            return hidden.to(self.device, dtype)
        with forward_of(self.model, "calibrate"):
            before = self._before(index, batch, call)
            output = call.run(block_module, hidden.to(self.device, dtype, copy=True), dtype, before)
        self._keep(index, batch, output)
        return hidden_of(output, block_module)

    @property
    def hands_more(self) -> bool:
        """Whether blocks get more from those before them than hidden states; `start` must have run.

        Then none can run whose predecessors have not.
        """
        calls = [call for record in self._records for call in record.calls if call is not None]
        return any(call.shared or call.takes_over for call in calls)

    def _call(self, index: int, batch: int) -> Call | None:
        """What block `index` is called with for a batch; None where the model passes it over."""
        record = self._records[index]
        return record.calls[record.of_batch[batch]]

    def _before(self, index: int, batch: int, call: Call) -> Sequence[Any]:
        """What the block before returned for a batch, if the call takes any of it over."""
        if not call.takes_over:
            return ()
        if (index - 1, batch) not in self._returned:
            name = self.structure.blocks[index].name
            raise SourceError(f"{name} takes over what the block before it returned, and that has not run")
        return self._returned[index - 1, batch]

    def _keep(self, index: int, batch: int, output: Any) -> None:
        """Keep what a block returned for a batch, if the next one takes any of it over; what is older goes."""
        self._returned.pop((index - 2, batch), None)
        call = self._call(index + 1, batch) if index + 1 < len(self._records) else None
        if call is not None and call.takes_over:
            self._returned[index, batch] = (None, *_map_tensors(output[1:], lambda tensor: tensor.detach()))

    def passes_over(self, index: int) -> bool:
        """Whether the model does not run block `index` for these tokens, but later ones: it may look at images only.

        `start` must have run. That the hidden states reach the next block as they are was seen there.
        """
        return self._records[index].probe is None

    @property
    def hands_on_more(self) -> bool:
        """Whether blocks write containers for each other beside hidden states: they then have one run at a time."""
        return any(call is not None and call.shared for record in self._records for call in record.calls)

    def run_once(self, index: int, hidden: HiddenStates, *, seed: int = 0) -> RunOnce:
        """A function that runs a module in the place of block `index` on one short random sequence.

        All experts of a mixture take part (`experts.routing`).
        The input is normal noise with the spread of the real hidden states (median of |x|). Noise, because the few huge
        channels of real hidden states would hide the block's own contribution in the relative error of its output.
        """
        import torch

        call = self._records[index].probe
        assert call is not None, "`start` must have run"
        sample, shape = hidden[0].float(), self._probe_shape
        if call.takes_over:  # what it takes over is there for whole batches only
            call, shape = self._call(index, 0) or call, tuple(sample.shape)
        before = self._before(index, 0, call)
        spread = sample.abs().median().clamp_min(1e-3) / 0.6745  # the median of |x| of a standard normal
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread

        def run(module: torch.nn.Module) -> torch.Tensor:
            # Some parameters are in float32 whatever the dtype of the model.
            dtype = min((part.dtype for part in module.parameters()), key=lambda dtype: dtype.itemsize)
            with torch.no_grad(), routing(module, "probe"), forward_of(self.model, "calibrate"):
                return hidden_of(call.run(module, noise.to(self.device, dtype, copy=True), dtype, before), module)

        return run

    @contextmanager
    def tail(self, ids: torch.Tensor, hidden: HiddenStates) -> Iterator[Callable[..., torch.Tensor]]:
        """Inside, what follows the blocks can be run: a function from a batch and places in it to logits [n, vocab].

        ids: [sequences, tokens] of the token set. hidden: the outputs of the last block. places: [n, 2], sequence in
        the batch and position; only they go through the output head. A third argument stands for the hidden states of
        the batch, in their shape, and gradients flow to it. `start` must have run. SourceError when the model has no
        logits.
        """
        import torch

        batches = ids.split(self.batch_size)
        self.weights.materialise("")
        try:
            with self._stubs() as stubs:
                stubs[-1].is_last = False
                for stub in stubs:
                    stub.reset(self._wrap)

                def logits_at(batch: int, places: torch.Tensor, states: torch.Tensor | None = None) -> torch.Tensor:
                    plain = states is None
                    stubs[0].given = hidden[batch].to(self.device, self.dtype, copy=True) if plain else states
                    rows, columns = places.to(self.device).unbind(1)
                    with (
                        torch.inference_mode() if plain else torch.enable_grad(),
                        _heads_input_at(self.model, rows, columns),
                        forward_of(self.model, "calibrate"),
                    ):
                        output = self.model(input_ids=batches[batch].to(self.device), use_cache=False)
                    logits: torch.Tensor | None = getattr(output, "logits", None)
                    if logits is None:
                        raise SourceError(f"{type(self.model).__name__} returns no logits")
                    return logits[rows, columns] if logits.shape[:2] == batches[batch].shape else logits[0]

                yield logits_at
        finally:
            self.weights.release("")

    def _hidden_states(self, sequences: int, shape: Sequence[int]) -> HiddenStates:
        """Room for the hidden states of the whole token set. shape: those of a batch."""
        axis = self._sequence_axis
        rest = (size for number, size in enumerate(shape) if number != axis)
        return HiddenStates((sequences, *rest), self.dtype, self.batch_size, spill=self.spill, sequence_axis=axis)

    @contextmanager
    def _stubs(self) -> Iterator[list[_Stub]]:
        """Put a stub in the place of every block's forward; models may read other attributes of their blocks."""
        modules = [self.model.get_submodule(block.name) for block in self.structure.blocks]
        stubs = [_Stub(module) for module in modules]
        stubs[-1].is_last = True
        try:
            for module, stub in zip(modules, stubs, strict=True):
                module.forward = stub
            yield stubs
        finally:
            for module in modules:
                module.__dict__.pop("forward", None)

    def _forward_model(self, ids: torch.Tensor) -> None:
        """Run the model until a stub stops it."""
        try:
            with forward_of(self.model, "calibrate"):
                given = {name: self._placed(value) for name, value in self._given.items()}
                self.model(input_ids=ids.to(self.device), use_cache=False, **given)
        except StopForward:
            return

    def _placed(self, value: torch.Tensor) -> torch.Tensor:
        """An input on the device, in the dtype of the weights if it is one of numbers."""
        return value.to(self.device, self.dtype if value.is_floating_point() else None)

    def _probe(self, ids: torch.Tensor, stubs: list[_Stub]) -> Wrap:
        """What blocks put around the hidden states they return, seen by running the first one.

        Also records the call of every block on this one short sequence.
        """
        name = self.structure.blocks[0].name
        self.weights.materialise(name)
        try:
            stubs[0].run_real = True
            self._forward_model(ids)
        finally:
            stubs[0].run_real = False
            self.weights.release(name)
        self._probe_shape = tuple(self._record(ids, stubs, stubs[0].wrap, probe=True).shape)
        return stubs[0].wrap

    def _find_sequences(self, ids: torch.Tensor, stubs: list[_Stub]) -> int:
        """Along which axis of the hidden states sequences lie: that which is twice as long for two of them.

        ids: of one short sequence, whose hidden states were seen. SourceError when there is no such axis.
        """
        if self._probe_shape[:2] == tuple(ids.shape):
            return 0
        for stub in stubs:
            stub.reset(self._wrap)
        self._forward_model(ids.repeat(2, 1))
        twice = stubs[0].received
        one, two = self._probe_shape, () if twice is None else tuple(twice.shape)
        axes = [axis for axis, sizes in enumerate(zip(one, two, strict=False)) if sizes == (1, 2)]
        changed = [axis for axis, sizes in enumerate(zip(one, two, strict=False)) if sizes[0] != sizes[1]]
        if len(one) != len(two) or axes != changed or len(axes) != 1 or one[-1] < 2:
            raise SourceError(
                f"the blocks of the model take hidden states {list(one)} for tokens {list(ids.shape)}, and {list(two)} "
                "for twice as many sequences: which belongs to which sequence is not known",
                hint="use a recipe that needs no calibration, such as rtn-w4 or rtn-w8",
            )
        return axes[0]

    def _check_called_once(self, ids: torch.Tensor, stubs: list[_Stub]) -> None:
        """SourceError when a block runs more than once in a forward: statistics would be of its first round only."""
        for stub in stubs:
            stub.calls = 0
        stubs[-1].is_last = False
        try:
            with stopping_at_head(self.model):
                self._forward_model(ids)
        finally:
            stubs[-1].is_last = True
        for block, stub in zip(self.structure.blocks, stubs, strict=True):
            if stub.calls > 1:
                raise several_rounds(self.model, block.name, stub.calls)

    def _record(self, ids: torch.Tensor, stubs: list[_Stub], wrap: Wrap, *, probe: bool = False) -> torch.Tensor:
        """One forward of the model with stubs; notes every block's call and returns the first hidden states."""
        for stub in stubs:
            stub.reset(wrap, copies=bool(self._given))
        self._forward_model(ids)
        first = stubs[0].received
        if first is None:
            raise SourceError(f"the model does not call its block {self.structure.blocks[0].name}")
        called = [number for number, stub in enumerate(stubs) if stub.call is not None]
        if called[-1] + 1 < len(stubs):
            raise SourceError(f"the model does not call its block {self.structure.blocks[called[-1] + 1].name}")
        met: dict[int, torch.Tensor] = {}
        calls = [stub.call for stub in stubs]
        for record, call, added in zip(self._records, calls, self._added(ids, stubs, first), strict=True):
            call = None if call is None else self._intern(replace(call, added=added), met)
            if probe:
                record.probe = call
            else:
                record.add(call)
        return first.to(self.dtype)

    def _added(self, ids: torch.Tensor, stubs: list[_Stub], first: torch.Tensor) -> list[torch.Tensor | None]:
        """What the model adds to the hidden states before each block; `stubs` hold what one forward noted.

        Features of images may enter late. SourceError when the hidden states change in another way.
        """
        received = [stub.received for stub in stubs]
        added: list[torch.Tensor | None] = [None] * len(stubs)
        if self._given and not all(part is None or _equal(part, first) for part in received):
            added = self._received_after_zeros(ids, stubs)
        before = first
        for block, part, more in zip(self.structure.blocks, received, added, strict=True):
            if part is None:
                continue
            if part is not before and not _equal(part, before if more is None else before + more):
                raise SourceError(f"the model changes the hidden states between its blocks, before {block.name}")
            before = part
        return [None if more is None or not more.any() else more for more in added]

    def _received_after_zeros(self, ids: torch.Tensor, stubs: list[_Stub]) -> list[torch.Tensor | None]:
        """What each block but the first receives where those before it return zeros: what was added in between."""
        for stub in stubs:
            stub.reset(stub.wrap, copies=True)
            stub.zeros = True
        self._forward_model(ids)
        for stub in stubs:
            stub.zeros = False
        return [None, *(stub.received for stub in stubs[1:])]

    def _intern(self, call: Call, met: dict[int, torch.Tensor]) -> Call:
        """The call with every tensor replaced by an equal one that is known, so that each is kept once.

        met: by identity, what each tensor of this forward was replaced by; blocks mostly get the same objects.
        """

        def known(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in met:
                alike = self._known.setdefault(_end(tensor), [])
                equal = next((other for other in alike if _equal(other, tensor)), None)
                if equal is None:
                    alike.append(tensor)
                met[id(tensor)] = tensor if equal is None else equal
            return met[id(tensor)]

        after, keyword, added = _map_tensors((call.after, call.keyword, call.added), known)
        return Call(after, keyword, call.name, added)


@dataclass(frozen=True)
class Wrap:
    """What blocks put around the hidden states they return: nothing, or a tuple or list that they come first in.

    marks: of what comes after them, an empty tensor in the place of each tensor, None for everything else.
    """

    kind: type | None = None
    marks: tuple[torch.Tensor | None, ...] = ()

    @classmethod
    def of(cls, output: Any) -> Wrap:
        """As in this output of a block."""
        import torch

        if not isinstance(output, tuple | list):
            return cls()
        more = (torch.empty(0) if isinstance(value, torch.Tensor) else None for value in output[1:])
        return cls(type(output), tuple(more))

    def put(self, hidden: torch.Tensor) -> Returned:
        """Hidden states of any shape as a block would return them, with the marks of what else it returns."""
        return hidden if self.kind is None else self.kind([hidden, *self.marks])

    def marked(self, call: Call) -> Call:
        """The call, numbers of what the block before returned in the place of the marks among its arguments."""
        numbers = {id(mark): Handed(number) for number, mark in enumerate(self.marks, start=1) if mark is not None}
        after, keyword = _map_tensors((call.after, call.keyword), lambda tensor: numbers.get(id(tensor), tensor))
        return replace(call, after=after, keyword=keyword)


class _Stub:
    """Stands for a block's forward: notes its arguments and returns the hidden states it got, or those in `given`.

    zeros: returns zeros instead.
    """

    def __init__(self, module: torch.nn.Module):
        self.module, self.forward = module, module.forward
        self.is_last = self.run_real = self.copies = self.zeros = False
        self.calls = 0
        self.wrap = Wrap()
        self.received: torch.Tensor | None = None
        self.given: torch.Tensor | None = None
        self.returned: Returned | None = None
        self.call: Call | None = None

    def reset(self, wrap: Wrap, *, copies: bool = False) -> None:
        """Forget what was noted. copies: hand on a copy, for models that write into what a block returned."""
        self.copies = copies
        self.wrap, self.received, self.call, self.calls = wrap, None, None, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Returned:
        """What the model's code calls instead of the block."""
        self.received, call = _split(args, kwargs)
        self.call = self.wrap.marked(call)
        self.calls += 1
        if self.run_real:
            self.returned = self.forward(*args, **kwargs)
            self.wrap = Wrap.of(self.returned)
            raise StopForward
        if self.is_last:
            raise StopForward
        hidden = self.received if self.given is None else self.given
        if self.zeros:
            hidden = hidden.new_zeros(hidden.shape)
        return self.wrap.put(hidden.clone() if self.copies else hidden)


@contextmanager
def _heads_input_at(model: torch.nn.Module, rows: torch.Tensor, columns: torch.Tensor) -> Iterator[None]:
    """Inside, the output head gets only these tokens, as [1, n, channels]; a model without one runs as it is."""
    head = head_of(model)

    def at_places(part: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args[0][rows, columns][None], *args[1:]

    handle = None if head is None else head.register_forward_pre_hook(at_places)
    try:
        yield
    finally:
        if handle:
            handle.remove()


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, Call]:
    """The hidden states and all other arguments of a call."""
    if args:
        return args[0], Call(args[1:], kwargs, None)
    name = next((name for name in ("hidden_states", "x", "hidden_state") if name in kwargs), None)
    if name is None:
        raise SourceError(f"a block is called without hidden states; it gets {sorted(kwargs)}")
    return kwargs[name], Call((), {key: value for key, value in kwargs.items() if key != name}, name)


def hidden_of(output: Any, module: torch.nn.Module) -> torch.Tensor:
    """The hidden states [sequences, tokens, H] in what a block returned."""
    import torch

    hidden = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(hidden, torch.Tensor):
        raise SourceError(f"{type(module).__name__} returns {type(output).__name__}, not hidden states")
    return hidden


def _map_tensors(value: T, function: Callable[[torch.Tensor], Any]) -> T:
    """The same nest of tuples, lists and dicts with every tensor replaced by `function` of it."""
    import torch

    return _map_kind(value, torch.Tensor, function)


def _map_kind(value: T, kind: type, function: Callable[[Any], Any]) -> T:
    """The same nest of tuples, lists and dicts with everything of a kind replaced by `function` of it."""
    mapped: object = value
    if isinstance(value, kind):
        mapped = function(value)
    elif isinstance(value, dict):
        mapped = {key: _map_kind(item, kind, function) for key, item in value.items()}
    elif isinstance(value, tuple | list) and type(value) in (tuple, list):
        mapped = type(value)(_map_kind(item, kind, function) for item in value)
    return cast("T", mapped)


def _holds(value: object, kind: type) -> bool:
    """Whether a nest of tuples, lists and dicts holds something of a kind."""
    if isinstance(value, dict):
        return _holds(list(value.values()), kind)
    if isinstance(value, tuple | list):
        return any(_holds(item, kind) for item in value)
    return isinstance(value, kind)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Same shape, dtype and values."""
    import torch

    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def _end(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Shape, dtype and a few last values: equal for equal tensors, and cheap to look up."""
    last = tensor[(-1,) * (tensor.dim() - 1)] if tensor.dim() > 1 and tensor.numel() else tensor
    return tuple(tensor.shape), tensor.dtype, tuple(last.reshape(-1)[-8:].tolist())


def _same(one: Any, other: Any) -> bool:
    """Whether two calls hold the same values; their tensors are interned, so identity is enough for those."""
    import torch

    if isinstance(one, Call) and isinstance(other, Call):
        same = one.name == other.name and one.added is other.added
        return same and _same(one.after, other.after) and _same(one.keyword, other.keyword)
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if type(one) in (tuple, list) and type(one) is type(other):
        return len(one) == len(other) and all(map(_same, one, other))
    # Two containers that are equal now, because empty, will not be when blocks have written to them.
    return one is other or (isinstance(one, PLAIN) and one == other)
