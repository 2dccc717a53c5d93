"""Where a block's statistics come from: a finished file, or the model run block by block while it is quantized."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from outlierq.calibrate.collect import ALL_FIELDS, BLOCK_FIELDS, Collector, stored_fields
from outlierq.calibrate.experts import routing, seeing_all, tokens_note
from outlierq.calibrate.folds import prove_folds, tensor_parameters
from outlierq.calibrate.groups import find_groups
from outlierq.calibrate.logits import sample_logits
from outlierq.calibrate.observe import BlockObserver
from outlierq.calibrate.runner import BlockRunner, HiddenStates
from outlierq.calibrate.stats_file import StatsReader
from outlierq.core.block_stats import BlockStats
from outlierq.core.errors import NumbersError, OutputError, StatsError
from outlierq.core.model import Block, Checkpoint, InputGroup, Structure
from outlierq.core.stats import InputStats
from outlierq.pipeline.events import Event, Listener, return_freed_memory, silent

if TYPE_CHECKING:
    import torch

    from outlierq.calibrate.text import TokenSet
    from outlierq.core.logits import LogitSample
    from outlierq.recipe import Calibration

SAVED = "hidden.safetensors"
# How much work a crash may cost: hidden states are saved when the last save is this old.
SAVE_EVERY_SECONDS = 60.0
# Largest relative change of a block's float32 output that a fold may cause.
FOLD_TOLERANCE = 1e-4


class StatsSource(Protocol):
    """Gives each block's groups and statistics in turn.

    identity: what the statistics belong to, as plain values; a run continues only with the same. seed: of their text.
    remark: a sentence for the report, or empty. notes: what was unusual in the block that was given last.
    """

    identity: dict[str, Any]
    seed: int | None
    remark: str
    notes: list[str]

    def block(self, index: int) -> tuple[list[InputGroup], dict[str, InputStats]]:
        """Input groups with their proved folds, and statistics by group name."""
        ...

    def block_stats(self, index: int) -> BlockStats | None:
        """Statistics of the block itself, once `block` has given its groups; None when none were asked for."""
        ...

    def check_transformed(
        self, index: int, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]
    ) -> None:
        """NumbersError when the block's float32 output differs between its tensors `before` and `after` folding."""
        ...

    def finished(self, index: int, tensors: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """The block is written; `tensors` gives its weights as they lie on disk, dequantized."""
        ...

    def replay(self, index: int, tensors: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """An earlier run has written this block; only carry the hidden states past it."""
        ...


class NoStats:
    """For data-free recipes: every linear is its own group, without statistics."""

    def __init__(self, structure: Structure, *, remark: str = ""):
        self.structure, self.remark = structure, remark
        self.identity: dict[str, Any] = {}
        self.seed: int | None = None
        self.notes: list[str] = []

    def block(self, index: int) -> tuple[list[InputGroup], dict[str, InputStats]]:
        """One group per site."""
        return [InputGroup(site.module, (site,)) for site in self.structure.blocks[index].sites], {}

    def block_stats(self, index: int) -> BlockStats | None:
        """There are none."""
        return None

    def check_transformed(
        self, index: int, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]
    ) -> None:
        """Without the model there is nothing to run."""

    def finished(self, index: int, tensors: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """Nothing to carry on."""

    def replay(self, index: int, tensors: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """Nothing to carry on."""


class StatsFromFile(NoStats):
    """Statistics of an earlier `outlierq calibrate`; no forward pass runs.

    Folds were proved on these very weights when the statistics were made, so they are not proved again.
    """

    def __init__(self, folder: Path, checkpoint: Checkpoint, structure: Structure, needs: frozenset[str]):
        super().__init__(structure)
        self.reader = StatsReader(folder)
        self.reader.check(checkpoint.fingerprint)
        found = self.reader.identity
        self.identity = {"statistics": found.to_json()}
        self.seed = found.settings["seed"]
        self.remark = f"statistics of an earlier calibration: {found.token_description}"
        held = frozenset(found.settings["fields"])
        missing = stored_fields(needs) - held
        if missing:
            raise StatsError(f"{folder} does not hold {', '.join(sorted(missing))}", hint="calibrate again")

    def block(self, index: int) -> tuple[list[InputGroup], dict[str, InputStats]]:
        """Read one block's file."""
        return self.reader.block(index)

    def block_stats(self, index: int) -> BlockStats | None:
        """As they were kept."""
        return self.reader.block_stats(index)


class StatsFromRun:
    """Statistics of the model run block by block.

    static: hidden states come from the original blocks; sequential: from the blocks as they were written.
    fields: what to keep (see InputStats and BlockStats). work: folder for spilled and saved hidden states.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        checkpoint: Checkpoint,
        structure: Structure,
        names: Mapping[str, str],
        tokens: TokenSet,
        settings: Calibration,
        *,
        fields: frozenset[str] = ALL_FIELDS,
        work: Path,
        device: str,
        listen: Listener = silent,
    ):
        from outlierq.load import load_tensors_into, release

        self.model, self.checkpoint, self.structure, self.names = model, checkpoint, structure, names
        self.tokens, self.settings, self.fields = tokens, settings, fields
        self.work, self.device, self.listen = work, device, listen
        self.identity: dict[str, Any] = {"text": tokens.fingerprint}
        self.seed, self.remark = settings.seed, ""
        dtype = _torch_dtype(checkpoint.dtype)
        block_names = [b.name for b in structure.blocks]

        def materialise(name: str) -> None:
            part = model.get_submodule(name) if name else model
            skip = () if name else block_names
            load_tensors_into(part, checkpoint, names, prefix=name, skip=skip, dtype=dtype, device=device)

        self._materialise = materialise
        self._release = lambda name: release(model.get_submodule(name) if name else model)
        self.runner = BlockRunner(
            model,
            structure,
            materialise=materialise,
            release=self._release,
            device=device,
            dtype=dtype,
            batch_size=settings.batch_size,
            work_folder=work,
        )
        self.hidden: HiddenStates | None = None
        self._at = 0  # index of the block whose inputs `hidden` holds
        self._saved_at = time.monotonic()
        self.notes: list[str] = []
        self._block_stats: tuple[int, BlockStats] | None = None
        self._classes: torch.Tensor | None = None
        self._said: set[str] = set()  # what is true of the whole model is said once

    @property
    def sequential(self) -> bool:
        """Whether later blocks see the errors of earlier ones."""
        return self.settings.mode == "sequential"

    def start(self) -> None:
        """Record what blocks receive; hidden states of a stopped run are taken up where they were saved."""
        self.listen(Event("calibrate", 0, len(self.structure.blocks), "reading the text through the embeddings"))
        self.hidden = self.runner.start(self.tokens.ids)
        return_freed_memory()
        self._at = _load_hidden(self.work / SAVED, self.hidden, self.tokens.fingerprint)

    def block(self, index: int) -> tuple[list[InputGroup], dict[str, InputStats]]:
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

    def logits(self) -> LogitSample:
        """Final logits at a sample of positions, after the last block has finished."""
        try:
            return sample_logits(self.runner, self.tokens.ids, self.hidden, seed=self.settings.seed or 0)
        except NumbersError as error:
            self._blame_weights(None, error)
            raise

    def _collect(self, index: int) -> tuple[list[InputGroup], dict[str, InputStats]]:
        """The block's groups and statistics."""
        if self.hidden is None:
            self.start()
        block, module = self._enter(index)
        run_once = self.runner.run_once(index, self.hidden)
        groups = find_groups(module, block, run_once)
        groups = prove_folds(module, block, groups, run_once, self.model.config)
        groups = seeing_all(groups) if self.settings.all_experts else groups
        return_freed_memory()
        collector = Collector(
            module,
            [g for g in groups if g.sites and self.fields & ALL_FIELDS],
            self.fields,
            sequence_length=self.settings.sequence_length,
            skip_first_tokens=self.settings.skip_first_tokens,
            seed=self.settings.seed or 0,
            ids=self.tokens.ids,
        )
        observer = self._observer(module, block)
        with observer or nullcontext(), routing(module, "all" if self.settings.all_experts else "chosen"):
            self.runner.run(module, index, self.hidden, collector, replace=not self.sequential)
        stats = collector.finish()
        self.notes = collector.notes + tokens_note(groups, stats)
        if observer:
            self._block_stats = index, observer.finish()
            self.notes += [text for text in observer.notes if text not in self._said]
            self._said.update(observer.notes)
        return groups, stats

    def _observer(self, module: torch.nn.Module, block: Block) -> BlockObserver | None:
        """Watches what was asked of the block itself, if anything was."""
        if not self.fields & BLOCK_FIELDS:
            return None
        if "attention_mass" in self.fields and self._classes is None:
            from outlierq.calibrate.text import token_classes
            from outlierq.load import load_tokenizer

            self._classes = token_classes(load_tokenizer(self.checkpoint), self.tokens.ids)
        return BlockObserver(
            module,
            block,
            self.fields,
            sequence_length=self.settings.sequence_length,
            ids=self.tokens.ids,
            classes=self._classes,
        )

    def check_transformed(
        self, index: int, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]
    ) -> None:
        """Compare the block's float32 output on a probe with and without the folds."""
        block = self.structure.blocks[index]
        run_once = self.runner.run_once(index, self.hidden)
        probe = copy.deepcopy(self.model.get_submodule(block.name)).float()
        slots = tensor_parameters(probe, block)

        def output(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
            for name, parameter in slots.items():
                parameter.data = tensors[name].to(parameter.device).float()
            return run_once(probe)

        expected, found = output(before), output(after)
        change = ((found - expected).abs().max() / expected.abs().max()).item()
        if not change <= FOLD_TOLERANCE:
            raise NumbersError(
                f"folding changed the float32 output of {block.name} by {change:.2e}, more than {FOLD_TOLERANCE:g}",
                hint="this is a fault of outlierq; remove the `transform` section and report it",
            )

    def finished(self, index: int, tensors: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """Carry the hidden states past the block: static did so already, sequential runs the written weights.

        They are read from disk, as `replay` does: in memory they are not yet rounded to the dtype they are stored in.
        """
        block = self.structure.blocks[index]
        if self.sequential:
            self._run_with(block, tensors())
        self._leave(block)

    def replay(self, index: int, tensors: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """Run a block that is written already, unless the saved hidden states are past it."""
        if self.hidden is None:
            self.start()
        if index < self._at:
            return
        block, module = self._enter(index)
        if self.sequential:
            self._run_with(block, tensors())
        else:
            self.runner.run(module, index, self.hidden)
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

    def _run_with(self, block: Block, tensors: Mapping[str, torch.Tensor]) -> None:
        """Run the block with other weights."""
        module = self.model.get_submodule(block.name)
        for name, parameter in tensor_parameters(module, block).items():
            parameter.data = tensors[name].to(parameter.device, parameter.dtype)
        self.runner.run(module, block.index, self.hidden)

    def _leave(self, block: Block) -> None:
        """Drop the block's weights; now and then save the hidden states."""
        self._release(block.name)
        self._at = block.index + 1
        if time.monotonic() - self._saved_at > SAVE_EVERY_SECONDS and self._at < len(self.structure.blocks):
            _save_hidden(self.work / SAVED, self.hidden, self.tokens.fingerprint, self._at)
            self._saved_at = time.monotonic()


def token_set(checkpoint: Checkpoint, settings: Calibration) -> TokenSet:
    """The tokens that the recipe asks for."""
    from outlierq.calibrate.text import token_windows
    from outlierq.load import load_tokenizer

    return token_windows(
        load_tokenizer(checkpoint),
        [text.model_dump(exclude_none=True) for text in settings.text],
        samples=settings.samples,
        sequence_length=settings.sequence_length,
        seed=settings.seed,
        chat_template=settings.chat_template,
    )


def _save_hidden(path: Path, hidden: HiddenStates, fingerprint: str, index: int) -> None:
    """Write the inputs of block `index`, atomically."""
    import os

    from safetensors import SafetensorError
    from safetensors.torch import save_file

    part = path.with_suffix(".part")
    try:
        save_file({"hidden": hidden.values.contiguous()}, part, {"tokens": fingerprint, "block": str(index)})
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"cannot save the hidden states to {path} ({hidden.values.nbytes:,} bytes): {error}",
            hint="free some space and run the same command again; it continues where it stopped",
        ) from error


def forget_hidden_beyond(work: Path, index: int) -> None:
    """Remove saved hidden states that are past block `index`, which has to run again."""
    path = work / SAVED
    if not path.is_file():
        return
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        beyond = int(file.metadata()["block"]) > index
    if beyond:
        path.unlink()


def _load_hidden(path: Path, hidden: HiddenStates, fingerprint: str) -> int:
    """Fill `hidden` from a saved file and return the block whose inputs it holds; 0 when there is none."""
    if not path.is_file():
        return 0
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        if metadata["tokens"] != fingerprint:
            return 0
        hidden.values.copy_(file.get_tensor("hidden"))
    return int(metadata["block"])


def _torch_dtype(name: str) -> Any:
    """float16 overflows in residual streams on a CPU; blocks run in bfloat16 or float32."""
    import torch

    return torch.float32 if name == "float32" else torch.bfloat16
