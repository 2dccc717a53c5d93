"""`outlierq adapter`: what rounding took from a checkpoint, as far as a low rank holds it, as a LoRA adapter of PEFT.

LoRC (Yao et al. 2023, arXiv:2303.08302), with the closed form for output errors of `ops/low_rank.py`. The compressed
checkpoint stays as it is, and loads with the adapter on it in every program that knows LoRA.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import ArgumentError, OutputError, SourceError, during
from outlierq.core.machine.own_files import write_atomically
from outlierq.core.model import Checkpoint, LinearSite, as_matrix
from outlierq.core.report import Shown
from outlierq.pipeline.asked.events import Event
from outlierq.pipeline.asked.resources import USUAL, Resources
from outlierq.pipeline.detect import from_folder
from outlierq.pipeline.studying.stacks import SINK_WEIGHT

if TYPE_CHECKING:
    import torch

    from outlierq.core.stats import InputStats

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
DAMP = 0.01
MOST_CHANGE = 0.9  # of a weight, by what rounding changes: beyond, it is another weight


@dataclass(frozen=True)
class AdapterRow:
    """One linear. before, after: relative squared output error of what is stored, without and with the adapter."""

    site: str
    before: float
    after: float


@dataclass(frozen=True)
class Adapter(Shown):
    """What was written. parameters, nbytes: of the adapter. bits_per_weight: that it adds to the linears it is for."""

    out: str
    rank: int
    parameters: int
    nbytes: int
    bits_per_weight: float
    rows: tuple[AdapterRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @property
    def before(self) -> float:
        """Mean output error without the adapter."""
        return sum(row.before for row in self.rows) / len(self.rows)

    @property
    def after(self) -> float:
        """Mean output error with it."""
        return sum(row.after for row in self.rows) / len(self.rows)


def make_adapter(
    source: Checkpoint, compressed: Checkpoint, stats: Path, out: Path, *, rank: int, resources: Resources = USUAL
) -> Adapter:
    """Write the adapter of a checkpoint that was made of `source`. stats: of `outlierq calibrate` on `source`.

    OutlierqError when scales have moved between the tensors of the two, for a rank beyond a linear's smaller side, and
    for a folder that holds something.
    """
    from outlierq.load import served

    _check_place(out)
    _check_only_rounded(source, compressed)
    original, rounded = served(source), served(compressed)
    statistics = from_folder(stats, source)
    tensors: dict[str, torch.Tensor] = {}
    rows: list[AdapterRow] = []
    weights = 0
    for block in statistics.blocks:
        resources.listen(Event("adapter", block.index, statistics.total, f"block {block.index}"))
        for group in block.groups:
            members = [site for site in group.sites if site.weight in rounded.packed and site.expert is None]
            known = block.inputs.get(group.name)
            if not members or known is None or not known.tokens:
                continue
            _check_rank(members, rank)
            with during("adapter", group.name):
                done = _of_group(members, original, rounded, known.weighing_sinks(SINK_WEIGHT), rank)
            for site, (pair, row) in done.items():
                tensors |= {f"{PREFIX}{site.module}.lora_{name}.weight": each for name, each in pair.items()}
                rows.append(row)
                weights += site.out_features * site.in_features
    resources.listen(Event("adapter", statistics.total, statistics.total))
    if not rows:
        raise SourceError(
            f"{compressed.source} holds no rounded linear whose input is in {stats}", hint="give its compressed folder"
        )
    _write(out, tensors, rank, compressed)
    count = sum(tensor.numel() for tensor in tensors.values())
    size = sum(tensor.nbytes for tensor in tensors.values())
    return Adapter(str(out), rank, count, size, 8 * size / weights, tuple(rows))


def _check_place(out: Path) -> None:
    """OutputError for a folder that holds anything but an earlier adapter."""
    others = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if out.exists() and (not out.is_dir() or set(others) - {CONFIG, WEIGHTS}):
        raise OutputError(f"{out} holds something else ({', '.join(others[:3])})", hint="give a new or empty folder")


def _check_only_rounded(source: Checkpoint, compressed: Checkpoint) -> None:
    """SourceError when a tensor that was not rounded has other values than in the source."""
    import torch

    plain = [name for name in source.tensors if name in compressed.tensors and name not in compressed.packed]
    for name in plain:
        info = source.tensors[name]
        if len(info.shape) == 1 and not torch.equal(source.read(name).float(), compressed.read(name).float()):
            raise SourceError(
                f"{name} of {compressed.source} has other values than in {source.source}: its recipe moved scales",
                hint="an adapter fits a recipe that only rounds, such as gptq-w4, rtn-w4 or nvfp4",
            )


def _check_rank(members: Sequence[LinearSite], rank: int) -> None:
    """ArgumentError for a rank that a linear cannot have."""
    for site in members:
        if rank > min(site.out_features, site.in_features):
            raise ArgumentError(
                f"{rank} is more than {site.module} [{site.out_features}, {site.in_features}] can have", argument="rank"
            )


def _of_group(
    members: Sequence[LinearSite], original: Checkpoint, rounded: Checkpoint, stats: InputStats, rank: int
) -> Mapping[LinearSite, tuple[dict[str, torch.Tensor], AdapterRow]]:
    """A [rank, in] and B [out, rank] of the linears with one input, and their errors; A is the same for all of them."""
    import torch

    from outlierq.ops.errors import output_error
    from outlierq.ops.low_rank import low_rank

    dtype = getattr(torch, original.dtype)
    before = [as_matrix(site, original.read(site.weight)).float() for site in members]
    after = [as_matrix(site, rounded.read(site.weight)).float() for site in members]
    _check_alike(members, before, after)
    hessian = stats.need("hessian")
    change = torch.cat([w - q for w, q in zip(before, after, strict=True)])
    down, up = (each.to(dtype) for each in low_rank(change, hessian, rank, DAMP))
    done = {}
    for site, w, q, part in zip(members, before, after, up.split([len(w) for w in before]), strict=True):
        power = output_error(w, hessian).item() or 1.0
        left = q + part.float() @ down.float() - w
        errors = [output_error(lost, hessian).item() / power for lost in (q - w, left)]
        done[site] = {"A": down.clone(), "B": part.contiguous()}, AdapterRow(site.module, *errors)
    return done


def _check_alike(members: Sequence[LinearSite], before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> None:
    """SourceError when a weight is not the other one rounded. before, after: [out, in] of every member."""
    for site, w, q in zip(members, before, after, strict=True):
        if (q - w).norm() > MOST_CHANGE * w.norm():
            raise SourceError(
                f"{site.weight} is not that of the source rounded: it differs by {(q - w).norm() / w.norm():.0%}",
                hint="give the checkpoint that it was made of, and a recipe that only rounds",
            )


def _write(out: Path, tensors: Mapping[str, torch.Tensor], rank: int, compressed: Checkpoint) -> None:
    """The two files that PEFT reads. OutputError when they cannot be written."""
    from safetensors.torch import save

    modules = {name.removeprefix(PREFIX).rpartition(".lora_")[0].rpartition(".")[2] for name in tensors}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": compressed.path.name,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(modules),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / WEIGHTS, save(dict(tensors), metadata={"format": "pt"}))
        write_atomically(out / CONFIG, (json.dumps(config, indent=1) + "\n").encode())
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror or error}") from error
