"""Who reads and writes the residual stream of a model, and where values pass: found by running it on random weights.

Candidates come from a traced forward of each kind of block: linears that read a norm's output read the stream, other
linears of its width write it. They are proved by rotating them: the block must give the rotated output for the rotated
input. Nothing is listed by architecture, and no weight is read; the real weights are proved when the run starts
(`pipeline/remodel/rewrite.py`).
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch

from outlierq.calibrate.experts import routing
from outlierq.calibrate.folds import prove_folds
from outlierq.calibrate.groups import find_groups
from outlierq.calibrate.runner import PROBE_TOKENS, BlockRunner, HiddenStates, PartWeights
from outlierq.calibrate.trace import Trace, trace_block
from outlierq.core.errors import RecipeError, SourceError
from outlierq.core.model import Block, Checkpoint, InputGroup, LinearSite, StudiedModel, TensorSource, largest
from outlierq.core.move import UNCHANGED
from outlierq.core.windows import embedding_rows
from outlierq.load import load_tensors_into, release, study
from outlierq.transform.rotate import Anatomy, GainPath, Norm, Rewrite, ScalePath, ValuePath, rotate

# Rows of embeddings and head that take part in proofs; the same code treats every row, and 128 k of them are 4 GB.
Kind = tuple[type, tuple[str, ...], tuple[tuple[str, tuple[int, ...]], ...]]  # see `kind_of`
ROWS = 4096
MIN_CONTROL = 1e-3
STREAM = "residual stream"
Path = TypeVar("Path", ValuePath, ScalePath)


@dataclass(frozen=True)
class Weights:
    """Where a model's tensors come from. names: parameter -> tensor. read: a tensor by name, or its first rows."""

    names: Mapping[str, str]
    read: Callable[[str, int | None], torch.Tensor]

    def rewritten(self, rewrite: Rewrite) -> Weights:
        """The same with the changes of a rewrite, in float32."""
        names = dict(self.names)
        if rewrite.untied:
            head, _ = rewrite.untied
            names[head] = head

        def read(name: str, rows: int | None) -> torch.Tensor:
            change = rewrite.changes.get(name)
            if change is None:
                return self.read(name, rows)

            def cut(source: str) -> torch.Tensor:
                """What is read besides the tensor itself (a norm, a weight) must be whole."""
                return self.read(source, rows if source == change.source else None)

            return change.apply(cut, torch.float32, rows=rows)

        return Weights(names, read)


@dataclass(frozen=True)
class _Reader(TensorSource):
    """Weights of which only some rows of embeddings and head are read."""

    weights: Weights
    tall: frozenset[str]
    dtype = "float32"

    def read(self, name: str) -> torch.Tensor:
        """The tensor, or its first rows."""
        return self.weights.read(name, ROWS if name in self.tall else None)


class Bench:
    """Runs a model part by part in float32 with weights from anywhere: before the blocks, one block, after them."""

    def __init__(self, model: StudiedModel):
        self.model, self.structure = copy.deepcopy(model.skeleton), model.structure
        self.weights: Weights | None = None
        tables = {name: part for name, part in self.model.named_modules() if isinstance(part, torch.nn.Embedding)}
        for part in tables.values():
            part.padding_idx = None  # it may lie beyond the rows that are kept, and counts only in training
        self.tables = [f"{name}.weight" for name in tables if not self.block_of(name)]
        self.head = self._head()
        rows = min(ROWS, embedding_rows(self.model) or ROWS)
        self.ids = torch.randint(0, rows, (2, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
        self.runner = BlockRunner(
            self.model,
            self.structure,
            PartWeights(self.fill, lambda name: release(self.model.get_submodule(name) if name else self.model)),
            dtype=torch.float32,
            batch_size=len(self.ids),
        )

    def _head(self) -> str:
        """Name of the output head, empty when there is none."""
        head = self.model.get_output_embeddings()
        return next((name for name, part in self.model.named_modules() if part is head), "")

    def block_of(self, name: str) -> Block | None:
        """The block that the module of that name lies in."""
        return next((b for b in self.structure.blocks if f"{name}.".startswith(f"{b.name}.")), None)

    def fill(self, name: str) -> None:
        """Give a block (or, for the empty name, everything else) its weights."""
        assert self.weights is not None, "`before`, `block` and `after` say whose weights"
        names = self.weights.names
        tall = frozenset(names[slot] for slot in (*self.tables, f"{self.head}.weight") if slot in names)
        part = self.model.get_submodule(name) if name else self.model
        skip = () if name else [block.name for block in self.structure.blocks]
        load_tensors_into(part, _Reader(self.weights, tall), names, prefix=name, skip=skip)

    def before(self, weights: Weights) -> torch.Tensor:
        """The hidden states that enter the first block, [sequences, tokens, channels]."""
        self.weights = weights
        return self.runner.start(self.ids).values

    def block(self, weights: Weights, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden states that leave a block, [sequences, tokens, channels] as `hidden`."""
        with self.filled(weights, index) as module, torch.no_grad():
            return self.runner.forward(module, index, 0, hidden)

    @contextmanager
    def filled(self, weights: Weights, index: int) -> Iterator[torch.nn.Module]:
        """A block with its weights while the context lasts."""
        self.weights = weights
        name = self.structure.blocks[index].name
        self.fill(name)
        try:
            yield self.model.get_submodule(name)
        finally:
            release(self.model.get_submodule(name))

    def after(self, weights: Weights, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [tokens of all sequences, rows of the head]."""
        self.weights = weights
        sequences, tokens, channels = hidden.shape
        states = HiddenStates((sequences, tokens, channels), hidden.dtype, len(self.ids))
        states.write(0, hidden)
        places = torch.tensor([[row, column] for row in range(len(self.ids)) for column in range(PROBE_TOKENS)])
        with self.runner.tail(self.ids, states) as logits_at:
            return logits_at(0, places)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max |actual - expected| / max |expected|, both of any shape; infinite when there is a NaN."""
    error = float((actual - expected).abs().max() / expected.abs().max())
    return error if error == error else float("inf")


BESIDE_TEXT = "features of images or sound enter it beside the embeddings, and would have to be rotated with it"


def find_anatomy(checkpoint: Checkpoint) -> Anatomy:
    """The anatomy of a checkpoint's model; parts that cannot be rotated are named in its obstacles."""
    model = study(checkpoint)
    search = _Search(Bench(model), random_weights(model))
    anatomy = search.blocks()
    anatomy = search.outside(anatomy)
    if anatomy.tied and anatomy.norms:
        *others, last = anatomy.norms
        anatomy = replace(anatomy, norms=(*others, replace(last, uniform=_uniform(checkpoint, last))))
    return replace(anatomy, residual_obstacle=BESIDE_TEXT) if model.structure.towers else anatomy


def _uniform(checkpoint: Checkpoint, norm: Norm) -> bool:
    """Whether all gains of the norm are equal and its bias is zero."""
    gain = checkpoint.read(norm.weight)
    return bool((gain == gain[0]).all()) and (norm.bias is None or not checkpoint.read(norm.bias).any())


def random_weights(model: StudiedModel) -> Weights:
    """Random weights, with gains and biases that matter; stored buffers are real."""
    checkpoint, names = model.checkpoint, model.names
    random = {names[slot] for slot, _ in model.skeleton.named_parameters(remove_duplicate=False)}

    def read(name: str, rows: int | None) -> torch.Tensor:
        if name not in random:
            return checkpoint.read(name)[:rows]
        shape = checkpoint.tensors[name].shape
        shape = (min(shape[0], rows), *shape[1:]) if rows else shape
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        if len(shape) == 1:
            return 1 + 0.4 * noise if name.endswith("weight") else 0.3 * noise
        size: float = 1.5 / shape[-1] ** 0.5
        return noise * size

    return Weights(names, read)


def kind_of(model: torch.nn.Module, block: Block) -> Kind:
    """Equal for blocks with the same parts."""
    prefix, module = f"{block.name}.", model.get_submodule(block.name)
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    return type(module), tuple(site.module.removeprefix(prefix) for site in block.sites), shapes


class _Search:
    """Looks for the parts of a rotation and proves them on random weights."""

    def __init__(self, bench: Bench, noise: Weights):
        self.bench, self.noise = bench, noise
        with self._norms_called() as self.norms_before:
            self.width = bench.before(noise).shape[-1]
        generator = torch.Generator().manual_seed(1)
        self.hidden = 0.3 + torch.randn((*bench.ids.shape, self.width), generator=generator)

    def blocks(self) -> Anatomy:
        """What is in the blocks; of those that look alike, one is examined."""
        known: dict[Kind, tuple[Block, Anatomy]] = {}
        norms, writers, values, scaled, gains, obstacles, without = [], [], [], [], [], [], []
        for block in self.bench.structure.blocks:
            kind = kind_of(self.bench.model, block)
            if kind not in known:
                known[kind] = block, self._examine(block)
            like, anatomy = known[kind]
            moved = Moved(self.noise.names, like, block)
            norms += [moved.norm(norm) for norm in anatomy.norms]
            writers += [moved.sites[site] for site in anatomy.writers]
            values += [moved.path(path) for path in anatomy.values]
            scaled += [moved.path(path) for path in anatomy.scaled]
            gains += [moved.gain(path) for path in anatomy.gains]
            obstacles += [anatomy.residual_obstacle] if anatomy.residual_obstacle else []
            without += [anatomy.values_obstacle] if anatomy.values_obstacle else []
        if not obstacles and len({norm.centred for norm in norms}) > 1:
            obstacles.append("some norms subtract the mean and some do not")
        return Anatomy(
            self.width,
            norms=tuple(norms),
            writers=tuple(writers),
            values=tuple(values),
            scaled=tuple(scaled),
            gains=tuple(gains),
            residual_obstacle=next(iter(obstacles), ""),
            values_obstacle=next(iter(without), ""),
        )

    def _examine(self, block: Block) -> Anatomy:
        """The anatomy of one block."""

        def run(module: torch.nn.Module) -> torch.Tensor:
            with torch.no_grad(), routing(module, "probe"):  # every expert reads what the router reads
                return self.bench.runner.forward(module, block.index, 0, self.hidden)

        with self.bench.filled(self.noise, block.index) as module:
            trace = trace_block(module, block, run)
            groups = prove_folds(module, block, find_groups(module, block, run), run, self.bench.model.config)
        anatomy, obstacle = self._stream(block, module, trace)
        if not obstacle:
            error = self._rotated_error(block, anatomy)
            gated = replace(anatomy, writers=(*anatomy.writers, *self._behind_norms(block, trace, anatomy)))
            if error > UNCHANGED and gated != anatomy and self._rotated_error(block, gated) <= UNCHANGED:
                anatomy, error = gated, 0.0
            obstacle = "" if error <= UNCHANGED else self._reason(block, module, trace, anatomy, error)
        values, without = self._values(block, groups)
        return replace(
            anatomy,
            values=values,
            scaled=_scaled(block, groups, values),
            gains=_gains(block, groups, () if obstacle else anatomy.norms),
            residual_obstacle=obstacle,
            values_obstacle=without,
        )

    def _stream(self, block: Block, module: torch.nn.Module, trace: Trace) -> tuple[Anatomy, str]:
        """Candidates: norms that linears read, and other linears as wide as the stream; or why there are none."""
        silent = [site.module for site in block.sites if site.module not in trace.inputs and self._wide_site(site)]
        if silent:
            return Anatomy(self.width), f"{silent[0]} is not called for every token"
        norms = []
        for name, written in trace.written.items():
            readers = tuple(site for site in block.sites if trace.inputs.get(site.module) == written)
            if readers and readers[0].in_features == self.width:
                norm = self._norm(f"{block.name}.{name}", module.get_submodule(name), readers)
                if norm is None:
                    return Anatomy(self.width), f"{block.name}.{name} is not a norm that is known here"
                norms.append(norm)
        after_norms = {site for site in block.sites if trace.inputs.get(site.module) in trace.written.values()}
        writers = tuple(s for s in block.sites if s.out_features == self.width and s not in after_norms)
        if not norms:
            return Anatomy(self.width), f"no linear of {block.name} reads the output of a norm with a gain"
        return Anatomy(self.width, norms=tuple(norms), writers=writers), ""

    def _wide_site(self, site: LinearSite) -> bool:
        """Whether a linear could read or write the stream."""
        return self.width in (site.in_features, site.out_features)

    def _behind_norms(self, block: Block, trace: Trace, anatomy: Anatomy) -> tuple[LinearSite, ...]:
        """Linears as wide as the stream that read another norm than those on it: the gated one of Mamba 2."""
        readers = {site for norm in anatomy.norms for site in norm.readers}
        others = [site for site in block.sites if trace.inputs.get(site.module) in trace.written.values()]
        return tuple(site for site in others if site.out_features == self.width and site not in readers)

    def _norm(self, name: str, module: torch.nn.Module, readers: tuple[LinearSite, ...]) -> Norm | None:
        """What kind of norm the module is, from what it does to random vectors; None when it is another thing."""
        weight, bias = f"{name}.weight", f"{name}.bias"
        part = copy.deepcopy(module).float()
        generator = torch.Generator().manual_seed(2)
        x, gain, shift = torch.randn(3, 8, self.width, generator=generator)
        gain, shift = 1 + 0.4 * gain[0], 0.3 * shift[0]
        has_bias = getattr(part, "bias", None) is not None

        def output(weight: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            part.weight = torch.nn.Parameter(weight, requires_grad=False)
            if has_bias:
                zero = torch.zeros(self.width)
                part.bias = torch.nn.Parameter(zero if bias is None else bias, requires_grad=False)
            with torch.no_grad():
                normed: torch.Tensor = part(values)
            return normed

        zero, one = torch.zeros(self.width), torch.ones(self.width)
        offset = bool(output(zero, x).abs().max() > 0)
        unit = zero if offset else one
        flat = output(unit, x)
        expected = flat * gain + (shift if has_bias else 0)
        actual = output(gain - 1 if offset else gain, x, shift)
        if relative_error(actual, expected) > UNCHANGED:
            return None
        centred = relative_error(output(unit, x + 2), flat) <= UNCHANGED
        names = self.noise.names
        return Norm(names[weight], names[bias] if has_bias else None, offset, centred, readers)

    def _rotated_error(self, block: Block, anatomy: Anatomy) -> float:
        """How far the rotated block is from giving the rotated output."""
        if len({norm.centred for norm in anatomy.norms}) > 1:
            return float("inf")
        rewrite = rotate(replace(anatomy, tables=(STREAM,)), values=False)
        expected = _spun(rewrite, self.bench.block(self.noise, block.index, self.hidden))
        rotated = self.noise.rewritten(rewrite)
        return relative_error(self.bench.block(rotated, block.index, _spun(rewrite, self.hidden)), expected)

    def _reason(self, block: Block, module: torch.nn.Module, trace: Trace, anatomy: Anatomy, error: float) -> str:
        """Why a block cannot be rotated, as well as that can be seen."""
        read = set(trace.inputs.values())
        behind = [
            f"{block.name}.{name}"
            for name, written in trace.written.items()
            if written not in read and module.get_submodule(name).weight.shape == (self.width,)
        ]
        if behind:
            return f"{behind[0]} stands between a linear and the residual stream, and its gain does not rotate"
        return f"rotating {block.name} changes its output by {error:.1g}"

    def _values(self, block: Block, groups: list[InputGroup]) -> tuple[tuple[ValuePath, ...], str]:
        """Linears between which heads can be rotated; or why there are none."""
        heads = largest(self.bench.model.config.get_text_config(), "num_attention_heads")
        best: tuple[ValuePath, ...] = ()
        tried = "no linear of the blocks feeds another one by heads"
        for group in groups:
            channels = group.sites[0].in_features
            if group.fold is None or group.fold.kind != "linear" or not heads or channels % heads:
                continue
            producer = next(site for site in block.sites if site.weight == group.fold.weight)
            rows = torch.tensor(group.fold.index).reshape(heads, -1)
            path = ValuePath(block.index, producer, group.sites, tuple(map(tuple, rows.tolist())))
            error, control = self._value_error(path)
            if error <= UNCHANGED and control > MIN_CONTROL:
                best = (*best, path)
            elif error <= UNCHANGED:
                tried = f"the proof on {producer.module} shows nothing: without it the output changes by {control:.1g}"
        return best, "" if best else tried

    def _value_error(self, path: ValuePath) -> tuple[float, float]:
        """Relative change of the block's output with producer and consumers rotated, and with the consumers alone."""
        try:
            rewrite = rotate(Anatomy(self.width, values=(path,)), residual=False)
        except RecipeError:  # heads too small for any Hadamard matrix
            return float("inf"), 0.0
        consumers = {site.weight: rewrite.changes[site.weight] for site in path.consumers}
        expected = self.bench.block(self.noise, path.block, self.hidden)
        outputs = [
            self.bench.block(self.noise.rewritten(part), path.block, self.hidden)
            for part in (rewrite, Rewrite(consumers))
        ]
        return relative_error(outputs[0], expected), relative_error(outputs[1], expected)

    def outside(self, anatomy: Anatomy) -> Anatomy:
        """The anatomy with embeddings, last norm and head, or with the reason why they cannot be rotated."""
        if anatomy.residual_obstacle:
            return anatomy
        try:
            whole, outer = self._outer(anatomy)
        except SourceError as error:
            return replace(anatomy, residual_obstacle=error.what)
        change = self._outer_error(outer)
        if change > UNCHANGED:
            reason = f"rotating what is outside of the blocks changes it by {change:.1g}"
            return replace(anatomy, residual_obstacle=reason)
        return whole

    def _outer(self, anatomy: Anatomy) -> tuple[Anatomy, Anatomy]:
        """The whole anatomy, and that of what is outside of the blocks; SourceError with what stands in the way."""
        bench, names = self.bench, self.noise.names
        if self.norms_before:
            raise SourceError(f"{self.norms_before[0]} stands between the embeddings and the blocks")
        head, tied = self._head_site()
        others = [site.module for site in bench.structure.outside_sites if site != head]
        if others:
            raise SourceError(f"{others[0]} is a linear outside of the blocks that is not the head")
        with self._norms_called() as norms_after:
            bench.after(self.noise, self.hidden)
        if len(norms_after) != 1:
            called = ", ".join(norms_after) or "none"
            raise SourceError(f"one norm is expected between the blocks and the head, found: {called}")
        norm = self._norm(norms_after[0], bench.model.get_submodule(norms_after[0]), (head,))
        if norm is None or {norm.centred} != {n.centred for n in anatomy.norms}:
            raise SourceError(f"{norms_after[0]} is not a norm like those in the blocks")
        tables = tuple(dict.fromkeys(names[slot] for slot in bench.tables if self._wide(slot)))
        outer = Anatomy(self.width, tables=tables, norms=(norm,), tied=tied)
        return replace(anatomy, tables=tables, norms=(*anatomy.norms, norm), tied=tied), outer

    def _wide(self, slot: str) -> bool:
        """Whether a table holds vectors of the stream."""
        table = self.bench.model.get_submodule(slot.removesuffix(".weight"))
        return isinstance(table, torch.nn.Embedding) and table.embedding_dim == self.width

    def _head_site(self) -> tuple[LinearSite, tuple[LinearSite, str] | None]:
        """The head as a site; with the table that it shares, when it does."""
        module, names = self.bench.head, self.noise.names
        stored = next((site for site in self.bench.structure.outside_sites if site.module == module), None)
        if stored is not None:
            return stored, None
        part = self.bench.model.get_output_embeddings()
        if part is None or f"{module}.weight" not in names:
            raise SourceError("the model has no output head")
        bias = names.get(f"{module}.bias")
        site = LinearSite(module, f"{module}.weight", bias, part.out_features, part.in_features, None)
        return site, (site, names[f"{module}.weight"])

    def _outer_error(self, outer: Anatomy) -> float:
        """How far embeddings and head are from giving rotated hidden states and unchanged logits."""
        rewrite = rotate(replace(outer, tables=(*outer.tables, STREAM)), values=False)
        rotated = self.noise.rewritten(rewrite)
        expected = _spun(rewrite, self.bench.before(self.noise))
        error = relative_error(self.bench.before(rotated), expected)
        logits = self.bench.after(self.noise, self.hidden)
        return max(error, relative_error(self.bench.after(rotated, _spun(rewrite, self.hidden)), logits))

    @contextmanager
    def _norms_called(self) -> Iterator[list[str]]:
        """Names of the modules outside of the blocks that have a gain per channel, as they are called; not twice."""
        known = set(getattr(self, "norms_before", ()))
        called: list[str] = []
        handles = []
        for name, part in self.bench.model.named_modules():
            weight = part._parameters.get("weight")
            if weight is not None and weight.dim() == 1 and not self.bench.block_of(name) and name not in known:
                handles.append(part.register_forward_hook(partial(_note, called, name)))
        try:
            yield called
        finally:
            for handle in handles:
                handle.remove()


def _scaled(block: Block, groups: list[InputGroup], values: tuple[ValuePath, ...]) -> tuple[ScalePath, ...]:
    """Groups whose input a linear feeds channel by channel; those between which heads turn are known already."""
    turned = {site for path in values for site in path.consumers}
    paths = []
    for group in groups:
        fold = group.fold
        if fold is None or fold.kind != "linear" or group.sites[0] in turned or len(set(fold.index)) < len(fold.index):
            continue
        producer = next(site for site in block.sites if site.weight == fold.weight)
        paths.append(ScalePath(block.index, producer, group.sites, fold.index))
    return tuple(paths)


def _gains(block: Block, groups: list[InputGroup], norms: tuple[Norm, ...]) -> tuple[GainPath, ...]:
    """Groups whose input a norm writes that has a gain alone, and is none of those behind which the stream turns."""
    known = {norm.weight for norm in norms}
    paths = []
    for group in groups:
        fold = group.fold
        if fold is not None and fold.kind == "norm" and fold.bias is None and fold.weight not in known:
            paths.append(GainPath(block.index, fold.weight, group.sites, len(fold.index)))
    return tuple(paths)


def _note(called: list[str], name: str, *_: object) -> None:
    """A forward hook: note the name of the module, once."""
    if name not in called:
        called.append(name)


def _spun(rewrite: Rewrite, hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states as the rewritten model has them: a table that writes the stream is treated in the same way."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    return rewrite.changes[STREAM].apply(lambda _: rows, torch.float32).reshape(hidden.shape)


class Moved:
    """Names of one block for those of a block like it."""

    def __init__(self, names: Mapping[str, str], like: Block, block: Block):
        self.index = block.index
        self.sites = dict(zip(like.sites, block.sites, strict=True))
        prefix = f"{like.name}."
        self.tensors = {
            tensor: names[f"{block.name}.{slot.removeprefix(prefix)}"]
            for slot, tensor in names.items()
            if slot.startswith(prefix)
        }

    def norm(self, norm: Norm) -> Norm:
        """The norm at the same place."""
        bias = None if norm.bias is None else self.tensors[norm.bias]
        readers = tuple(self.sites[site] for site in norm.readers)
        return replace(norm, weight=self.tensors[norm.weight], bias=bias, readers=readers)

    def gain(self, path: GainPath) -> GainPath:
        """The norm inside of the block at the same place."""
        consumers = tuple(self.sites[site] for site in path.consumers)
        return replace(path, block=self.index, weight=self.tensors[path.weight], consumers=consumers)

    def path(self, path: Path) -> Path:
        """The path at the same place."""
        consumers = tuple(self.sites[site] for site in path.consumers)
        return replace(path, block=self.index, producer=self.sites[path.producer], consumers=consumers)
