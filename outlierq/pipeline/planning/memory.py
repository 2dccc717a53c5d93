"""How much memory a run needs at most, and what it does to need less.

`peaks` is a model, not a measurement: an upper bound for each phase of a run, from shapes alone. `choose` saves memory
step by step, in the phase that needs most, until all phases stay below a ceiling; the ways that leave the result as it
is come first. A ceiling that no saving reaches is refused before work starts, with the smallest one that works.

Ceilings are for resident memory. Pages of the file cache do not count: the system takes them back when it likes. Those
of libraries are such pages, and how many are resident is the machine's choice; `BASE_BYTES` has room for them all the
same, while a test can only hold a run to what it made itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq.calibrate.collect import ALL_FIELDS, BLOCK_FIELDS, CHUNK_ELEMENTS_DEVICE, stored_fields
from outlierq.calibrate.runner import SPILL_BYTES
from outlierq.core.errors import OutlierqError
from outlierq.core.model import Block, InputGroup, LinearSite, Structure
from outlierq.export import exporter
from outlierq.load.model.lookup import tables
from outlierq.load.source.shards import DTYPES
from outlierq.ops.search.refine import fitted_together
from outlierq.pipeline.events import return_memory_at_once
from outlierq.pipeline.ledger.output import PIECE_BYTES
from outlierq.quantize.stage import ROWS_PER_WORD

if TYPE_CHECKING:
    import torch

    from outlierq.pipeline.planning.plan import Plan
    from outlierq.recipe import Calibration

FLOAT = 4  # bytes of a float32
# Resident memory with torch, transformers and a small tokenizer imported and used. Measured: 340 MiB of its own, and of
# the libraries' files 130 MiB on one machine and some 100 more on another, whose kernel maps more pages at a fault.
BASE_BYTES = 600 << 20
# Another library's kernels, its context and pinned buffers in the host's memory once CUDA is in use.
CUDA_BYTES = 3 << 30
# torch.distributed, its threads and buffers, where several processes share the work.
SEVERAL_BYTES = 64 << 20
# Modules, names, headers and journal of one block (measured on 512 blocks: 87 kB), whatever its width.
BLOCK_BYTES = 100_000
# A tokenizer takes this many times the bytes of its file; a text file is read whole and cut into tokens.
TOKENIZER_FACTOR, TEXT_FACTOR = 6, 8
# Buffers of matrix products and of sums over pieces of a batch: a float32 piece, the same in bfloat16, and packing.
WORKSPACE = 3 * FLOAT * CHUNK_ELEMENTS_DEVICE
# Float32 copies of a stack that the method holds at once (measured: 10.5 for GPTQ, 4.5 for rounding by the hessian).
COPIES = {"gptq": 11}
COPIES_OF_OTHERS = 6
# The same of the rows that judge a transform (AWQ: 1024 rows and their candidates).
JUDGING_ROWS, JUDGING_COPIES = 1024, 10
# Bytes per weight of encoding one linear and reading it back: packed codes twice, codes as integers of 32 bits.
ENCODING = 12
# Weights of a stack that are solved at a time when memory is short, and sequences of a batch: the least.
LEAST_WEIGHTS = 1 << 18
# Without a ceiling, freed memory goes back to the system at once from this size on: that of whole stacks and hessians.
# Fresh pages take time, so work that makes many temporary matrices keeps them below.
LARGE = 2 << 20


@dataclass(frozen=True)
class Savings:
    """What a run does to need less memory; the defaults are what it does without a ceiling.

    spill_bytes: hidden states above this size are in a mapped file. stats_bytes: of hessians that are collected in one
    pass over the text; a block that has more is run several times, and its statistics wait in a file (None: never).
    most_weights: of a stack that is solved at once (None: all). batch_size: sequences at a time (None: the recipe's).
    """

    spill_bytes: int = SPILL_BYTES
    stats_bytes: int | None = None
    most_weights: int | None = None
    batch_size: int | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What may change the last bit of a sum, by name; a run continues only with the same."""
        found = {"most_weights": self.most_weights, "batch_size": self.batch_size}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def sentences(self) -> list[str]:
        """What is done beyond the usual, for people."""
        said = []
        if self.spill_bytes == 0:
            said.append("hidden states are kept in a mapped file")
        if self.stats_bytes is not None:
            said.append(
                f"hessians of {self.stats_bytes >> 20} MiB are collected in a pass: a block with more is run several "
                "times"
            )
        if self.most_weights is not None:
            said.append(
                f"stacks of more than {self.most_weights:,} weights are solved some rows at a time (may change last "
                "bits)"
            )
        if self.batch_size is not None:
            count = "one sequence" if self.batch_size == 1 else f"{self.batch_size} sequences"
            said.append(f"{count} at a time (may change last bits)")
        return said


NO_SAVINGS = Savings()


@dataclass(frozen=True)
class Work:
    """What the model of memory knows of a run: shapes, and what is asked.

    stored, elements: bytes and numbers of every tensor. itemsize: bytes of a parameter while its block runs. eager:
    attention keeps its scores. calibration: None when no model is run. fields: statistics that are kept, and whether
    there are any. looked_up: tables of which rows are read when they are needed. by_rows: other tensors are copied some
    rows at a time. group: the smallest group size. permutes: a step looks at all statistics of a block together.
    from_file: statistics are read, not made. writes_stats: they are what is wanted, and the final logits. making: what
    reading a tensor holds beside the tensor, where a recipe rewrites the model; those that are not named: nothing.
    proves: the rewritten model is run beside the original, which is not done for a pruned one. shards: of the text,
    each with sums of its own until they are merged. ranks: processes that share the work; all said here is of one of
    them, the lead, which needs most.
    """

    structure: Structure
    stored: Mapping[str, int]
    elements: Mapping[str, int]
    itemsize: int
    hidden: int
    heads: int
    eager: bool
    tokenizer_bytes: int
    text_bytes: int
    calibration: Calibration | None
    fields: frozenset[str]
    quantized: frozenset[LinearSite] = frozenset()
    method: str = ""
    looked_up: frozenset[str] = frozenset()
    by_rows: bool = False
    group: int | None = None
    transforms: bool = False
    activations: bool = False
    statistics: bool = False
    cuda: bool = False
    vocabulary: int = 0
    permutes: bool = False
    from_file: bool = False
    writes_stats: bool = False
    making: Mapping[str, int] = field(default_factory=dict)
    proves: bool = False
    shards: int = 1
    ranks: int = 1


def work_of(plan: Plan, *, stats: bool = False, device: str = "cpu", ranks: int = 1, shards: int | None = None) -> Work:
    """What `quantize` has to do. stats: statistics come from a file. shards: of a run that goes on."""
    recipe = plan.recipe
    making = {name: plan.checkpoint.making_bytes(name) for name in plan.checkpoint.tensors}
    needs = recipe.needs if recipe.calibration is not None else frozenset()  # a conversion has no method to ask
    running = bool(needs) and not stats
    known = _known(plan.checkpoint, plan.skeleton, plan.structure, plan.names, recipe.calibration, device)
    form = exporter(recipe.export.format, plan.checkpoint.config)
    return Work(
        **known,
        calibration=recipe.calibration if running else None,
        fields=ALL_FIELDS if stats and needs else stored_fields(needs) if needs else frozenset(),
        from_file=stats and bool(needs),
        quantized=frozenset(plan.schemes),
        method=recipe.quantize.method if recipe.quantize else "",
        group=min((s.group_size for s in plan.schemes.values() if s.group_size), default=None),
        transforms=bool(recipe.group_transforms or recipe.permutations),
        permutes=bool(recipe.permutations),
        activations=any(scheme.activations for scheme in plan.schemes.values()),
        statistics=bool(needs),
        by_rows=plan.checkpoint.reads_rows and not hasattr(form, "plain"),
        making={name: size for name, size in making.items() if size},
        proves=len(recipe.rewrites) > len(recipe.pruning),
        shards=_shards(recipe.calibration, ranks, shards),
        ranks=ranks,
    )


def _shards(calibration: Calibration | None, ranks: int, former: int | None) -> int:
    """Into how many parts the text is cut: as asked, as in the run that goes on, or one for each process."""
    return (calibration.shards if calibration else None) or former or ranks


def evaluation_bytes(models: Sequence[torch.nn.Module], dtype: str, window_length: int) -> int:
    """Upper bound of resident memory while these models are measured side by side on a text, all weights in memory."""
    from outlierq.evaluate.divergence import CHUNK_ELEMENTS

    itemsize = 4 if dtype == "float32" else 2
    found, most = 0, 0
    for model in models:
        config = model.config.get_text_config()
        sizes = [parameter.numel() for parameter in model.parameters()]  # a shared one once
        inner = max((max(p.shape) for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n), default=0)
        found += sum(sizes) * itemsize + window_length * config.vocab_size * (itemsize + FLOAT)
        token = itemsize * (4 * min(inner, 8 * config.hidden_size) + 12 * config.hidden_size)
        scores = config.num_attention_heads * window_length * 2 * FLOAT
        most = max(most, window_length * (token + scores), 2 * FLOAT * max(sizes))
    logits = 4 * FLOAT * min(CHUNK_ELEMENTS, window_length * models[0].config.get_text_config().vocab_size)
    return BASE_BYTES + found + most + logits


def check_evaluation(models: Sequence[torch.nn.Module], dtype: str, window_length: int, ceiling: int | None) -> None:
    """OutlierqError when a measurement would need more than the ceiling: models are measured whole, not by block."""
    needed = evaluation_bytes(models, dtype, window_length)
    if ceiling is not None and needed > ceiling:
        raise OutlierqError(
            f"--max-memory {ceiling >> 20} MiB is too little to measure {len(models)} whole model(s) in {dtype}: up to "
            f"{-(-needed >> 20)} MiB",
            hint="measure with --dtype bfloat16, without --reference, or on a machine with more memory",
        )


def work_of_calibration(
    checkpoint: Any,
    skeleton: Any,
    structure: Structure,
    settings: Calibration,
    fields: frozenset[str],
    device: str,
    *,
    ranks: int = 1,
    shards: int | None = None,
) -> Work:
    """What `calibrate` has to do. shards: of a run that goes on."""
    from outlierq.load import checkpoint_names

    return Work(
        **_known(checkpoint, skeleton, structure, checkpoint_names(checkpoint, skeleton), settings, device),
        calibration=settings,
        fields=fields,
        statistics=True,
        transforms=True,
        writes_stats=True,
        shards=_shards(settings, ranks, shards),
        ranks=ranks,
    )


def _known(
    checkpoint: Any,
    skeleton: Any,
    structure: Structure,
    names: Mapping[str, str],
    settings: Calibration | None,
    device: str,
) -> dict[str, Any]:
    """The fields of `Work` that any run has."""
    config = skeleton.config.get_text_config()
    texts = [Path(str(source.path)) for source in settings.text] if settings else []
    files = {file.name: file for file in checkpoint.files}
    tokenizer = files.get("tokenizer.json") or files.get("tokenizer.model")
    return {
        "structure": structure,
        "stored": {name: info.nbytes for name, info in checkpoint.tensors.items()},
        "elements": {name: info.nbytes // DTYPES[info.dtype][1] for name, info in checkpoint.tensors.items()},
        "looked_up": frozenset(tables(skeleton, checkpoint, names).values()),
        "itemsize": 4 if checkpoint.dtype == "float32" else 2,
        "hidden": getattr(config, "hidden_size", None) or max(s.in_features for s in structure.sites),
        "heads": getattr(config, "num_attention_heads", None) or 1,
        "eager": getattr(skeleton.config, "_attn_implementation", "eager") == "eager",
        "tokenizer_bytes": len(tokenizer.read()) if tokenizer else 0,
        "text_bytes": sum(path.stat().st_size for path in texts if path.is_file()),
        "cuda": device.startswith("cuda"),
        "vocabulary": getattr(config, "vocab_size", None) or 0,
    }


def peaks(work: Work, savings: Savings) -> dict[str, int]:
    """Upper bounds of resident memory, in bytes, by phase."""
    block = _Phases(work, savings)
    found = {"tables": block.tables(), "write": block.writing()}
    if work.calibration is not None:
        found["collect"] = block.collecting()
        if work.writes_stats:
            found |= {"file": block.filing(), "logits": block.logits()}
        if work.transforms:
            found["folds"] = block.folding()
    if work.statistics and not work.writes_stats:
        found["solve"] = block.solving()
    if work.transforms and not work.writes_stats:
        found["transform"] = block.transforming()
    if work.proves:
        found["rewrite"] = block.rewriting()
    return {phase: block.base + size for phase, size in found.items()}


class _Phases:
    """The bytes of each phase beside the process itself, for the largest block."""

    def __init__(self, work: Work, savings: Savings):
        self.work, self.savings = work, savings
        self.block = max(work.structure.blocks, key=lambda block: sum(work.elements[n] for n in block.tensors))
        elements = sum(work.elements[name] for name in self.block.tensors)
        self.running, self.dense = elements * work.itemsize, elements * FLOAT
        self.stored = sum(work.stored[name] for name in self.block.tensors)
        self.making = max((work.making.get(name, 0) for name in self.block.tensors), default=0)
        self.inputs = list(_inputs(self.block))
        self.base = BASE_BYTES + len(work.structure.blocks) * BLOCK_BYTES
        self.base += work.tokenizer_bytes * TOKENIZER_FACTOR + work.text_bytes * TEXT_FACTOR
        self.base += (CUDA_BYTES if work.cuda else 0) + (SEVERAL_BYTES if work.ranks > 1 else 0)
        self.mine = -(-work.shards // work.ranks)  # shards that one process runs, one after another

    @property
    def loading(self) -> int:
        """A block that gets its weights; stored in another dtype they are there twice for a moment."""
        return self.running + (self.stored if self.stored != self.running else 0) + self.making

    def hidden(self) -> int:
        """Hidden states that are resident."""
        calibration = self.work.calibration
        if calibration is None:
            return 0
        token = self.work.hidden * self.work.itemsize
        shard = -(-calibration.samples // self.work.shards) * calibration.sequence_length * token
        if shard <= self.savings.spill_bytes:
            return self.mine * shard
        return 2 * self._batch_tokens * token

    @property
    def _batch_tokens(self) -> int:
        """Tokens that run at once."""
        calibration = self.work.calibration
        return min(self.savings.batch_size or calibration.batch_size, calibration.samples) * calibration.sequence_length

    def activations(self) -> int:
        """One batch inside of a block: what each linear returns, its inputs, and the residual stream with its norm."""
        work, calibration = self.work, self.work.calibration
        expert = [s for s in self.block.sites if s.expert]
        plain = [s for s in self.block.sites if not s.expert]
        outputs = sum(s.out_features for s in plain) + 3 * max((s.out_features for s in expert), default=0)
        widest = max(s.in_features for s in self.block.sites)
        token = work.itemsize * (outputs + 2 * widest + 8 * work.hidden) + FLOAT * 2 * work.hidden
        length = calibration.sequence_length
        scores = self._batch_tokens * length * FLOAT  # a mask
        if work.eager:
            scores += self._batch_tokens * length * work.heads * (FLOAT + 2 * work.itemsize)
        if work.fields & BLOCK_FIELDS:  # attention of one sequence's sampled queries, and kept outputs
            scores += length * length // 4 * work.heads * FLOAT + self._batch_tokens * outputs * work.itemsize
        return self._batch_tokens * token + scores + WORKSPACE

    def tables(self) -> int:
        """What is read before the first block runs; its weights, too, for a probe of one short sequence."""
        work = self.work
        if work.calibration is None:
            return 0
        rows = 2 * self._batch_tokens * work.hidden * work.itemsize
        return self._outside(work.looked_up) + rows + self.loading + self.hidden() + self.activations()

    def _outside(self, without: frozenset[str]) -> int:
        """What is outside of the blocks, in memory; stored in another dtype it is there twice for a moment."""
        structure = self.work.structure
        names = {*structure.outside_tensors, *(site.weight for site in structure.outside_sites)} - without
        making = max((self.work.making.get(name, 0) for name in names), default=0)
        return making + sum(self.work.stored[name] for name in names) * (1 if self.stored == self.running else 2)

    def statistics(self) -> int:
        """Statistics of one block that are in memory at once."""
        all_of_them = sum(count * self._of_group(width) for width, _, count in self.inputs)
        return all_of_them if self.savings.stats_bytes is None else min(all_of_them, self.collected())

    def collected(self) -> int:
        """Statistics that are collected in one pass."""
        whole = sum(count * self._of_group(width) for width, _, count in self.inputs)
        if self.savings.stats_bytes is None:
            return whole
        largest = max(self._of_group(width) for width, _, _ in self.inputs)
        return min(whole, max(self.savings.stats_bytes, largest))

    def _of_group(self, width: int) -> int:
        """Statistics of one input."""
        kept = 16 * 8 + 512 * 2 + (self.work.calibration.samples if self.work.calibration else 0) * FLOAT
        kept += 48 * 8 if "log2_histogram" in self.work.fields else 0
        return width * kept + (width * width * FLOAT if "hessian" in self.work.fields else 0)

    def collecting(self) -> int:
        """The block runs over the text; sums of shards wait for those of their neighbours, and for other processes'."""
        waiting = self.collected() * self.mine.bit_length()
        received = 1 + (self.work.shards.bit_length() if self.work.ranks > 1 else 0)
        return self.loading + self.hidden() + waiting + max(self.activations(), received * self._largest_hessian)

    @property
    def _largest_hessian(self) -> int:
        return max(self._of_group(width) for width, _, _ in self.inputs)

    def folding(self) -> int:
        """Folds are tried on a float32 copy of the block, with another copy of the consumers."""
        consumers = max(rows * width for width, rows, _ in self.inputs) * FLOAT
        return self.running + self.dense + 2 * consumers + self.hidden()

    def solving(self) -> int:
        """The linears of the block are quantized, group by group; codes of those that are done wait to be written."""
        work = self.work
        tensors = self.dense if work.transforms else self.stored
        codes = sum(work.elements[s.weight] for s in self.block.sites) * 5 // 4
        running = self.running if self._keeps_weights else 0
        running += self.dense if self.work.ranks > 1 else 0  # passed on to the others as it was written
        largest = max(self._solving(width, rows) for width, rows, _ in self.inputs)
        return self._held() + tensors + codes + running + max(largest, self.making) + self.hidden()

    @property
    def _keeps_weights(self) -> bool:
        """Whether the block's weights in the model wait for more than the collection."""
        calibration = self.work.calibration
        return calibration is not None and (calibration.mode == "sequential" or self.work.transforms)

    def _held(self) -> int:
        """Statistics that wait while one group is worked on."""
        if self.savings.stats_bytes is not None:
            return 0
        # The file that they are read from is mapped, and its pages stay as long.
        return self.statistics() * (2 if self.work.from_file else 1)

    def _solving(self, width: int, rows: int) -> int:
        """One stack, [rows, width], beside the statistics that wait."""
        work, most = self.work, self.savings.most_weights
        stack = rows * width
        piece = stack if most is None else min(stack, max(most, ROWS_PER_WORD * width))
        hessian = self._of_group(width)
        solved = COPIES.get(work.method, COPIES_OF_OTHERS) * FLOAT * piece + (stack if piece < stack else 0)
        found = solved
        if work.method == "gptq":
            # In the sweep and its refinement; and while the hessian is factored, at worst in float64.
            groups = -(-width // (work.group or width))
            refitting = 2 * FLOAT * groups * min(piece, fitted_together(groups, width) * width)
            found = solved + max(refitting, hessian) + (hessian if piece < stack else 0)
            found = max(found, 3 * hessian + FLOAT * piece)
        if work.activations:
            found = max(found, 3 * FLOAT * stack + 2 * hessian + 512 * (3 * width + 3 * rows) * FLOAT)
        # In a file they are read, weighed and moved; in memory one of them is, while all others are there.
        return max(hessian + found, 3 * hessian) if self.savings.stats_bytes is not None else max(found, 2 * hessian)

    def transforming(self) -> int:
        """Scales are chosen and folded in float32, and the block's output before and after is compared."""
        width, rows, _ = max(self.inputs, key=lambda each: each[0] * each[1])
        stack = FLOAT * rows * width
        judged = JUDGING_COPIES * FLOAT * min(rows, JUDGING_ROWS) * width
        choosing = self.dense + 3 * stack + max(3 * self._largest_hessian + judged, stack)
        comparing = self.dense + self.running + self.dense + self.stored + self.making
        return self.running + self._held() + self.stored + max(choosing, comparing) + self.hidden()

    def writing(self) -> int:
        """The largest linear is encoded and read back, or the largest other tensor is copied."""
        work = self.work
        linear = max((work.elements[s.weight] for s in work.quantized), default=0) * ENCODING
        plain = max((2 * size + work.making.get(name, 0) for name, size in work.stored.items()), default=0)
        plain = min(plain, 4 * PIECE_BYTES) if work.by_rows else plain
        linear += self.making
        if not work.statistics:
            return max(linear, plain)
        block = self._held() + (self.dense if work.transforms else self.stored) + self.hidden()
        codes = sum(work.elements[s.weight] for s in self.block.sites) * 5 // 4
        return max(block + codes + linear, plain)

    def rewriting(self) -> int:
        """A rewrite is looked for and proved: the whole model runs in float32, block by block, on a short text.

        Of tables and head only the first rows do, but they are read whole.
        """
        from outlierq.pipeline.remodel.anatomy import ROWS

        work = self.work
        outside = set(work.stored) - {name for block in work.structure.blocks for name in block.tensors}
        largest = max((work.elements[name] for name in self.block.tensors), default=0)
        few = sum(min(work.elements[name], ROWS * work.hidden) for name in outside) * 2 * FLOAT
        read = max((work.stored[name] + work.making.get(name, 0) for name in outside), default=0)
        return max(2 * self.dense + 3 * FLOAT * largest + self.making, few + read)

    def filing(self) -> int:
        """The statistics of a block are written: beside themselves as copies, as bytes, and as the file's content."""
        return self.running + 4 * self.statistics() + self.hidden()

    def logits(self) -> int:
        """What follows the blocks runs at sampled positions."""
        sampled = 2 * 512 * self.work.vocabulary * FLOAT
        return self._outside(frozenset()) + self.hidden() + self.activations() + sampled


def _inputs(block: Block) -> Iterator[tuple[int, int, int]]:
    """(width, rows of the linears that may share an input of it, how many such inputs there are at most).

    Which linears share an input is found out when the block runs. Those of one parent and one width are taken for one
    stack; for two inputs, when they are several, since one of them may read what the others have made.
    """
    found: dict[tuple[str, int], list[int]] = {}
    for site in block.sites:
        found.setdefault((site.module.rpartition(".")[0], site.in_features), []).append(site.out_features)
    for (_, width), rows in found.items():
        yield width, sum(rows), min(len(rows), 2)


def in_passes(groups: Sequence[InputGroup], most: int | None) -> list[list[InputGroup]]:
    """The groups of a block, dealt to as few passes over the text as keep the hessians of each within `most` bytes.

    A group that has more by itself gets a pass of its own.
    """
    passes: list[list[InputGroup]] = []
    room = 0
    for group in groups:
        size = (1 + len(group.parts)) * FLOAT * group.sites[0].in_features ** 2 if group.sites else 0
        if not passes or (most is not None and size > room):
            passes.append([])
            room = most or 0
        passes[-1].append(group)
        room -= size
    return passes or [[]]


def choose(work: Work, ceiling: int) -> Savings:
    """The savings with which the run stays below `ceiling` bytes; as few as possible, harmless ones first.

    OutlierqError names the smallest ceiling that works when this one is too low.
    """
    savings = NO_SAVINGS
    while True:
        found = peaks(work, savings)
        phase = max(found, key=found.__getitem__)
        if found[phase] <= ceiling:
            return savings
        tried = next((more for more in _more(work, savings, phase) if peaks(work, more)[phase] < found[phase]), None)
        if tried is None:
            raise too_low(found[phase], ceiling)
        savings = tried


def _more(work: Work, savings: Savings, phase: str) -> Iterator[Savings]:
    """The next steps of every saving that may help in a phase; those that leave the result as it is come first."""
    calibration = work.calibration
    if calibration is not None and savings.spill_bytes:
        yield replace(savings, spill_bytes=0)
    if work.statistics and phase != "tables" and calibration is not None and not (work.permutes or work.writes_stats):
        largest = _Phases(work, savings)._largest_hessian
        now = _Phases(work, savings).collected()
        if savings.stats_bytes is None or now > largest:
            yield replace(savings, stats_bytes=max(largest, now // 2))
    if phase == "solve":
        most = savings.most_weights or 1 << 28
        while most > LEAST_WEIGHTS:
            most //= 2
            yield replace(savings, most_weights=most)
    if calibration is not None:
        now = savings.batch_size or calibration.batch_size
        if now > 1:
            yield replace(savings, batch_size=now // 2)


def smallest_ceiling(work: Work) -> int:
    """The least ceiling that `choose` accepts, in bytes."""
    savings = NO_SAVINGS
    while True:
        found = peaks(work, savings)
        phase = max(found, key=found.__getitem__)
        tried = next((more for more in _more(work, savings, phase) if peaks(work, more)[phase] < found[phase]), None)
        if tried is None:
            return found[phase]
        savings = tried


def check_together(works: Sequence[Work], ceiling: int) -> None:
    """OutlierqError when the ceiling is too low for one of several pieces of work, with the least that does for all."""
    least = max(map(smallest_ceiling, works))
    if ceiling < least:
        raise too_low(least, ceiling)


def too_low(least: int, ceiling: int) -> OutlierqError:
    """The refusal of a ceiling below the least that works."""
    mib = 1 << 20
    return OutlierqError(
        f"--max-memory {ceiling / mib:.0f} MiB is too little for this run: it needs up to {least / mib:.0f} MiB, of "
        f"which Python, torch and transformers are {BASE_BYTES // mib} MiB",
        hint=f"give --max-memory {-(-least // mib)}MiB or more",
    )


def obeying(work: Work, ceiling: int | None, device: str) -> Savings:
    """The savings of a run with this ceiling, and the allocators told of it; none without a ceiling."""
    if ceiling is None:
        if work.statistics:
            return_memory_at_once(LARGE)
        return NO_SAVINGS
    savings = choose(work, ceiling)
    obey(device, ceiling)
    return savings


def obey(device: str, ceiling: int) -> None:
    """Tell the allocators: freed memory goes back at once, and a GPU gives no more than the ceiling."""
    return_memory_at_once()
    if device.startswith("cuda"):
        import torch

        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, ceiling / whole), device)
