"""Upper bounds of resident memory for each phase of a run, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from outlierq.calibrate.collect import CHUNK_ELEMENTS_DEVICE
from outlierq.calibrate.text.unseen import MOST_TOKENS
from outlierq.core.measured.block_stats import BLOCK_FIELDS
from outlierq.core.model import Block
from outlierq.evaluate.generation import TOGETHER
from outlierq.export.writer import PIECE_BYTES
from outlierq.ops.packing import ROWS_PER_WORD
from outlierq.ops.search.sweep import PANEL_ROWS
from outlierq.pipeline.planning.work import Savings, Work
from outlierq.quantize.stage import rows_in_float32
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


# Float32 copies of the rows of a panel that GPTQ solves: weights, codes, errors, residuals. And bytes beside them.
# More of both where the grid is that of a type of GGUF, which is fitted with the panel's products with the hessian.
PANEL_COPIES, SEARCHING = 4, 16 << 20
TYPE_COPIES, FITTING = 12, 128 << 20
# Float32 copies of the rows that judge a transform (AWQ: 1024 rows and their candidates).
JUDGING_ROWS, JUDGING_COPIES = 1024, 10


# Float32 copies of a block that learns (weights, places, gradients twice, two moments, scales and offsets by weight,
# the weights as they are now and what they are made of), and of a batch's activations that its gradients need.
LEARNING_COPIES, LEARNING_ACTIVATIONS = 12, 4


# Bytes per weight of encoding one linear and reading it back: packed codes twice, codes as integers of 32 bits.
ENCODING = 12


def peaks(work: Work, savings: Savings) -> dict[str, int]:
    """Upper bounds of resident memory, in bytes, by phase."""
    block = Phases(work, savings)
    sizes = {"tables": block.tables(), "write": block.writing()}
    if work.calibration is not None:
        sizes["collect"] = block.collecting()
        if work.writes_stats:
            sizes |= {"file": block.filing(), "logits": block.logits()}
        if work.transforms:
            sizes["folds"] = block.folding()
        if work.calibration.own_share:
            sizes["own text"] = block.writing_text()
    if work.statistics and not work.writes_stats:
        sizes["solve"] = block.solving()
    if work.learns:
        sizes["learn"] = block.learning()
    if work.transforms and not work.writes_stats:
        sizes["transform"] = block.transforming()
    if work.proves:
        sizes["rewrite"] = block.rewriting()
    return {phase: block.base + size for phase, size in sizes.items()}


class Phases:
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
        beside = "cross" in self.work.fields and calibration.mode == "sequential"
        streams = 2 if beside or self.work.learns else 1
        if shard <= self.savings.spill_bytes:
            return streams * self.mine * shard
        return streams * 2 * self._batch_tokens * token

    @property
    def _text(self) -> Calibration:
        """What runs through the blocks; asked for only where something does."""
        assert self.work.calibration is not None, "no text runs"
        return self.work.calibration

    @property
    def _batch_tokens(self) -> int:
        """Tokens that run at once."""
        calibration = self._text
        return min(self.savings.batch_size or calibration.batch_size, calibration.samples) * calibration.sequence_length

    def activations(self) -> int:
        """One batch inside of a block: what each linear returns, its inputs, and the residual stream with its norm."""
        work = self.work
        expert = [s for s in self.block.sites if s.expert]
        plain = [s for s in self.block.sites if not s.expert]
        outputs = sum(s.out_features for s in plain) + 3 * max((s.out_features for s in expert), default=0)
        widest = max((s.in_features for s in self.block.sites), default=0)
        token = work.itemsize * (outputs + 2 * widest + 8 * work.hidden) + FLOAT * 2 * work.hidden
        length = self._text.sequence_length
        scores = self._batch_tokens * length * FLOAT  # a mask
        if work.eager:
            scores += self._batch_tokens * length * work.heads * (FLOAT + 2 * work.itemsize)
        if work.fields & BLOCK_FIELDS:  # attention of one sequence's sampled queries, and kept outputs
            scores += length * length // 4 * work.heads * FLOAT + self._batch_tokens * outputs * work.itemsize
        if "cross" in work.fields:  # the inputs of all linears in the original model, until the batch ran again
            token += sum(width for width, _, _ in self.inputs) * (work.itemsize + 3 * FLOAT)
        return self._batch_tokens * token + scores + WORKSPACE

    def tables(self) -> int:
        """What is read before the first block runs; its weights, too, for a probe of one short sequence."""
        work = self.work
        if work.calibration is None:
            return 0
        rows = 2 * self._batch_tokens * work.hidden * work.itemsize
        return self._outside(work.looked_up | work.unread) + rows + self.loading + self.hidden() + self.activations()

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
        per_channel = 16 * 8 + 512 * 2 + (self.work.calibration.samples if self.work.calibration else 0) * FLOAT
        per_channel += 48 * 8 if "log2_histogram" in self.work.fields else 0
        return width * per_channel + len(self.work.fields & {"hessian", "cross"}) * width * width * FLOAT

    def collecting(self) -> int:
        """The block runs over the text; sums of shards wait for those of their neighbours, and for other processes'."""
        waiting = self.collected() * self.mine.bit_length()
        received = 1 + (self.work.shards.bit_length() if self.work.ranks > 1 else 0)
        held = self.loading + self.hidden() + self._unseen() + waiting
        return held + max(self.activations(), received * self.largest_hessian)

    def _unseen(self) -> int:
        """Hidden states of tokens that the text does not hold, in the first block; its sums go on from theirs."""
        if not self._text.unseen_tokens:
            return 0
        token = self.work.hidden * self.work.itemsize
        return min(MOST_TOKENS * token, max(self.savings.spill_bytes, 2 * self._batch_tokens * token))

    @property
    def largest_hessian(self) -> int:
        return max(self._of_group(width) for width, _, _ in self.inputs)

    def writing_text(self) -> int:
        """The whole model writes what it is calibrated on: its weights, the cache of all blocks, and logits."""
        work, calibration = self.work, self._text
        together = min(TOGETHER, calibration.samples)
        cache = 2 * len(work.structure.blocks) * together * calibration.sequence_length * work.hidden * work.itemsize
        weights = sum(work.elements.values()) * work.itemsize + max(work.stored.values(), default=0)
        return weights + cache + 4 * together * work.vocabulary * FLOAT + WORKSPACE

    def folding(self) -> int:
        """Folds are tried on a float32 copy of the block, with another copy of the consumers."""
        consumers = max(rows * width for width, rows, _ in self.inputs) * FLOAT
        return self.running + self.dense + 2 * consumers + self.hidden()

    def solving(self) -> int:
        """The linears of the block are quantized, group by group; codes of those that are done wait to be written."""
        work = self.work
        tensors = self.dense if work.transforms else self.stored if work.learns else self._read_at_once
        codes = sum(work.elements[s.weight] for s in self.block.sites) * 5 // 4
        running = self.running if self._keeps_weights else 0
        running += self.dense if self.work.ranks > 1 else 0  # passed on to the others as it was written
        largest = max(self._solving(width, rows) for width, rows, _ in self.inputs)
        return self._held() + tensors + codes + running + max(largest, self.making) + self.hidden()

    @property
    def _read_at_once(self) -> int:
        """What is stored of the linears that share an input, of those that are the most."""
        elements = sum(self.work.elements[name] for name in self.block.tensors)
        return -(-self.stored * max((rows * width for width, rows, _ in self.inputs), default=0) // elements)

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
        piece = min(piece, rows_in_float32() * width) if work.factors and not work.together else piece
        hessian = self._of_group(width)
        size = method_bytes(work.copies, work.factors, (stack, piece), width, work.group, hessian)
        if work.factors and work.types:
            more = (TYPE_COPIES - PANEL_COPIES) * FLOAT * min(piece, PANEL_ROWS * width) + FITTING
            size += torch.get_num_threads() * more + hessian
        if work.activations:
            size = max(size, 3 * FLOAT * stack + 2 * hessian + 512 * (3 * width + 3 * rows) * FLOAT)
        # In a file they are read, weighed and moved; in memory one of them is, while all others are there.
        return max(hessian + size, 3 * hessian) if self.savings.stats_bytes is not None else max(size, 2 * hessian)

    def transforming(self) -> int:
        """Scales are chosen and folded in float32, and the block's output before and after is compared."""
        width, rows, _ = max(self.inputs, key=lambda each: each[0] * each[1])
        stack = FLOAT * rows * width
        judged = JUDGING_COPIES * FLOAT * min(rows, JUDGING_ROWS) * width
        choosing = self.dense + 3 * stack + max(3 * self.largest_hessian + judged, stack)
        comparing = self.dense + self.running + self.dense + self.stored + self.making
        return self.running + self._held() + self.stored + max(choosing, comparing) + self.hidden()

    def learning(self) -> int:
        """Every linear in float32 some times over, two sets of codes, and a batch with what its gradients need."""
        weights = sum(self.work.elements[site.weight] for site in self.block.sites)
        held = LEARNING_COPIES * FLOAT * weights + 2 * weights
        running = self.running + LEARNING_ACTIVATIONS * self.activations()
        return self._held() + self.stored + running + held + self.hidden()

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
        return self._outside(self.work.unread) + self.hidden() + self.activations() + sampled


def method_bytes(
    copies: int, factors: bool, weights: tuple[int, int], width: int, group: int | None, hessian: int
) -> int:
    """Upper bound of what a quantizer holds at once, with the rows that it is given, in bytes.

    copies, factors: as it declares them. weights: of the stack, and of the part of it that is solved at a time, in rows
    of `width`. group: columns that share a scale, None for all. hessian: its bytes.
    """
    stack, piece = weights
    solved = copies * FLOAT * piece + (2 * stack if piece < stack else 0)
    if not factors:
        return solved
    # Beside the factor of the hessian, in every thread: a panel, and what searching its scales takes.
    panel = PANEL_COPIES * FLOAT * min(piece, PANEL_ROWS * width) + SEARCHING
    return solved + torch.get_num_threads() * panel + hessian + FLOAT * width * min(group or 0, width)


def _inputs(block: Block) -> Iterator[tuple[int, int, int]]:
    """(width, rows of the linears that may share an input of it, how many such inputs there are at most).

    Which linears share an input is found out when the block runs. Those of one parent and one width are taken for one
    stack; for two inputs, when they are several, since one of them may read what the others have made.
    """
    stacks: dict[tuple[str, int], list[int]] = {}
    for site in block.sites:
        stacks.setdefault((site.module.rpartition(".")[0], site.in_features), []).append(site.out_features)
    for (_, width), rows in stacks.items():
        yield width, sum(rows), min(len(rows), 2)
