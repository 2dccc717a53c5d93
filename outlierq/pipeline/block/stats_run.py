"""Where a block's statistics come from: a finished file, or the model run block by block while it is quantized."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq.calibrate.batches import Batch
from outlierq.calibrate.collect import ALL_FIELDS, Collector, Sequences
from outlierq.calibrate.experts import all_groups, routing, seeing_all, tokens_note
from outlierq.calibrate.folds import prove_folds, tensor_parameters, without_shared
from outlierq.calibrate.groups import find_groups, unseen_groups
from outlierq.calibrate.logits import sample_logits
from outlierq.calibrate.observe import BlockObserver
from outlierq.calibrate.runner import BlockRunner, HiddenStates, Originals, PartWeights, Spill
from outlierq.calibrate.sensitivity import measure_sensitivity
from outlierq.calibrate.stored.spilled import SpilledStats
from outlierq.calibrate.text.unseen import reads_ids_alone
from outlierq.calibrate.trace import RunOnce
from outlierq.core.errors import NumbersError, RecipeError
from outlierq.core.machine.heap import return_freed_memory
from outlierq.core.measured.block_stats import BLOCK_FIELDS, BlockStats
from outlierq.core.measured.logits import LogitSample
from outlierq.core.measured.sensitivity import Sensitivity
from outlierq.core.model import Block, InputGroup, StudiedModel
from outlierq.core.move import UNCHANGED
from outlierq.core.stats import OF_TOKENS, InputStats
from outlierq.load import looking_up
from outlierq.pipeline.asked.events import Event
from outlierq.pipeline.asked.resources import USUAL, Resources
from outlierq.pipeline.block.hidden_files import SAVED, load_hidden, save_hidden
from outlierq.pipeline.planning.memory import in_passes
from outlierq.pipeline.planning.work import NO_SAVINGS, Savings
from outlierq.pipeline.processes.ranks import Ranks
from outlierq.pipeline.processes.sharding import (
    Merging,
    ShardIds,
    Statistics,
    all_of_lead,
    bare,
    combined,
    names_of,
    shards_of,
    sorted_by_group,
)
from outlierq.pipeline.remodel.rewrite import original_of
from outlierq.pipeline.text.own import keep_tokens
from outlierq.pipeline.text.tokens import text_windows, with_images, with_unseen

if TYPE_CHECKING:
    import torch

    from outlierq.calibrate.text.windows import TokenSet
    from outlierq.core.scheme import ActivationScheme
    from outlierq.recipe import Calibration

ROWS = 512  # whole tokens that are kept of an input, in all shards together
# That a pass with gradients reads. Twice as many move the sums of a linear by some percent (docs/fit.md).
SENSITIVE_TOKENS = 1 << 14
UNPROVED = "the first block reads more of a token than its id, so tokens that the text does not hold have no statistics"
# How much work a crash may cost: hidden states are saved when the last save is this old.
SAVE_EVERY_SECONDS = 60.0


@dataclass
class Shard:
    """Some of the token windows on their way through the blocks. at: index of the block whose inputs `hidden` holds.

    originals: the same tokens in the original model, where `hidden` is behind quantized blocks and both are asked for.
    """

    text: ShardIds
    runner: BlockRunner
    states: HiddenStates | None = None
    originals: HiddenStates | None = None
    at: int = 0

    @property
    def hidden(self) -> HiddenStates:
        """The hidden states, once the text was read."""
        assert self.states is not None, "the text was not read yet"
        return self.states

    @property
    def original_outputs(self) -> HiddenStates:
        """What the original model has at the same place; once `hidden` is what the next block reads, its inputs."""
        assert self.originals is not None, "the original model did not start"
        return self.originals


@dataclass(frozen=True)
class Asked:
    """What a run over the model is asked for. fields: what to keep, see InputStats and BlockStats.

    inputs: how the client rounds the input of a linear, by module, where statistics shall be of that.
    folds: whether anybody asks which folds a group has. learns: whether blocks learn what the original ones give, which
    run beside them then. owners: which rank gets the statistics of each group; the
    others know of it only how many tokens there were.
    """

    fields: frozenset[str] = ALL_FIELDS
    folds: bool = True
    inputs: Mapping[str, ActivationScheme] = field(default_factory=dict)
    learns: bool = False
    owners: Callable[[Sequence[InputGroup], Ranks], Mapping[str, int]] = all_of_lead


EVERYTHING = Asked()


class StatsFromRun:
    """Statistics of the model run block by block.

    static: hidden states come from the original blocks; sequential: from the blocks as they were written.
    work: folder for spilled and saved hidden states. shards: how many parts the text is cut into, which decides the
    order of all sums. savings: what is done to need less memory.
    """

    def __init__(
        self,
        model: StudiedModel,
        tokens: TokenSet,
        settings: Calibration,
        work: Path,
        resources: Resources = USUAL,
        savings: Savings = NO_SAVINGS,
        asked: Asked = EVERYTHING,
    ):
        self.model, self.checkpoint = model.skeleton, model.checkpoint
        self.structure, self.names = model.structure, model.names
        self.tokens, self.settings, self.fields = tokens, settings, asked.fields
        self.work, self.device, self.listen = work, resources.device, resources.listen
        self.ranks, self._owners, self._count = resources.ranks, asked.owners, settings.shards or 1
        self._savings, self._folds, self._learns = savings, asked.folds, asked.learns
        self._inputs = asked.inputs
        self._towers = () if tokens.inputs else self.structure.towers  # which text does not run through
        self._unfilled: tuple[str, ...] = ()  # modules outside of the blocks that can do without weights for now
        self._scratch = work if work.is_dir() else Path(tempfile.gettempdir())  # another machine may not see it
        several = {"shards": self._count} if self._count > 1 else {}
        self.identity: dict[str, Any] = {"text": tokens.fingerprint, **several}
        self.seed, self.remark = settings.seed, ""
        self.made_of: Mapping[str, str] = {}
        self.calibration: Mapping[str, Any] | None = None
        self._dtype = _torch_dtype(self.checkpoint.dtype)
        self.shards = [Shard(text, self._runner()) for text in shards_of(tokens.ids, self._count, self.ranks)]
        self._started = False
        self._saved_at = time.monotonic()
        self.notes: list[str] = []
        self._block_stats: tuple[int, BlockStats] | None = None
        self._classes: torch.Tensor | None = None
        self._said: set[str] = set()  # what is true of the whole model is said once

    def _runner(self) -> BlockRunner:
        """Runs the blocks over one shard."""
        return BlockRunner(
            self.model,
            self.structure,
            PartWeights(self._materialise, self._release),
            device=self.device,
            dtype=self._dtype,
            batch_size=1 if self.tokens.inputs else self._savings.batch_size or self.settings.batch_size,
            spill=Spill(self._scratch, self._savings.spill_bytes),
        )

    def _materialise(self, name: str) -> None:
        """Give a part of the model its weights; for the empty name, what is outside of the blocks."""
        from outlierq.load import leave_empty, load_tensors_into

        part = self.model.get_submodule(name) if name else self.model
        blocks = (block.name for block in self.structure.blocks)
        skip = () if name else (*blocks, *self._towers, *self._unfilled)
        dtype, device = self._dtype, self.device
        load_tensors_into(part, self.checkpoint, self.names, prefix=name, skip=skip, dtype=dtype, device=device)
        for tower in () if name else self._towers:
            leave_empty(self.model.get_submodule(tower), dtype=dtype, device=device)

    def _release(self, name: str) -> None:
        """Take the weights of a part again."""
        from outlierq.load import release

        release(self.model.get_submodule(name) if name else self.model)

    @property
    def sequential(self) -> bool:
        """Whether later blocks see the errors of earlier ones."""
        return self.settings.mode == "sequential"

    @property
    def paired(self) -> bool:
        """Whether the original model runs beside the quantized one. Its hidden states are not saved: `replay` runs."""
        return ("cross" in self.fields and self.sequential) or self._learns

    def start(self) -> None:
        """Record what blocks receive; hidden states of a stopped run are taken up where they were saved."""
        if self.settings.own_share and self.ranks.lead and self.work.is_dir():
            keep_tokens(self.work, original_of(self.checkpoint), self.settings, self.tokens)
        for shard in self.shards:
            tell = self._tell(0, "reading the text through the embeddings", shard)
            with looking_up(self.model, self.checkpoint, self.names, self._dtype, self.device) as self._unfilled:
                mine = slice(shard.text.first, shard.text.first + len(shard.text.ids))
                inputs = self.tokens.inputs[mine]
                shard.states = shard.runner.start(shard.text.ids, inputs=inputs, whole=True, progress=tell)
            self._unfilled = ()
            return_freed_memory()
            if self.paired:
                shard.originals = self._originals(shard)
            else:
                shard.at = load_hidden(self._saved(shard), shard.hidden, self._fingerprint)
            if self.sequential:
                shard.hidden.inputs = self._inputs
        self._started = True

    def _originals(self, shard: Shard) -> HiddenStates:
        """The second stream of hidden states. RecipeError where blocks hand on what only one stream can have."""
        if shard.runner.hands_on_more:
            raise RecipeError(
                f"{type(self.model).__name__} hands more than hidden states from block to block, so it cannot run "
                "beside its quantized self",
                hint="use a recipe that runs the text once for each block, such as gptq-w4, nvfp4 or mxfp4",
            )
        return shard.hidden.copied(Spill(self._scratch, self._savings.spill_bytes))

    def _tell(self, index: int, step: str, shard: Shard, part: int = 0, parts: int = 1) -> Callable[[float], None]:
        """Tells the listener how much of a step is done for block `index`; the shards take it one after another.

        part, parts: which of how many times the text is run for the step.
        """
        blocks, count = self.structure.blocks, len(self.shards) * parts
        before = part * len(self.shards) + next(at for at, each in enumerate(self.shards) if each is shard)
        name = blocks[index].name if blocks else ""

        def tell(share: float) -> None:
            self.listen(Event("calibrate", index, len(blocks), name, step=step, share=(before + share) / count))

        tell(0.0)
        return tell

    @property
    def _fingerprint(self) -> str:
        """What saved hidden states belong to."""
        return f"{self.tokens.fingerprint}/{self._count}"

    def _saved(self, shard: Shard) -> Path:
        """Where the hidden states of a shard are saved."""
        return self.work / SAVED.format(shard.text.index)

    def block(self, index: int) -> tuple[list[InputGroup], Mapping[str, InputStats]]:
        """Run one block over all tokens; find its groups, prove their folds, collect their statistics."""
        try:
            return self._collect(index)
        except NumbersError as error:
            self._blame_weights(index, error)
            raise

    def block_stats(self, index: int) -> BlockStats | None:
        """Statistics of the block that was given last, when `fields` asked for any."""
        held = self._block_stats
        return held[1] if held and held[0] == index else None

    def logits(self) -> LogitSample | None:
        """Final logits at a sample of positions, after the last block has finished; None on ranks that do not lead."""
        seed, total = self.settings.seed or 0, len(self.tokens.ids)
        try:
            mine = [
                sample_logits(s.runner, s.text.ids, s.hidden, seed=seed, part=(s.text.first, total))
                for s in self.shards
            ]
        except NumbersError as error:
            self._blame_weights(None, error)
            raise
        parts = [sample for samples in self.ranks.gather(mine) for sample in samples if sample is not None]
        return LogitSample.joined(parts) if self.ranks.lead else None

    def sensitivity(self) -> Sensitivity:
        """What an error of each linear costs at the end, over the first windows; this run is used up by it."""
        [shard] = self.shards
        count = max(1, SENSITIVE_TOKENS // shard.text.ids.shape[1])
        ids, inputs = shard.text.ids[:count], self.tokens.inputs[:count]
        blocks = self.structure.blocks
        hidden = shard.runner.start(ids, inputs=inputs)

        def tell(done: int, index: int, step: str) -> None:
            self.listen(Event("sensitivity", done, 2 * len(blocks), blocks[index].name, step=step))

        return measure_sensitivity(shard.runner, ids, hidden, self._scratch, seed=self.settings.seed or 0, tell=tell)

    def _collect(self, index: int) -> tuple[list[InputGroup], Mapping[str, InputStats]]:
        """The block's groups and statistics."""
        if not self._started:
            self.start()
        unseen = self._start_unseen(index)
        block, module = self._enter(index)
        groups = self.ranks.first(lambda: self._find_groups(block, module))
        return_freed_memory()
        observed: list[BlockObserver] = []
        said: list[str] = []
        owners = self._owners(groups, self.ranks)
        passes = in_passes(groups, self._savings.stats_bytes)
        spilled = SpilledStats(self._scratch) if len(passes) > 1 else None
        for number, some in enumerate(passes, start=1):
            merging, last = Merging(self._count), number == len(passes)
            for shard in self.shards:
                collector = self._collector(module, some, shard)
                if unseen is not None and shard.text.first == 0:
                    collector.follow(*self._collect_unseen(module, some, unseen))
                observer = self._observer(module, block, shard) if last else None
                with observer or nullcontext(), routing(module, "all" if self.settings.all_experts else "chosen"):
                    carry = last and not self.sequential
                    tell = self._tell(index, "statistics of its inputs", shard, number - 1, len(passes))
                    shard.runner.run(
                        module,
                        index,
                        shard.hidden,
                        collector,
                        replace=carry,
                        originals=None if shard.originals is None else Originals(shard.originals, last),
                        progress=tell,
                    )
                merging.add((0, shard.text.index), collector.finish())
                said += collector.notes
                observed += [observer] if observer else []
            stats = self._combine(some, owners, merging)
            if spilled is not None:
                spilled.put(stats)
        collected = stats if spilled is None else spilled
        if not self.sequential and not self._folds:
            self._release(block.name)  # nobody runs it again
        self.notes = [*dict.fromkeys(text for rank in self.ranks.share(said) for text in rank)]
        self.notes += tokens_note(groups, collected)
        if self._passes_over(index):
            self.notes.append(
                f"{block.name}: the model does not run it for this text, "
                "so its linears are rounded to nearest without statistics"
            )
        if index == 0:
            self.notes += [*self.tokens.notes, *([] if unseen or self.tokens.unseen is None else [UNPROVED])]
        self._combine_observed(index, observed)
        return groups, collected

    def _find_groups(self, block: Block, module: torch.nn.Module) -> list[InputGroup]:
        """Which sites share an input, and which folds are proved."""
        if self._passes_over(block.index):
            return unseen_groups(block)
        run_once = self._run_once(block.index)
        groups = find_groups(module, block, run_once)
        if self._folds:
            groups = prove_folds(module, block, groups, run_once, self.model.config)
            groups = without_shared(groups, {tensor for _, tensor in self.structure.tied})
        return seeing_all(groups) if self.settings.all_experts else groups

    def _passes_over(self, index: int) -> bool:
        """Whether the model does not run the block for the calibration text."""
        return bool(self.shards) and self.shards[0].runner.passes_over(index)

    def _run_once(self, index: int) -> RunOnce:
        """Runs a module in the place of a block, on noise like its input; for the lead, who has the first shard."""
        return self.shards[0].runner.run_once(index, self.shards[0].hidden)

    def _collector(self, module: torch.nn.Module, groups: list[InputGroup], shard: Shard) -> Collector:
        """Collects the statistics of one shard; of the rows that are kept in all, each shard keeps its part."""
        number = shard.text.index
        return Collector(
            module,
            [g for g in groups if g.sites and self.fields & ALL_FIELDS],
            # The first token counts as any other where none is seen by all.
            self.fields - {"first_rows"} if self.tokens.masked else self.fields,
            Sequences(self.settings.sequence_length, self.settings.skip_first_tokens, shard.text.ids),
            reservoir=max(1, (number + 1) * ROWS // self._count - number * ROWS // self._count),
            seed=(self.settings.seed or 0) + number,
            inputs=inputs_of(groups, self._inputs),
        )

    def _start_unseen(self, index: int) -> tuple[BlockRunner, HiddenStates] | None:
        """What the first block receives for tokens that the text does not hold; None for later ones, or if nothing."""
        unseen = self.tokens.unseen
        if index or unseen is None or self._passes_over(index) or not self.fields & OF_TOKENS:
            return None
        runner = self._runner()
        with looking_up(self.model, self.checkpoint, self.names, self._dtype, self.device) as self._unfilled:
            states = runner.start(unseen.windows)
        self._unfilled = ()
        return (runner, states) if reads_ids_alone(unseen.windows, states.values) else None

    def _collect_unseen(
        self, module: torch.nn.Module, groups: list[InputGroup], started: tuple[BlockRunner, HiddenStates]
    ) -> tuple[Collector, float]:
        """Sums of the first block over tokens that the text does not hold, and how many tokens each stands for."""
        unseen, (runner, states) = self.tokens.unseen, started
        assert unseen is not None, "they were started"
        skip = max(unseen.skip, self.settings.skip_first_tokens)
        collector = Collector(
            module,
            [g for g in groups if g.sites and self.fields & ALL_FIELDS],
            self.fields & OF_TOKENS,
            Sequences(unseen.windows.shape[1], skip),
            inputs=inputs_of(groups, self._inputs),
        )
        beside = Originals(states, replace=False) if self.paired else None
        with routing(module, "all" if self.settings.all_experts else "chosen"):
            runner.run(module, 0, states, collector, replace=False, originals=beside)
        text = self.tokens.ids[:, self.settings.skip_first_tokens :].numel()
        return collector, unseen.share / (1 - unseen.share) * text / unseen.windows[:, skip:].numel()

    def _combine(self, groups: list[InputGroup], owners: Mapping[str, int], merging: Merging) -> Statistics:
        """Statistics over all shards: each group's on the rank that owns it, and how many tokens on every rank."""
        mine: Statistics = {}
        for name in [name for group in groups for name in names_of(group)]:
            mine |= combined(self.ranks, merging, name, owners[name])
        counted = {name: bare(stats) for name, stats in mine.items()}
        everything = {name: stats for held in self.ranks.share(counted) for name, stats in held.items()}
        return sorted_by_group(groups, everything | mine)

    def _combine_observed(self, index: int, observed: list[BlockObserver]) -> None:
        """Keep on the lead what was asked of the block itself, over all shards."""
        if not self.fields & BLOCK_FIELDS:
            return
        parts = [part for held in self.ranks.gather([each.parts() for each in observed]) for part in held]
        if not self.ranks.lead:
            return
        whole = observed[0]
        for part in parts[1:]:
            whole.absorb(part)
        self._block_stats = index, whole.finish()
        self.notes += [text for text in whole.notes if text not in self._said]
        self._said.update(whole.notes)

    def _observer(self, module: torch.nn.Module, block: Block, shard: Shard) -> BlockObserver | None:
        """Watches what was asked of the block itself, if anything was."""
        if not self.fields & BLOCK_FIELDS:
            return None
        if "attention_mass" in self.fields and self._classes is None:
            from outlierq.calibrate.text.windows import token_classes
            from outlierq.load import load_tokenizer

            self._classes = token_classes(load_tokenizer(self.checkpoint), self.tokens.ids)
        return BlockObserver(
            module,
            block,
            self.fields,
            sequence_length=self.settings.sequence_length,
            ids=self.tokens.ids,
            classes=self._classes,
            first_sequence=shard.text.first,
        )

    def check_transformed(
        self, index: int, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]
    ) -> None:
        """Compare the block's float32 output on a probe with and without the folds."""
        if not self.ranks.lead or self._passes_over(index):
            return
        block = self.structure.blocks[index]
        run_once = self._run_once(index)
        probe = copy.deepcopy(self.model.get_submodule(block.name)).float()
        slots = tensor_parameters(probe, block)

        def output(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
            for name, parameter in slots.items():
                parameter.data = tensors[name].to(parameter.device).float()
            return run_once(probe)

        expected, actual = output(before), output(after)
        change = ((actual - expected).abs().max() / expected.abs().max()).item()
        if not change <= UNCHANGED:
            raise NumbersError(
                f"folding changed the float32 output of {block.name} by {change:.2e}, more than {UNCHANGED:g}",
                hint="this is a fault of outlierq; remove the `transform` section and report it",
            )

    def batches_to_learn(self, index: int) -> list[Batch]:
        """Block `index` on every batch of the text, between `block` and `finished`; empty where it does not run."""
        if not self._learns or self._passes_over(index):
            return []
        module = self.model.get_submodule(self.structure.blocks[index].name)
        return [
            Batch(shard.runner, module, index, number, shard.hidden, shard.original_outputs)
            for shard in self.shards
            for number in range(len(shard.hidden))
        ]

    def finished(self, index: int, tensors: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """Carry the hidden states past the block: static did so already, sequential runs the written weights.

        They are read from disk, as `replay` does: in memory they are not yet rounded to the dtype they are stored in.
        """
        block = self.structure.blocks[index]
        if self.sequential:
            self._run_with(block, tensors(), self.shards)
        self._leave(block)

    def replay(self, index: int, tensors: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """Run a block that is written already, unless the saved hidden states are past it."""
        if not self._started:
            self.start()
        behind = [shard for shard in self.shards if shard.at <= index]
        if not any(self.ranks.share(bool(behind))):
            return
        block, module = self._enter(index)
        for shard in behind if self.paired else ():
            tell = self._tell(index, "original outputs", shard)
            shard.runner.run(module, index, shard.original_outputs, progress=tell)
        if self.sequential:
            self._run_with(block, tensors(), behind)
        else:
            for shard in behind:
                shard.runner.run(module, index, shard.hidden, progress=self._tell(index, "outputs", shard))
        self._leave(block)

    def _blame_weights(self, index: int | None, error: NumbersError) -> None:
        """NumbersError with the name of a weight that is not finite itself, if that is where the trouble comes from.

        index: of the block that was running, None for what follows the blocks.
        """
        structure = self.structure
        inside = structure.blocks[index].tensors if index is not None else [s.weight for s in structure.outside_sites]
        for name in (*structure.outside_tensors, *inside):
            tensor = self.checkpoint.read(name)
            bad = int((~tensor.isfinite()).sum()) if tensor.is_floating_point() else 0
            if bad:
                raise NumbersError(
                    f"{name} holds {bad} NaN or Inf among {tensor.numel()} weights",
                    hint="the source checkpoint is damaged; get it again",
                ) from error

    def _enter(self, index: int) -> tuple[Block, torch.nn.Module]:
        """Give the block its original weights."""
        block = self.structure.blocks[index]
        self._materialise(block.name)
        return block, self.model.get_submodule(block.name)

    def _run_with(self, block: Block, tensors: Mapping[str, torch.Tensor], shards: Sequence[Shard]) -> None:
        """Run the block with other weights."""
        module = self.model.get_submodule(block.name)
        for name, parameter in tensor_parameters(module, block).items():
            parameter.data = tensors[name].to(parameter.device, parameter.dtype)
        for shard in shards:
            shard.runner.run(module, block.index, shard.hidden, progress=self._tell(block.index, "outputs", shard))

    def _leave(self, block: Block) -> None:
        """Drop the block's weights; now and then save the hidden states, where the work folder can be seen.

        Not of a model whose blocks hand on more than those: they run again after a stop.
        """
        self._release(block.name)
        for shard in self.shards:
            shard.at = max(shard.at, block.index + 1)
        old = not self.paired and time.monotonic() - self._saved_at > SAVE_EVERY_SECONDS
        enough = not any(shard.runner.hands_more for shard in self.shards)
        if old and enough and block.index + 1 < len(self.structure.blocks) and self.work.is_dir():
            for shard in self.shards:
                save_hidden(self._saved(shard), shard.hidden, self._fingerprint, shard.at)
            self._saved_at = time.monotonic()


def inputs_of(groups: Sequence[InputGroup], inputs: Mapping[str, ActivationScheme]) -> dict[str, ActivationScheme]:
    """How the client rounds the input of each group, where all its linears agree on that; their parts, too."""
    known = {each.name: {inputs.get(site.module) for site in each.sites} for each in all_groups(list(groups))}
    alike = {name: next(iter(schemes)) for name, schemes in known.items() if len(schemes) == 1}
    return {name: scheme for name, scheme in alike.items() if scheme is not None}


def in_shards(settings: Calibration, windows: int, ranks: Ranks, former: int | None) -> tuple[Calibration, str]:
    """The settings with a number of shards, and a sentence on it for the report, or an empty one.

    windows: how many there are. former: the number of a run that goes on. RecipeError for more shards than windows.
    """
    asked = settings.shards
    if asked is not None and asked > windows:
        raise RecipeError(
            f"calibration.shards is {asked}, but there are only {windows} windows of text",
            hint=f"set calibration.shards to {windows} or less, or give more text",
        )
    shards = asked or former or min(ranks.size, windows)
    remark = ""
    if shards < ranks.size:
        remark = (
            f"the calibration text ran in {shards} shards: {ranks.size - shards} of {ranks.size} processes had none"
        )
    elif asked is None and shards > 1:
        remark = f"the calibration text ran in {shards} shards; with calibration.shards={shards} any number of "
        remark += "processes gives the same"
    return settings.model_copy(update={"shards": shards}), remark


def token_set(
    model: StudiedModel, settings: Calibration, folder: Path | None = None, resources: Resources = USUAL
) -> TokenSet:
    """The tokens that the recipe asks for; OutlierqError when the model has no positions or embeddings for them.

    folder: where an earlier run may have kept text that the model wrote.
    """
    from outlierq.core.windows import check_ids, check_length
    from outlierq.load import load_tokenizer

    check_length(model.skeleton, settings.sequence_length, "calibration.sequence_length")
    tokenizer = load_tokenizer(model.checkpoint)
    tokens = text_windows(model, settings, tokenizer, folder, resources)
    if settings.images is not None:
        tokens = with_images(model, tokens, settings.images, tokenizer)
    check_ids(model.skeleton, tokens.ids, len(tokenizer))
    if tokens.inputs:
        return tokens
    tokens = _as_the_model_reads(model, tokens, settings, tokenizer)
    if tokens.masked and settings.own_share:
        raise RecipeError(
            f"{type(model.skeleton).__name__} sees later tokens, so it does not write from left to right",
            hint="set calibration.text to mix, or to a file",
        )
    return with_unseen(model, tokens, settings, tokenizer) if settings.unseen_tokens else tokens


def _as_the_model_reads(model: StudiedModel, tokens: TokenSet, settings: Calibration, tokenizer: Any) -> TokenSet:
    """The windows as they are, or partly hidden for a model that sees later tokens: it reads no others.

    A model with a mask token is asked, by its first block. SourceError for a mask token that the tokenizer lacks.
    """
    from outlierq.core.masking import PROBE_TOKENS, mask_token
    from outlierq.core.windows import limit_of, opening_tokens

    if tokenizer.mask_token_id is None and limit_of(model.skeleton, "mask_token_id") is None:
        return tokens
    run = StatsFromRun(model, tokens, settings, Path(tempfile.gettempdir()), asked=Asked(frozenset(), folds=False))
    if not run.shards[0].runner.sees_later_tokens(tokens.ids[:1, :PROBE_TOKENS]):
        return tokens
    token = mask_token(model.skeleton, tokenizer, model.checkpoint.source)
    return tokens if token is None else tokens.hidden_behind(token, len(opening_tokens(tokenizer)), settings.seed)


def _torch_dtype(name: str) -> torch.dtype:
    """float16 overflows in residual streams on a CPU; blocks run in bfloat16 or float32."""
    import torch

    return torch.float32 if name == "float32" else torch.bfloat16
