"""Conversion: the codes and scales of a compressed checkpoint, written in another format without any loss.

Before anything is written every weight is read once: its codes, zero points and scales must fit the other format as
they are. A scale may change its dtype only where that keeps its value; a symmetric weight is an asymmetric one whose
zero points are all in the middle, and the other way round.
"""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq import __version__
from outlierq.core.errors import RecipeError, SourceError, during
from outlierq.core.machine.record import signed
from outlierq.core.model import CarriedFile, Checkpoint, DerivedCheckpoint, LinearSite, TensorInfo
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.report import REPORT_NAME, STORED, Report
from outlierq.core.scheme import QuantScheme
from outlierq.export import format_type
from outlierq.export.writer import write_small
from outlierq.load import lasting_stamps
from outlierq.load.packed.described import STALE_FILES
from outlierq.pipeline.asked.events import Event, Listener, silent
from outlierq.pipeline.block.taken_over import taken_over
from outlierq.pipeline.checking.written import check_written
from outlierq.pipeline.ledger.folder import finish, working
from outlierq.pipeline.ledger.journal import Journal
from outlierq.pipeline.ledger.output import Output
from outlierq.pipeline.planning.decide import assembled
from outlierq.pipeline.planning.plan import OUTSIDE, Plan, SitePlan, unit_name
from outlierq.recipe import Export, Quantize, Recipe

if TYPE_CHECKING:
    import torch


class PackedSource(DerivedCheckpoint):
    """A compressed checkpoint as the source of a conversion to a format.

    `tensors` are those of the decoded checkpoint, with the bytes that are really stored. symmetric: whether weights
    without zero points stay so; when one of the checkpoint has some, all are written with them.
    """

    def __init__(self, stored: Checkpoint, format: str):
        from outlierq.load import described, unpacked

        super().__init__(stored)
        self._plain, self._format = unpacked(stored), format_type(format)
        if not described(stored):
            raise SourceError(f"{stored.source} is not compressed", hint="compress it with a recipe")
        if (described(stored) or {}).get("kv_cache_scheme"):
            raise SourceError(f"{stored.source} has scales of a KV cache, which a conversion would lose")
        self.config: dict[str, Any] = self._plain.config
        self.linears = self._plain.linears
        self.symmetric = True
        packed = {name: linear.members.values() for name, linear in self.linears.items()}
        self.tensors: dict[str, TensorInfo] = {
            name: replace(info, nbytes=sum(stored.tensors[member].nbytes for member in packed[name]))
            if name in packed
            else info
            for name, info in self._plain.tensors.items()
        }

    @property
    def files(self) -> tuple[CarriedFile, ...]:
        """The files of the checkpoint, without those that describe its former format."""
        return tuple(file for file in self._plain.files if file.name not in STALE_FILES)

    def read(self, name: str) -> torch.Tensor:
        """The tensor as stored, or decoded to float32; of any shape."""
        return self._plain.read(name)

    def quantized(self, name: str) -> QuantTensor:
        """A packed weight [out, in] as the format wants it. SourceError when that would change a number."""
        quantized = self._plain.quantized(name)
        quantized = quantized if self.symmetric else as_asymmetric(quantized)
        return with_scale_dtype(quantized, self._format.scale_dtype or quantized.scheme.scale_dtype, name)


def as_asymmetric(quantized: QuantTensor) -> QuantTensor:
    """The same numbers [out, in] with zero points, all of them 2^(bits - 1)."""
    import torch

    if quantized.zero_point is not None or quantized.scheme.kind != "int":
        return quantized
    middle = 1 << (quantized.scheme.bits - 1)
    codes = quantized.codes.to(torch.int8).view(torch.uint8) + middle  # wraps at 256: signed codes become unsigned
    zero_point = torch.full_like(quantized.scale, middle, dtype=torch.uint8)
    return replace(quantized, codes=codes, zero_point=zero_point, scheme=replace(quantized.scheme, symmetric=False))


def with_scale_dtype(quantized: QuantTensor, dtype: str, name: str) -> QuantTensor:
    """The same numbers [out, in] with scales in another dtype; SourceError when it cannot hold them."""
    import torch

    if quantized.scheme.scales != "plain":
        return quantized  # they have a dtype of their own
    scale = quantized.scale.to(getattr(torch, dtype))
    lost = int((scale.float() != quantized.scale.float()).sum())
    if lost:
        raise SourceError(
            f"{lost} of {scale.numel()} scales of {name} are no {dtype} numbers; writing them would change the weights",
            hint="compress the original checkpoint in the wanted format instead",
        )
    return replace(quantized, scale=scale, scheme=replace(quantized.scheme, scale_dtype=dtype))


def make_conversion(
    checkpoint: Checkpoint,
    format: str,
    *,
    max_shard_size: str = "5GB",
    listen: Listener = silent,
) -> Plan:
    """Read and check every weight, and plan the conversion. RecipeError or SourceError when it cannot be exact."""
    from outlierq.load import check_recorded, refuse_other_model, study

    check_recorded(checkpoint)
    if not format_type(format).holds_codes:
        raise RecipeError(f"{format} weights hold no codes; a conversion to them is not without loss")
    source = PackedSource(checkpoint, format)
    model = study(source)
    refuse_other_model(model)
    structure = model.structure
    packed = [site for site in structure.sites if site.weight in source.linears]
    schemes = _schemes(source, packed, listen)
    sites = tuple(SitePlan(site, schemes.get(site), "" if site in schemes else "kept") for site in structure.sites)
    target = format_type(format).of(source)
    faults = {site: target.obstacle(site, scheme) for site, scheme in schemes.items()}
    wrong = [(site, fault) for site, fault in faults.items() if fault]
    if wrong:
        raise RecipeError(
            f"{format} cannot hold {len(wrong)} of {len(schemes)} quantized weights, first {wrong[0][0].module}: "
            f"{wrong[0][1]}"
        )
    recipe = Recipe(
        name=f"conversion to {format}",
        quantize=Quantize(method=STORED, ignore=()),
        export=Export(format=format, max_shard_size=max_shard_size),
    )
    plan = assembled(model, sites, recipe, {})
    if plan.approximations:
        raise RecipeError(f"the conversion would not be exact: {plan.approximations[0]}")
    return plan


def _schemes(source: PackedSource, sites: list[LinearSite], listen: Listener) -> dict[LinearSite, QuantScheme]:
    """The scheme of every packed weight in the new format, each weight read and checked."""
    schemes: dict[LinearSite, QuantScheme] = {}
    for number, site in enumerate(sites):
        listen(Event("check", number, len(sites), site.module))
        with during("check", site.weight):
            schemes[site] = source.quantized(site.weight).scheme
    if len({scheme.symmetric for scheme in schemes.values()}) > 1:
        source.symmetric = False
        schemes = {site: replace(scheme, symmetric=False) for site, scheme in schemes.items()}
    return schemes


def convert(plan: Plan, out: Path, *, restart: bool = False, listen: Listener = silent) -> Report:
    """Carry out a plan of `make_conversion` and put the result at `out`, verified. An interrupted run continues."""
    from outlierq.pipeline.block.report import make_report
    from outlierq.pipeline.block.stats import NoStats
    from outlierq.pipeline.ledger.clock import Clock

    with working(out, restart=restart) as work:
        clock = Clock()
        identity = {"outlierq": __version__, "source": plan.checkpoint.fingerprint, "recipe": plan.recipe.fingerprint}
        journal = Journal(work, identity, clock.spent, files=plan.files, stamps=lasting_stamps(plan.checkpoint))
        journal.check_source(plan.checkpoint)
        with journal.told_of_stops(), closing(Output(plan, work, journal)) as output:
            with clock("export"):
                _units(plan, output, listen)
            with clock("verify"):
                write_small(work, plan.small_files)
                output.verify()
                check_written(work, plan.checkpoint)
                record = {"run": identity, **output.record()}
        report = signed(make_report(plan, out, journal, clock, NoStats(plan.structure)), record)
        write_small(work, {REPORT_NAME: (json.dumps(report.to_dict(), indent=1) + "\n").encode()})
        finish(work, out, plan.files)
    return report


def _units(plan: Plan, output: Output, listen: Listener) -> None:
    """Write what is outside of the blocks, then block by block; units that an earlier run finished stay."""
    structure = plan.structure
    outside = tuple(name for site in structure.outside_sites for name in (site.weight, site.bias) if name)
    units = [(OUTSIDE, structure.outside_once + outside, structure.outside_sites)]
    units += [(unit_name(block.index), block.tensors, block.sites) for block in structure.blocks]
    for number, (unit, names, sites) in enumerate(units):
        listen(Event("convert", number, len(units), unit))
        if unit not in output.entries:
            output.write(
                unit, names, {site: taken_over(plan.checkpoint, site) for site in sites if site in output.schemes}
            )
