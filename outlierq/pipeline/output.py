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

# Weights compared at a time, and the rows that share a word when zero points are packed along them.
PIECE_WEIGHTS = 1 << 18
ROWS_PER_WORD = 32

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
            self._read_back(site, result)
        self.writer.sync()
        rows = [asdict(row) for _, row in results.values()]
        digest = self.writer.hash(self._tensors_of(unit))
        entry = {"sha256": digest, "rows": rows, "transforms": list(transforms), "notes": list(notes)}
        self.journal.add(unit, entry)

    def _read_back(self, site: LinearSite, result: QuantTensor) -> None:
        """What lies on disk must decode to what was meant, bit for bit; some rows at a time."""
        stored = self._stored(site)
        step = max(1, PIECE_WEIGHTS // site.in_features // ROWS_PER_WORD) * ROWS_PER_WORD
        for start in range(0, site.out_features, step):
            stop = min(start + step, site.out_features)
            decoded = self._decode(site, stored, start, stop)
            compare(site.module, decoded, result.rows(start, stop).dequantize().cpu().to(decoded.dtype))

    def _stored(self, site: LinearSite) -> dict[str, torch.Tensor]:
        """The tensors of a quantized linear as they lie on disk, by the last part of their names."""
        specs = self.form.tensor_specs(site, self.plan.schemes[site])
        raw = self._from_disk([name for name, _, _ in specs])
        return {name.rpartition(".")[2]: value for name, value in raw.items()}

    def _decode(self, site: LinearSite, stored: dict[str, torch.Tensor], start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the weight, by the decoder that shares no code with the writer."""
        import torch

        from outlierq.load import decode_pack_quantized

        if "weight" in stored:
            return as_matrix(site, stored["weight"])[start:stop]
        bits = self.plan.schemes[site].bits
        zero_point = stored.get("weight_zero_point")
        if zero_point is not None:  # packed along the rows
            zero_point = zero_point[start * bits // 32 : -(-stop * bits // 32)]
        rows, columns = stored["weight_shape"].tolist()
        dense = decode_pack_quantized(
            stored["weight_packed"][start:stop],
            stored["weight_scale"][start:stop],
            zero_point,
            (min(stop, rows) - start, columns),
            bits,
        )
        return torch.from_numpy(dense)

    def written(self, block: Block) -> dict[str, torch.Tensor]:
        """The dense tensors of a block that is already on disk, under their source names."""
        sites = {s.weight: s for s in block.sites if s in self.plan.schemes}
        kept = self._from_disk([name for name in block.tensors if name not in sites])
        return {**kept, **{weight: from_matrix(site, self._whole(site)) for weight, site in sites.items()}}

    def _whole(self, site: LinearSite) -> torch.Tensor:
        """All rows of a quantized linear on disk, [out, in]."""
        return self._decode(site, self._stored(site), 0, site.out_features)

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
