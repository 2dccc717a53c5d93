"""The output of a run: units are encoded, written, read back from disk, compared, and entered in the journal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from math import lcm
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from outlierq.calibrate.stored.stats_file import check_made_of
from outlierq.core.errors import OutputError
from outlierq.core.machine.record import digest_of_unit, file_entry, weights_entry
from outlierq.core.model import Block, LinearSite, Piece, as_matrix, from_matrix
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.report import REPORT_NAME, SiteRow
from outlierq.export.writer import PIECE_BYTES, ShardWriter, compare
from outlierq.load import check_unchanged
from outlierq.ops.packing import ROWS_PER_WORD
from outlierq.pipeline.ledger.journal import Journal
from outlierq.pipeline.ledger.stacks import Stacks
from outlierq.pipeline.planning.plan import Plan

if TYPE_CHECKING:
    import torch

    from outlierq.load.source.shards import StoredTensor

PIECE_WEIGHTS = 1 << 21  # compared at a time


Results = Mapping[LinearSite, tuple[QuantTensor, SiteRow]]
# XXH3-128 of the bytes on disk by tensor name.
Digests = dict[str, bytes]


class Output:
    """The shards of a run in its work folder, and the journal of what is in them.

    `put_linear` and `put_tensor` may be called from several threads at once, `commit` from one. Without a journal
    nothing can be committed: that is for who writes on behalf of another process. made_of: digests of the tensors that
    statistics were made of, which must be those that are read here.
    """

    def __init__(self, plan: Plan, work: Path, journal: Journal | None):
        self.plan, self.work, self.journal = plan, work, journal
        self.schemes = plan.schemes
        self.format = plan.format
        self.writer = ShardWriter(work, plan.layout)
        self.stacks = Stacks(self.writer)
        self.committed: set[str] = set()
        self._told: set[str] = set(journal.read) if journal else set()
        self.made_of: dict[str, str] = dict(plan.checkpoint.made_of)
        self._digests: Digests = {}

    @property
    def entries(self) -> Mapping[str, dict[str, Any]]:
        """What the journal has of every finished unit."""
        assert self.journal is not None, "what writes for another process has no journal"
        return self.journal.entries

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
        quantized = {site.weight: (site, [result]) for site, (result, _) in results.items()}
        digests: Digests = {}
        for name in names:
            if name in quantized:
                digests |= self.put_linear(*quantized[name])
            elif name in folded:
                digests |= self.put_tensor(name, folded[name])
            else:
                digests |= self.copy(name)
        self.commit(unit, digests, [row for _, row in results.values()], transforms, notes)

    def put_linear(self, site: LinearSite, pieces: Iterable[QuantTensor]) -> Digests:
        """Write a quantized linear and read it back: the bytes must be those that were written, and decode to what was
        meant, bit for bit.

        pieces: its rows [some, in] in order, in one or more parts. Where the format keeps rows apart, each is written
        and read back while it is still in the cache.
        """
        place = self.format.stacked(site.weight)
        if place is not None:
            return self._put_stacked(site, QuantTensor.stack(list(pieces)), place)
        if not self._by_rows(site):
            pieces = [QuantTensor.stack(list(pieces))]
        digests: dict[str, Any] = {}
        first = self.format.number_in_stack(site.weight)
        next_row: Counter[str] = Counter()
        for piece in pieces:
            parts = self.format.encode(site, piece)
            if first is not None:
                next_row.update({name: first * site.out_features for name in parts if name not in next_row})
            for name, value in parts.items():
                row = self._row_of(name, value, next_row[name])
                if row is None and name in digests:
                    continue  # of the whole linear, and written with its first rows
                self.writer.write(name, value, row)
                digests[name] = self.writer.confirm(name, value, row, digests.get(name))
                next_row[name] += len(value) if value.ndim else 0
            # The parts are now known to be what lies on disk: reading them once is enough.
            self._check_decoded(site, parts, piece)
        return {name: digest.digest() for name, digest in digests.items()} if first is None else {}

    def _put_stacked(self, site: LinearSite, quantized: QuantTensor, piece: Piece) -> Digests:
        """The same for a linear whose rows lie in tensors of all experts; digests of those that are complete now."""
        parts = self.format.encode(site, quantized)
        self._check_decoded(site, parts, quantized)
        digests = [self.stacks.put(name, piece, value) for name, value in parts.items()]
        return {name: digest for made in digests for name, digest in made.items()}

    def _by_rows(self, site: LinearSite) -> bool:
        """Whether some rows of a linear can be encoded without the others."""
        return self.format.by_rows(site, self.schemes[site])

    def _row_of(self, name: str, value: torch.Tensor, row: int) -> int | None:
        """Where a part begins in its planned tensor; None when it is all of it."""
        return None if tuple(value.shape) == self.plan.layout.places[name].tensor.shape else row

    def _check_decoded(self, site: LinearSite, parts: Mapping[str, torch.Tensor], meant: QuantTensor) -> None:
        """What the parts decode to must be what was meant, bit for bit."""
        stored, rows = self._in_rows(site, parts), len(meant.codes)
        step = max(1, PIECE_WEIGHTS // site.in_features // self._aligned(meant)) * self._aligned(meant)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            compare(site.module, self._decode(site, stored, start, stop), meant.rows(start, stop))

    def put_tensor(self, name: str, tensor: torch.Tensor) -> Digests:
        """Write a tensor of any shape as it is, under the name and in the order of the format, and read it back.

        One that is a part of another has no digest of its own.
        """
        piece = self.format.stacked(name)
        if piece is not None:
            return self.stacks.put(piece.tensor, piece, tensor)
        place, digests = self.format.number_in_stack(name), {}
        for written, part in self.format.plains(name, tensor):
            row = None if place is None else place * len(part)
            self.writer.write(written, part, row)
            digests[written] = self.writer.confirm(written, part, row).digest()
        return digests if place is None else {}

    def copy(self, name: str) -> Digests:
        """Write a tensor of the source as it is; a large table some rows at a time, where the format takes it so."""
        import xxhash

        info = self.plan.checkpoint.tensors[name]
        if not self.format.copies_rows or info.nbytes <= PIECE_BYTES or not info.shape[0]:
            return self.put_tensor(name, self.plan.checkpoint.read(name))
        row, digest = 0, xxhash.xxh3_128()
        for piece in self.plan.checkpoint.read_rows(name, max(1, PIECE_BYTES * info.shape[0] // info.nbytes)):
            self.writer.write(name, piece, row)
            digest = self.writer.confirm(name, piece, row, digest)
            row += len(piece)
        return {name: digest.digest()}

    def commit(
        self,
        unit: str,
        digests: Digests,
        rows: Sequence[SiteRow],
        transforms: Sequence[Mapping[str, Any]] = (),
        notes: Sequence[str] = (),
        read: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """End a unit that is written and read back: force it onto the disk, then enter it in the journal.

        read: what another process has read for it. StatsError when statistics were made of other bytes.
        """
        self.writer.sync()
        check_unchanged(self.plan.checkpoint)
        read = {**self.newly_read(), **read}
        check_made_of(self.made_of, read)
        digests |= {name: self.writer.digest(name) for name in self._tensors_of(unit) if name not in digests}
        self.committed.add(unit)
        self._digests |= digests
        entry = {
            "xxh3_128": self._digest_of_unit(unit, digests),
            "rows": [asdict(row) for row in rows],
            "transforms": list(transforms),
            "notes": list(notes),
            "read": read,
        }
        assert self.journal is not None, "what writes for another process commits nothing"
        self.journal.add(unit, entry)

    def newly_read(self) -> dict[str, str]:
        """Digests of the source's tensors that were read since this was asked last."""
        read = list(self.plan.checkpoint.bytes_read.items())  # other threads go on reading
        new = {name: digest for name, digest in read if name not in self._told}
        self._told |= new.keys()
        return new

    def _digest_of_unit(self, unit: str, digests: Digests) -> str:
        """One digest of the digests of a unit's tensors, in file order."""
        return digest_of_unit(digests[name] for name in self._tensors_of(unit))

    def _aligned(self, result: QuantTensor) -> int:
        """Rows that can be decoded only together."""
        block = result.scheme.block
        return ROWS_PER_WORD if block is None else lcm(ROWS_PER_WORD, block[0])

    def _stored(self, site: LinearSite) -> dict[str, torch.Tensor]:
        """The tensors of a quantized linear as they lie on disk, by the last part of their names; weights [out, in]."""
        names = [name for name, _, _ in self.format.tensor_specs(site, self.schemes[site])]
        piece = self.format.stacked(site.weight)
        parts = {name: self._part(name, piece) for name in names} if piece else self._from_disk(names)
        return self._in_rows(site, parts)

    def _part(self, name: str, piece: Piece) -> torch.Tensor:
        """The rows of one expert's part in a tensor of all experts that is on disk."""
        from outlierq.load.source.shards import read_some_rows

        return read_some_rows(self._headers[name], [piece.expert])[0][piece.rows]

    def _in_rows(self, site: LinearSite, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A linear's tensors by the last part of their names, the weight [out, in]."""
        stored = {self.format.role(name): value for name, value in parts.items()}
        if "weight" in stored:
            stored["weight"] = as_matrix(site, stored["weight"])
        return stored | self.format.row_order(site)

    def _decode(
        self, site: LinearSite, stored: dict[str, torch.Tensor], start: int, stop: int
    ) -> QuantTensor | torch.Tensor:
        """Rows [start, stop), by a decoder that shares no code with the writer."""
        from outlierq.load import decode_rows

        shape = (site.out_features, site.in_features)
        return decode_rows(self.format.name, stored, self.schemes[site], shape, start, stop)

    def written(self, block: Block) -> dict[str, torch.Tensor]:
        """The dense tensors of a block that is already on disk, by source name, in the shapes of the source."""
        sites = {s.weight: s for s in block.sites if s in self.plan.schemes}
        dense = self._from_disk([name for name in block.tensors if name not in sites])
        return {**dense, **{weight: from_matrix(site, self._whole(site)) for weight, site in sites.items()}}

    def _whole(self, site: LinearSite) -> torch.Tensor:
        """All rows of a quantized linear on disk, [out, in]."""
        decoded = self._decode(site, self._stored(site), 0, site.out_features)
        return decoded.dequantize() if isinstance(decoded, QuantTensor) else decoded

    def verify(self) -> None:
        """Every tensor of the plan is on disk, and every unit's bytes are those the journal recorded.

        What this process wrote, it has read back already; units of an earlier one are read again.
        """
        self._check_headers()
        self.format.check_complete(self.work, self.plan.layout)
        for unit, entry in self.entries.items():
            if unit in self.committed:
                continue
            digests = {name: self.writer.digest(name) for name in self._tensors_of(unit)}
            if self._digest_of_unit(unit, digests) != entry["xxh3_128"]:
                raise OutputError(
                    f"the bytes of {unit} on disk are not those that were written",
                    hint="the disk is faulty or something else wrote there; run again with --restart",
                )
            self._digests |= digests

    def record(self) -> dict[str, Any]:
        """What lies in the work folder by file and by unit, once `verify` has passed (`core/machine/record.py`)."""
        sizes = self.plan.layout.sizes
        small = sorted(self.plan.files - sizes.keys() - {REPORT_NAME})
        files = {name: file_entry(self.work / name) for name in small}
        files |= {shard: self._entry_of_shard(shard, size) for shard, size in sizes.items()}
        return {"files": files, "units": {unit: entry["xxh3_128"] for unit, entry in self.entries.items()}}

    def _entry_of_shard(self, shard: str, size: int) -> dict[str, Any]:
        """The entry of a weight file, of digests that are known; a tensor that belongs to no unit is read for it."""
        inside = [place for place in self.plan.layout.places.values() if place.shard == shard]
        inside.sort(key=lambda place: (place.offset, place.tensor.nbytes, place.tensor.name))
        names = [place.tensor.name for place in inside]
        header = self.plan.layout.headers[shard]
        header = header[: inside[0].offset] if inside else header
        return weights_entry(size, header, (self._digests.get(name) or self.writer.digest(name) for name in names))

    def _check_headers(self) -> None:
        """Every planned tensor stands in the file's own header, at its place, where its bytes were confirmed."""
        planned = {(name, p.tensor.dtype, p.tensor.shape, p.offset) for name, p in self.plan.layout.places.items()}
        on_disk = {(name, t.info.dtype, t.info.shape, t.start) for name, t in self._headers.items()}
        wrong = sorted(planned ^ on_disk)
        if wrong:
            raise OutputError(f"{len(wrong)} tensor headers on disk differ from the plan, first {wrong[0]}")

    def close(self) -> None:
        """Close the shards."""
        self.writer.close()

    @cached_property
    def _by_unit(self) -> dict[str, list[str]]:
        """Output tensors by unit, in file order."""
        units: dict[str, list[str]] = {}
        for name, place in self.plan.layout.places.items():
            units.setdefault(place.tensor.unit, []).append(name)
        return units

    def _tensors_of(self, unit: str) -> list[str]:
        """Output tensors of a unit, in file order."""
        return self._by_unit.get(unit, [])

    @cached_property
    def _headers(self) -> dict[str, StoredTensor]:
        """Every tensor of the unfinished shards, by the headers as they lie on disk (they are written first)."""
        from outlierq.load import read_headers

        shards = (read_headers(self.format.container, self.work / name) for name in self.plan.layout.sizes)
        return {name: stored for shard in shards for name, stored in shard.items()}

    def _from_disk(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Tensors as they lie in the unfinished shards."""
        from outlierq.load.source.shards import read_stored

        pieces = {name: piece for name in names if (piece := self.format.stacked(name)) is not None}
        own = dict(read_stored(self._headers, [name for name in names if name not in pieces]))
        return own | {name: self._part(piece.tensor, piece) for name, piece in pieces.items()}
