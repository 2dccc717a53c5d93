"""The output of a run: units are encoded, written, read back from disk, compared, and entered in the journal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import OutputError
from outlierq.core.model import Block, LinearSite
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.report import SiteRow
from outlierq.export import exporter
from outlierq.export.writer import ShardWriter, check_complete, compare
from outlierq.pipeline.journal import Journal
from outlierq.pipeline.plan import Plan

if TYPE_CHECKING:
    import torch

Results = Mapping[LinearSite, tuple[QuantTensor, SiteRow]]


class Output:
    """The shards of a run in its work folder, and the journal of what is in them."""

    def __init__(self, plan: Plan, work: Path, journal: Journal):
        self.plan, self.work, self.journal = plan, work, journal
        self.form = exporter(plan.recipe.export.format)
        self.writer = ShardWriter(work, plan.layout)

    def write(
        self,
        unit: str,
        names: tuple[str, ...],
        results: Results,
        folded: Mapping[str, torch.Tensor] = MappingProxyType({}),
        transforms: Sequence[Mapping[str, Any]] = (),
        notes: Sequence[str] = (),
    ) -> None:
        """Write a unit: quantized linears in the format's own tensors, folded tensors, and all others as stored.

        transforms, notes: for the report; they go into the journal, so that a resumed run still knows them.
        """
        quantized = {site.weight: (site, result) for site, (result, _) in results.items()}
        for name in names:
            if name in quantized:
                for part, value in self.form.encode(*quantized[name]).items():
                    self.writer.write(part, value)
            elif name in folded:
                self.writer.write(name, folded[name])
            else:
                self.writer.write(name, self.plan.checkpoint.read(name))
        for site, (result, _) in results.items():
            expected = result.dequantize().cpu()
            decoded = self.decode(site)
            compare(site.module, decoded, expected.to(decoded.dtype))
        self.writer.sync()
        rows = [asdict(row) for _, row in results.values()]
        digest = self.writer.hash(self._tensors_of(unit))
        entry = {"sha256": digest, "rows": rows, "transforms": list(transforms), "notes": list(notes)}
        self.journal.add(unit, entry)

    def decode(self, site: LinearSite) -> torch.Tensor:
        """One quantized linear as it lies on disk, [out, in]; the decoder shares no code with the writer."""
        import torch

        from outlierq.load import decode_pack_quantized

        scheme = self.plan.schemes[site]
        raw = self._from_disk([name for name, _, _ in self.form.tensor_specs(site, scheme)])
        if site.weight in raw:
            return as_matrix(site, raw[site.weight])
        parts = {name.rpartition(".")[2]: value for name, value in raw.items()}
        dense = decode_pack_quantized(
            parts["weight_packed"],
            parts["weight_scale"],
            parts.get("weight_zero_point"),
            tuple(parts["weight_shape"].tolist()),
            scheme.bits,
        )
        return torch.from_numpy(dense)

    def written(self, block: Block) -> dict[str, torch.Tensor]:
        """The dense tensors of a block that is already on disk, under their source names."""
        sites = {s.weight: s for s in block.sites if s in self.plan.schemes}
        kept = self._from_disk([name for name in block.tensors if name not in sites])
        return {**kept, **{weight: from_matrix(site, self.decode(site)) for weight, site in sites.items()}}

    def verify(self) -> None:
        """Every tensor of the plan is on disk, and every unit's bytes are those the journal recorded."""
        check_complete(self.work, self.plan.layout)
        for unit, entry in self.journal.entries.items():
            if self.writer.hash(self._tensors_of(unit)) != entry["sha256"]:
                raise OutputError(
                    f"the bytes of {unit} on disk are not those that were written",
                    hint="the disk is faulty or something else wrote there; run again with --restart",
                )

    def close(self) -> None:
        """Close the shards."""
        self.writer.close()

    def _tensors_of(self, unit: str) -> list[str]:
        """Output tensors of a unit, in file order."""
        return [name for name, place in self.plan.layout.places.items() if place.tensor.unit == unit]

    def _from_disk(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Tensors as they lie in the unfinished shards, found by the header that was read back."""
        from outlierq.load.shards import read_header, read_stored

        found: dict[str, torch.Tensor] = {}
        for shard in {self.plan.layout.places[name].shard for name in names}:
            stored = read_header(self.work / shard)
            found |= dict(read_stored(stored, [name for name in names if name in stored]))
        return found


def as_matrix(site: LinearSite, stored: torch.Tensor) -> torch.Tensor:
    """The logical [out, in] weight of a stored tensor (Conv1D stores [in, out])."""
    return stored.T.contiguous() if site.transposed else stored


def from_matrix(site: LinearSite, matrix: torch.Tensor) -> torch.Tensor:
    """The inverse of `as_matrix`."""
    return matrix.T.contiguous() if site.transposed else matrix
