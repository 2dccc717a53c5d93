"""A mixture with fewer experts, as a checkpoint on top of the checkpoint: what comes after works as on any other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq.calibrate.stored.stats_file import StatsReader
from outlierq.core.errors import RecipeError
from outlierq.core.model import EXPERT_COUNTS, TOP_K, Block, Checkpoint, Piece, Structure, TensorInfo
from outlierq.pipeline.remodel.derived import RemodelledCheckpoint
from outlierq.registry import Method

if TYPE_CHECKING:
    import torch

# What configs call the number of groups of experts, and of those chosen for a token.
GROUPS, TOP_K_GROUPS = "n_group", "topk_group"


class PrunedCheckpoint(RemodelledCheckpoint):
    """A checkpoint without some experts; those that stay are numbered anew.

    renamed: name of every tensor -> its name in the original. rows: tensors of which only these rows stay. decided:
    whether statistics have said which experts stay; else the sizes are right, and no tensor can be read.
    """

    def __init__(
        self,
        original: Checkpoint,
        renamed: Mapping[str, str],
        rows: Mapping[str, torch.Tensor],
        config: dict[str, Any],
        identity: Any,
        notes: tuple[str, ...],
        decided: bool = True,
    ):
        super().__init__(original, identity)
        self._renamed, self._rows = renamed, rows
        self.config, self.notes = config, notes
        self.method: str = identity[0]
        self.survivors: dict[str, list[int]] = identity[1]
        self._decided = decided
        self.tensors: dict[str, TensorInfo] = {name: self._info(name) for name in renamed}

    def _info(self, name: str) -> TensorInfo:
        """The header of a tensor."""
        info = replace(self.original.tensors[self._renamed[name]], name=name)
        if name not in self._rows:
            return info
        count = len(self._rows[name])
        return replace(info, shape=(count, *info.shape[1:]), nbytes=info.nbytes // info.shape[0] * count)

    def piece(self, name: str) -> Piece | None:
        """The experts that stay are not those of a tensor of the source."""
        return None

    def read(self, name: str) -> torch.Tensor:
        """The tensor of any shape, or the rows of it that stay."""
        if not self._decided:
            raise RecipeError(
                f"{self.method} needs statistics of this model to say which experts stay, and got none",
                hint="run `outlierq calibrate MODEL -o stats` and set the option stats_folder: stats; "
                "`outlierq quantize` without it makes them itself",
            )
        tensor = self.original.read(self._renamed[name])
        return tensor[self._rows[name]] if name in self._rows else tensor

    def making_bytes(self, name: str) -> int:
        """Upper bound of what reading a tensor holds beside the tensor itself."""
        before = self._renamed[name]
        return self.original.making_bytes(before) + (self.original.tensors[before].nbytes if name in self._rows else 0)


def pruned(
    checkpoint: Checkpoint,
    method: Method,
    options: Mapping[str, Any],
    *,
    stats: Path | None = None,
    experts: Mapping[str, list[int]] | None = None,
) -> PrunedCheckpoint:
    """The checkpoint with the experts that the method keeps. RecipeError when the model has none to drop.

    stats: statistics of this model, used where the options name none; without any the plan alone can be made. experts:
    what the method kept in an earlier run, by block; then it is not asked again.
    """
    from outlierq.load import study

    model = study(checkpoint)
    skeleton, structure = model.skeleton, model.structure
    config = skeleton.config.get_text_config()
    blocks = [block for block in structure.blocks if _experts(block)]
    if not blocks:
        raise RecipeError(
            f"{type(skeleton).__name__} has no experts that are stored apart", hint=f"remove {method.name}"
        )
    reader = None if experts else _reader(checkpoint, options.get("stats_folder") or stats)
    survivors = _as_before(blocks, experts) if experts else _by_method(reader, method, options, blocks, config)
    _check_enough(config, len(next(iter(survivors.values()))))
    total = len(_experts(blocks[0]))
    renamed, rows = _tensors(checkpoint, structure, survivors)
    remaining = len(next(iter(survivors.values())))
    said = [f"{method.name}: {remaining} of {total} experts are kept in each of {len(blocks)} blocks; a smaller model"]
    decided = bool(experts) or reader is not None
    if not decided:
        said += [f"{method.name}: which experts go is decided once the model has run over the calibration text"]
    else:
        said += [f"{block.name}: without the experts {_dropped(survivors[block.index], total)}" for block in blocks]
    numbers = {str(index): choice.tolist() for index, choice in survivors.items()}
    changed = _config(checkpoint.config, total, remaining)
    identity = [method.name, numbers]
    pruned = PrunedCheckpoint(checkpoint, renamed, rows, changed, identity, tuple(said), decided=decided)
    pruned.made_of = {**checkpoint.made_of, **(reader.made_of if reader else {})}
    return pruned


def _by_method(
    reader: StatsReader | None, method: Method, options: Mapping[str, Any], blocks: list[Block], config: Any
) -> dict[int, torch.Tensor]:
    """Numbers of the experts that the method keeps, by block."""
    groups = getattr(config, GROUPS, None) or 1
    return {block.index: _of_block(reader, method, options, block, groups) for block in blocks}


def _as_before(blocks: list[Block], experts: Mapping[str, list[int]]) -> dict[int, torch.Tensor]:
    """Numbers of the experts that an earlier run kept, by block. RecipeError when they are not of this model."""
    import torch

    strange = [b.name for b in blocks if not set(experts.get(str(b.index), [-1])) <= set(range(len(_experts(b))))]
    if strange:
        raise RecipeError(f"the record keeps experts of {strange[0]} that this model does not have")
    return {block.index: torch.tensor(experts[str(block.index)]) for block in blocks}


def _experts(block: Block) -> list[str]:
    """Names of the block's experts, in their order."""
    return list(dict.fromkeys(site.expert for site in block.sites if site.expert is not None))


def _dropped(survivors: torch.Tensor, total: int) -> str:
    """The numbers that are missing."""
    return ", ".join(str(number) for number in range(total) if number not in set(survivors.tolist())) or "(none)"


def _reader(checkpoint: Checkpoint, folder: Path | str | None) -> StatsReader | None:
    """The statistics in a folder. StatsError when they are of another model."""
    if folder is None:
        return None
    from outlierq.load import tokenizer_digest

    reader = StatsReader(Path(folder))
    reader.check(checkpoint.fingerprint, tokenizer_digest(checkpoint))
    return reader


def _of_block(
    reader: StatsReader | None, method: Method, options: Mapping[str, Any], block: Block, groups: int
) -> torch.Tensor:
    """Numbers of the experts of one block that stay; without statistics as many of them, whichever."""
    import torch

    from outlierq.core.measured.block_stats import BlockStats

    if reader is not None:
        stats = reader.block_stats(block.index) or BlockStats()
    else:
        count = len(_experts(block))
        stats = BlockStats(expert_tokens=torch.ones(count), expert_saliency=torch.ones(count))
    survivors: torch.Tensor = method.function(stats, groups, **options)
    return survivors


def _check_enough(config: Any, remaining: int) -> None:
    """RecipeError when the router would have too few experts to choose from."""
    groups, allowed = getattr(config, GROUPS, None) or 1, getattr(config, TOP_K_GROUPS, None) or 1
    usable = remaining // groups * (allowed if groups > 1 else 1)
    top_k = next((getattr(config, name) for name in TOP_K if isinstance(getattr(config, name, None), int)), 1)
    # Routers with groups rate each by its two best experts.
    if usable < top_k or (groups > 1 and remaining // groups < 2):
        raise RecipeError(
            f"a token is sent to {top_k} experts, but only {usable} of {remaining} would be there to choose from",
            hint="prune a smaller share",
        )


def _tensors(
    checkpoint: Checkpoint, structure: Structure, survivors: Mapping[int, torch.Tensor]
) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Name of every tensor that stays -> its name in the original; and the rows that stay, where not all do."""
    renamed = {name: name for name in checkpoint.tensors}
    rows: dict[str, torch.Tensor] = {}
    for block in structure.blocks:
        if block.index not in survivors:
            continue
        experts = _experts(block)
        of = [[site for site in block.sites if site.expert == expert] for expert in experts]
        for sites in of:
            for site in sites:
                del renamed[site.weight]
        for number, old in enumerate(survivors[block.index].tolist()):
            renamed |= {new.weight: site.weight for new, site in zip(of[number], of[old], strict=True)}
        for name in _router_tensors(checkpoint, block, len(experts)):
            rows[name] = survivors[block.index]
    return renamed, rows


def _router_tensors(checkpoint: Checkpoint, block: Block, count: int) -> list[str]:
    """Tensors of the block's router that have a row or a number for each expert: weight, bias, correction of scores."""
    routers = [s for s in block.sites if s.kind == "Router" and s.out_features == count]
    prefixes = tuple(f"{site.weight.removesuffix('.weight')}." for site in routers)
    inside = [name for name in block.tensors if name.startswith(prefixes)]
    return [name for name in inside if checkpoint.tensors[name].shape[:1] == (count,)]


def _config(config: dict[str, Any], total: int, remaining: int) -> dict[str, Any]:
    """The config, and those nested in it, with the new number of experts."""
    nested = {key: value for key, value in config.items() if isinstance(value, dict)}
    experts = {key: value for key, value in nested.items() if set(EXPERT_COUNTS) & value.keys()}
    changed = config | {key: _config(value, total, remaining) for key, value in experts.items()}
    return changed | {key: remaining for key in EXPERT_COUNTS if config.get(key) == total}
