"""Rotations merged into the weights: QuaRot's and SpinQuant's R1 and R2. arXiv:2404.00456, arXiv:2405.16406.

An orthogonal matrix spreads outliers over all channels, and its inverse is merged into whatever reads them, so the
model computes what it did. Two kinds cost nothing when the model runs, and only these are made (the papers' R1, R2):

    residual stream   h -> h R   tables E R, readers W diag(g) R, writers R^T W, R^T b; g is the gain of the norm before
    values            v -> v R   per head: rows of v_proj R^T W, R^T b; columns of o_proj W R

RMSNorm without gain commutes with R because it looks at the length of a vector only, so gains move into the readers.
LayerNorm also subtracts the mean. There every writer is made to write vectors without mean (arXiv:2305.14858), which
LayerNorm would remove anyway, and R keeps the all-ones vector. The stock class then loads the result, as a norm with
gain 1. Embeddings are centred for LayerNorm only: for RMSNorm it would change the model.

A LayerNorm's bias b moves into the readers' biases, W b. Readers without one (a head) get it through a direction that
they never use: the output of a LayerNorm without gain has no mean, so the mean of a row of W is free. It becomes
W b / n, and the norm's bias 1. No division by a gain is needed, and nothing is lost.

A Hadamard matrix makes channels alike only where they do not depend on each other. In the basis of the eigenvectors V
of their covariance they do not, so V H makes the energy of all channels equal (the KLT-enhanced rotation of MambaQuant,
arXiv:2501.13484; of the weights that read the stream, as OSTQuant begins, arXiv:2501.13987).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from outlierq.core.errors import RecipeError
from outlierq.core.model import LinearSite, TensorInfo
from outlierq.ops.hadamard import Rotation
from outlierq.registry import rewriter

if TYPE_CHECKING:
    Read = Callable[[str], torch.Tensor]

# Weights rotated at a time where rows are independent: 8 MB in float64.
PIECE_WEIGHTS = 1 << 20
# Copies in float64 that are there at once, at most: before and after each of two rotations, and places picked out.
COPIES = 6


@dataclass(frozen=True)
class Norm:
    """A norm that reads the residual stream, and every linear that reads it. weight, bias: tensor names.

    offset: the gain is 1 + weight. centred: it subtracts the mean (LayerNorm). uniform: all gains are equal, and there
    is no bias; it then commutes with rotations as it is.
    """

    weight: str
    bias: str | None
    offset: bool
    centred: bool
    readers: tuple[LinearSite, ...]
    uniform: bool = False

    @property
    def bias_in_mean(self) -> bool:
        """Whether the bias goes through the mean of the readers' rows, for want of a bias in one of them."""
        return self.bias is not None and any(site.bias is None for site in self.readers)


@dataclass(frozen=True)
class ValuePath:
    """Linears between which a rotation of each head cancels. heads: [query heads][head_dim] rows of the producer that
    feed the consumers' columns, in their order; heads that share a key-value head have the same rows.
    """

    block: int
    producer: LinearSite
    consumers: tuple[LinearSite, ...]
    heads: tuple[tuple[int, ...], ...]

    @property
    def rows(self) -> tuple[tuple[int, ...], ...]:
        """Rows of the producer by key-value head, each once."""
        return tuple(dict.fromkeys(self.heads))

    @property
    def columns(self) -> tuple[tuple[int, ...], ...]:
        """Columns of the consumers by query head."""
        size = len(self.heads[0])
        return tuple(tuple(range(head * size, (head + 1) * size)) for head in range(len(self.heads)))

    @property
    def parts(self) -> tuple[int, ...]:
        """The key-value head of every query head."""
        number = {rows: at for at, rows in enumerate(self.rows)}
        return tuple(number[rows] for rows in self.heads)


@dataclass(frozen=True)
class ScalePath:
    """Linears between which a scale of each channel cancels. index: the row of the producer that feeds each column of
    the consumers, none of them twice.
    """

    block: int
    producer: LinearSite
    consumers: tuple[LinearSite, ...]
    index: tuple[int, ...]


@dataclass(frozen=True)
class GainPath:
    """A norm behind which no stream turns, and linears that read it: the gated norm of Mamba 2, those inside of MLA.

    weight: of its gain, which takes a scale of each channel. channels: how many.
    """

    block: int
    weight: str
    consumers: tuple[LinearSite, ...]
    channels: int


@dataclass(frozen=True)
class Anatomy:
    """Who reads and who writes the residual stream of `width` channels, and where values pass.

    tables: embeddings and learned positions. norms: with their readers; the last one feeds the head. scaled: linears
    that feed others by channels and not by heads. gains: norms inside of blocks. tied: the head as a site of its own
    and the table whose tensor it shares, None when it has its own. residual_obstacle: why the stream cannot be rotated,
    empty when it can. values_obstacle: the same for values.
    """

    width: int
    tables: tuple[str, ...] = ()
    norms: tuple[Norm, ...] = ()
    writers: tuple[LinearSite, ...] = ()
    values: tuple[ValuePath, ...] = ()
    scaled: tuple[ScalePath, ...] = ()
    gains: tuple[GainPath, ...] = ()
    tied: tuple[LinearSite, str] | None = None
    residual_obstacle: str = ""
    values_obstacle: str = ""


class Basis:
    """The eigenvectors of what the linears of all blocks read of the residual stream, found when first asked for.

    norms: with their readers; the gain of a norm counts as part of them. Equal weights give equal vectors on one
    machine, and up to rounding on others.
    """

    def __init__(self, norms: tuple[Norm, ...]):
        self.norms = norms
        self._vectors: torch.Tensor | None = None

    def vectors(self, read: Read) -> torch.Tensor:
        """[channels, channels] float64, one a column. read: gives tensors of the source."""
        if self._vectors is None:
            inside = [(norm, site) for norm in self.norms for site in norm.readers if site.block is not None]
            grams = [self._gram(norm, site, read) for norm, site in inside]
            self._vectors = torch.linalg.eigh(sum(grams[1:], grams[0]))[1]
        return self._vectors

    def _gram(self, norm: Norm, site: LinearSite, read: Read) -> torch.Tensor:
        """W^T W [channels, channels] of one reader with the gain merged, over its number of rows."""
        stored = read(site.weight)
        gain = read(norm.weight).double() + (1.0 if norm.offset else 0.0)
        merged = (stored.T if site.transposed else stored).double() * gain
        return merged.T @ merged / len(merged)


class Linear(Protocol):
    """What is done to an axis of a weight. held: the elements of the matrices that it takes."""

    @property
    def held(self) -> int:
        """How many there are."""

    def __call__(self, x: torch.Tensor, read: Read) -> torch.Tensor:
        """x [..., n], float64, with its last axis changed. read: gives tensors of the source."""


@dataclass(frozen=True)
class Spin:
    """A rotation of one axis. places: the channels of each part that is rotated on its own; None for the whole axis.

    basis: whose vectors the axis is brought to before, None for none.
    """

    rotation: Rotation
    places: tuple[tuple[int, ...], ...] | None = None
    basis: Basis | None = None

    @property
    def held(self) -> int:
        """Elements of the basis: the rotation itself is never formed."""
        return 0 if self.basis is None else self.rotation.n**2

    def __call__(self, x: torch.Tensor, read: Read) -> torch.Tensor:
        """x with its last axis rotated. read: gives tensors of the source, for the basis."""
        if self.basis is not None:
            x = x @ self.basis.vectors(read).to(x)
        if self.places is None:
            return self.rotation.apply(x)
        places = torch.tensor(self.places, device=x.device)
        result = x.clone()
        result[..., places] = self.rotation.apply(x[..., places])
        return result


@dataclass(frozen=True)
class Change:
    """How one tensor of the rewritten model is made. A matrix is [out, in]; a bias is one column of outputs.

    source: the tensor it is made of. norm: what its inputs come from, to be merged. by_input, by_output: rotations of
    the axes. centred: outputs lose their mean. weight: for a bias, the weight beside it; for a gain that is scaled,
    itself. constant: the new value of a
    norm's weight or bias, where nothing else counts; a number, or one for each channel.
    """

    source: str
    transposed: bool = False
    norm: Norm | None = None
    by_input: tuple[Linear, ...] = ()
    by_output: tuple[Linear, ...] = ()
    centred: bool = False
    weight: str | None = None
    constant: float | torch.Tensor | None = None

    @property
    def whole(self) -> bool:
        """Whether rows and columns both change, so that no part of a matrix can be made without the others."""
        return bool((self.by_output or self.centred) and (self.norm is not None or self.by_input))

    def making_bytes(self, shape: tuple[int, ...]) -> int:
        """Upper bound of what float64 copies hold while a matrix of this shape is made (the weight, for a bias)."""
        elements = math.prod(shape)
        basis = max((spin.held for spin in (*self.by_input, *self.by_output)), default=0)
        pieces = elements if self.whole or self.weight else min(elements, PIECE_WEIGHTS + shape[-1])
        return COPIES * 8 * (pieces + basis)

    def apply(self, read: Read, dtype: torch.dtype, *, rows: int | None = None) -> torch.Tensor:
        """The new tensor in `dtype`, computed in float64. read: gives tensors of the source. rows: only the first."""
        stored = read(self.source)[:rows]
        if isinstance(self.constant, torch.Tensor):
            return self.constant.to(dtype)
        if self.constant is not None:
            return torch.full_like(stored, self.constant, dtype=dtype)
        if self.weight is not None:
            return self._bias(stored, read).to(dtype)
        matrix = stored.T if self.transposed else stored
        if self.whole:
            result = self._outputs(self._inputs(matrix.double(), read), read).to(dtype)
        elif self.by_output or self.centred:
            result = _by_pieces(matrix.T, dtype, lambda piece: self._outputs(piece.T, read).T).T
        else:
            result = _by_pieces(matrix, dtype, lambda piece: self._inputs(piece, read))
        return (result.T if self.transposed else result).contiguous()

    def _inputs(self, matrix: torch.Tensor, read: Read) -> torch.Tensor:
        """Rows with the norm merged and rotated."""
        if self.norm is not None:
            matrix = _merged(matrix, self.norm, read)
        for spin in self.by_input:
            matrix = spin(matrix, read)
        return matrix

    def _outputs(self, matrix: torch.Tensor, read: Read) -> torch.Tensor:
        """Columns without mean and rotated."""
        columns = matrix.T
        if self.centred:
            columns = columns - columns.mean(-1, keepdim=True)
        for spin in self.by_output:
            columns = spin(columns, read)
        return columns.T

    def _bias(self, stored: torch.Tensor, read: Read) -> torch.Tensor:
        """The bias with the norm's bias, as the weight passes it on."""
        bias = stored.double()
        if self.norm is not None:
            assert self.weight is not None and self.norm.bias is not None, "a norm's bias passes a weight"
            weight = read(self.weight).double()
            bias = bias + (weight.T if self.transposed else weight) @ read(self.norm.bias).double()
        return self._outputs(bias[:, None], read)[:, 0]


def _by_pieces(
    matrix: torch.Tensor, dtype: torch.dtype, function: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """`function` of some rows at a time, so that a large table is never in memory in float64."""
    result = torch.empty(matrix.shape, dtype=dtype)
    step = max(1, PIECE_WEIGHTS // matrix.shape[1])
    for start in range(0, len(matrix), step):
        result[start : start + step] = function(matrix[start : start + step].double())
    return result


def _merged(matrix: torch.Tensor, norm: Norm, read: Read) -> torch.Tensor:
    """Rows that read the norm without gain: W diag(g), and where the bias goes through the mean, that mean."""
    gain = read(norm.weight).double() + (1.0 if norm.offset else 0.0)
    merged = matrix * gain
    if norm.bias is not None and norm.bias_in_mean:
        merged += (matrix @ read(norm.bias).double() / len(gain) - merged.mean(-1))[:, None]
    return merged


@dataclass(frozen=True)
class Rewrite:
    """A rewritten model. changes: by name of the new tensor; all others stay. untied: the new tensor of a head that
    shared that of the embeddings, and the tensor it shared. notes: what was done and what was not, for the report.
    zeros: tensors that the model gets beside its own, all zero. settings: keys of config.json, by path, and their new
    values. shifts: input group -> (bias of its producer, note), where the zeros make a shift of the input possible.
    pending: why the changes are not known yet, empty when they are; their shapes are right.
    """

    changes: Mapping[str, Change]
    notes: tuple[str, ...] = ()
    untied: tuple[str, str] | None = None
    zeros: Mapping[str, TensorInfo] = field(default_factory=dict)
    settings: Mapping[tuple[str, ...], Any] = field(default_factory=dict)
    shifts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    pending: str = ""


@rewriter("rotate", paper="arXiv:2404.00456")
def rotate(
    anatomy: Anatomy,
    *,
    residual: bool = True,
    values: bool = True,
    seed: int = 0,
    start: Literal["channels", "weights"] = "channels",
) -> Rewrite:
    """Rotate the residual stream and the values by randomized Hadamard matrices; the model computes the same.

    residual: R1, one matrix for the whole model. values: R2, one matrix per block, the same for all of its heads. seed:
    of the random signs. start: of R1, `weights` for the eigenvectors of the weights that read the stream, which takes a
    matrix of its width squared. A part that the model does not allow is left out with a note; RecipeError when none is
    left, or for eigenvectors with LayerNorm, whose mean they would mix.
    """
    build = Builder(anatomy)
    notes = []
    if residual:
        spin = Rotation.of(anatomy.width, seed, keeps_mean=any(norm.centred for norm in anatomy.norms))
        obstacle = anatomy.residual_obstacle or _too_small(spin)
        if obstacle:
            notes.append(f"rotate: the residual stream is left as it is: {obstacle}")
        else:
            basis = Basis(anatomy.norms) if start == "weights" else None
            if basis is not None and spin.keeps_mean:
                raise RecipeError(
                    "rotate: `start: weights` mixes the mean into other channels, which LayerNorm would not take out",
                    hint="use `start: channels` for this model",
                )
            build.residual(Spin(spin, basis=basis))
            after = " after the eigenvectors of its readers" if basis else ""
            notes.append(f"rotate: residual stream by {spin}, seed {seed}{after}")
    if values:
        sizes: dict[str, int] = {}
        for path in anatomy.values:
            spin = Rotation.of(len(path.heads[0]), (seed << 20) + path.block + 1)
            if not _too_small(spin):
                build.value(path, spin)
                sizes[str(spin)] = sizes.get(str(spin), 0) + 1
        notes += [f"rotate: values of {count} blocks, each head by {kind}" for kind, count in sizes.items()]
        if not sizes:
            obstacle = anatomy.values_obstacle or "heads have no size with a Hadamard matrix"
            notes.append(f"rotate: values are left as they are: {obstacle}")
    if not build.changes:
        reasons = "; ".join(note.removeprefix("rotate: ") for note in notes) or "residual and values are both off"
        raise RecipeError(f"rotate changes nothing: {reasons}", hint="remove `rotate` from the `transform` section")
    return Rewrite(build.changes, tuple(notes), build.untied)


def _too_small(rotation: Rotation) -> str:
    """Why the rotation would not mix anything, or nothing."""
    return f"no Hadamard matrix fits {rotation.n} channels" if rotation.block < 4 else ""


class Builder:
    """Collects the changes, several to one tensor."""

    def __init__(self, anatomy: Anatomy):
        self.anatomy = anatomy
        self.changes: dict[str, Change] = {}
        self.untied: tuple[str, str] | None = None

    def residual(self, spin: Linear) -> None:
        """Tables and writers give h R, readers take it."""
        centred = any(norm.centred for norm in self.anatomy.norms)
        for table in self.anatomy.tables:  # a table is a writer that is stored [in, out]
            self._add(table, table, transposed=True, by_output=(spin,), centred=centred)
        for norm in self.anatomy.norms:
            self._norm(norm, spin)
        for site in self.anatomy.writers:
            self._outputs(site, spin, centred=centred)

    def value(self, path: ValuePath, rotation: Rotation) -> None:
        """The producer's heads give v R, the consumers' columns take it."""
        rows, columns = Spin(rotation, path.rows), Spin(rotation, path.columns)
        self.between(path.producer, (rows,), path.consumers, (columns,))

    def between(
        self,
        producer: LinearSite,
        rows: tuple[Linear, ...],
        consumers: tuple[LinearSite, ...],
        columns: tuple[Linear, ...],
    ) -> None:
        """What a linear writes is changed by `rows`, and what others read of it by `columns`, which undo them."""
        for change in rows:
            self._outputs(producer, change)
        for site in consumers:
            self._add(site.weight, site.weight, transposed=site.transposed, by_input=columns)

    def scaled_gain(self, path: GainPath, gain: Linear, columns: Linear) -> None:
        """The gain of a norm inside of a block is changed by `gain`, and what others read of it by `columns`."""
        self._add(path.weight, path.weight, by_output=(gain,), weight=path.weight)
        for site in path.consumers:
            self._add(site.weight, site.weight, transposed=site.transposed, by_input=(columns,))

    def scaled_norm(self, norm: Norm, gain: torch.Tensor, scale: Linear) -> None:
        """A norm whose gain went to its readers gets another one [channels], as it is stored, and they the rest."""
        self.changes[norm.weight] = replace(self.changes[norm.weight], constant=gain)
        for site in norm.readers:
            self._add(site.weight, site.weight, by_input=(scale,))

    def _norm(self, norm: Norm, spin: Linear) -> None:
        """The norm loses its gain and bias to its readers. A tied head stays tied where there is nothing to lose."""
        tied = self.anatomy.tied
        shared = tied if tied is not None and tied[0] in norm.readers else None
        if shared is not None and norm.uniform:
            return
        if shared is not None:
            self.untied = (shared[0].weight, shared[1])
        self.changes[norm.weight] = Change(norm.weight, constant=0.0 if norm.offset else 1.0)
        if norm.bias is not None:
            self.changes[norm.bias] = Change(norm.bias, constant=1.0 if norm.bias_in_mean else 0.0)
        for site in norm.readers:
            source = shared[1] if shared is not None and site == shared[0] else site.weight
            self._add(site.weight, source, transposed=site.transposed, norm=norm, by_input=(spin,))
            if site.bias is not None and norm.bias is not None and not norm.bias_in_mean:
                self._add(site.bias, site.bias, transposed=site.transposed, norm=norm, weight=site.weight)

    def _outputs(self, site: LinearSite, spin: Linear, *, centred: bool = False) -> None:
        """Rotate what the linear writes, its bias with it."""
        names = [(site.weight, None)] + ([(site.bias, site.weight)] if site.bias else [])
        for name, weight in names:
            self._add(name, name, transposed=site.transposed, by_output=(spin,), centred=centred, weight=weight)

    def _add(self, name: str, source: str, **change: Any) -> None:
        """Note a change of the tensor `name`; rotations join those that are noted already."""
        known = self.changes.get(name)
        if known is not None:
            for axis in ("by_input", "by_output"):
                change[axis] = getattr(known, axis) + change.get(axis, ())
        self.changes[name] = replace(known or Change(source), **change)
