"""Statistics of attention from the arguments of its function: queries, keys and values after RoPE, and who is heard.

`load/model/attention.py` finds the attention of a block and rounds the same keys and values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from outlierq.calibrate.collect import pieces
from outlierq.core.measured.block_stats import MASS_COLUMNS

if TYPE_CHECKING:
    import torch

# Attention probabilities are computed for the first sequence of each batch and every 8th query.
QUERY_STRIDE = 8


class AttentionSums:
    """Running statistics of the calls of one block's attention.

    fields: of `BlockStats`. classes: [sequences, tokens] class of every token (`MASS_COLUMNS`), or None.
    pending: outputs of linears by name, put there from outside as they are called.
    """

    def __init__(self, fields: frozenset[str], classes: torch.Tensor | None):
        self.fields, self.classes = fields, classes
        self.pending: dict[str, torch.Tensor] = {}
        self.notes: list[str] = []
        self.module: Any = None
        self.largest: dict[str, torch.Tensor] = {}
        self.outputs: dict[str, dict[str, torch.Tensor]] = {}
        self.mass: torch.Tensor | None = None
        self.queries = 0
        self.norms: torch.Tensor | None = None
        self.sequences = 0

    @property
    def seen(self) -> bool:
        """Whether there was any call."""
        return self.module is not None

    def add(
        self,
        first: int,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> None:
        """One call. query: [sequences, heads, tokens, D]; key, value: [sequences, kv heads, tokens, D].

        first: number of the first sequence. options: what else the attention function is given.
        """
        if self.module is None:
            self.module = module
        if module is not self.module:
            self._note("a block has several attentions; only the first one is observed")
            return
        if query.dim() != 4 or key.dim() != 4:
            self._note(f"the attention gets queries of {query.dim()} and keys of {key.dim()} axes: it is not observed")
            return
        for name, tensor in (("query_abs_max", query), ("key_abs_max", key), ("value_abs_max", value)):
            if name in self.fields:
                # One axis at a time: both at once take 8 times as long on a CPU.
                high = tensor.amax(2).amax(0).maximum(-tensor.amin(2).amin(0)).float()
                self.largest[name] = high.maximum(self.largest.get(name, high))
        self._add_outputs(key, value)
        if "sink_value_norm" in self.fields and value.shape[2] > 1:
            ratios = sink_norms(value).sum(0)
            self.norms = ratios if self.norms is None else self.norms + ratios
            self.sequences += len(value)
        if "attention_mass" in self.fields and self.classes is not None:
            self._add_mass(first, module, query, key, attention_mask, options)

    def _add_outputs(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """The pending outputs that are as wide as keys or values of one token."""
        widths = {tensor.shape[1] * tensor.shape[3] for tensor in (key, value)}
        for name, output in self.pending.items():
            if output.shape[-1] not in widths:
                continue
            for _, _, piece in pieces(output.flatten(0, -2)[None]):
                self._add_rows(name, piece[0])
        self.pending.clear()

    def _add_rows(self, name: str, rows: torch.Tensor) -> None:
        """Some outputs [N, out] float32 of a linear."""
        total, square = rows.sum(0).double(), (rows * rows).sum(0).double()
        self._add_sums(name, {"min": rows.amin(0), "max": rows.amax(0), "sum": total, "sum_sq": square})

    def _add_sums(self, name: str, new: dict[str, torch.Tensor]) -> None:
        """Sums of some outputs of a linear."""
        old = self.outputs.get(name)
        if old is not None:
            low, high = new["min"].minimum(old["min"]), new["max"].maximum(old["max"])
            new = {"min": low, "max": high, "sum": new["sum"] + old["sum"], "sum_sq": new["sum_sq"] + old["sum_sq"]}
        self.outputs[name] = new

    def _add_mass(
        self,
        first: int,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        options: dict[str, Any],
    ) -> None:
        """Attention of the first sequence's sampled queries, summed by the class of the token attended to."""
        import torch

        assert self.classes is not None, "the mass of attention is that of classes of tokens"
        length = query.shape[2]
        if key.shape[2] != self.classes.shape[1] or length != key.shape[2]:
            self._note("queries and keys are not those of whole sequences: the mass of attention is not known")
            return
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 4):
            self._note("the attention gets a mask of an unknown form: the mass of attention is not known")
            return
        places = torch.arange(length - 1, -1, -QUERY_STRIDE, device=query.device).flip(0)  # the last one always
        shares = probabilities(module, query[:1], key[:1], mask if mask is None else mask[:1], places, **options)[0]
        columns = len(MASS_COLUMNS)
        one_hot = torch.nn.functional.one_hot(self.classes[first].long().to(shares.device), columns).float()
        mass = (shares @ one_hot).sum(1).double()
        self.mass = mass if self.mass is None else self.mass + mass
        self.queries += len(places)

    def _note(self, text: str) -> None:
        """Say it once."""
        if text not in self.notes:
            self.notes.append(text)

    def parts(self) -> dict[str, Any]:
        """The running sums."""
        counts = {"queries": self.queries, "sequences": self.sequences, "notes": self.notes}
        return {"largest": self.largest, "outputs": self.outputs, "mass": self.mass, "norms": self.norms, **counts}

    def absorb(self, parts: dict[str, Any]) -> None:
        """Add those of later sequences."""
        for name, high in parts["largest"].items():
            self.largest[name] = high.maximum(self.largest.get(name, high))
        for name, sums in parts["outputs"].items():
            self._add_sums(name, sums)
        if parts["queries"]:
            self.mass = parts["mass"] if self.mass is None else self.mass + parts["mass"]
            self.queries += parts["queries"]
        if parts["sequences"]:
            self.norms = parts["norms"] if self.norms is None else self.norms + parts["norms"]
            self.sequences += parts["sequences"]
        for text in parts["notes"]:
            self._note(text)

    def finish(self) -> dict[str, Any]:
        """The fields by name, without those that could not be observed."""
        import torch

        values: dict[str, Any] = {name: value.clone() for name, value in self.largest.items()}
        if self.outputs:
            parts = list(self.outputs.values())
            values |= {f"output_{key}": torch.cat([part[key] for part in parts]) for key in parts[0]}
            values["output_names"] = tuple(self.outputs)
        elif self.seen and "output_sum" in self.fields:
            self._note("no linear of the width of keys or values is called before the attention: nothing before RoPE")
        if self.queries and self.mass is not None:
            values["attention_mass"] = (self.mass / self.queries).float()
        if self.sequences and self.norms is not None:
            values["sink_value_norm"] = (self.norms / self.sequences).float()
        return values


def sink_norms(value: torch.Tensor) -> torch.Tensor:
    """[sequences, kv heads] norm of the value at position 0 over the median norm of the others; 1 where that is 0.

    value: [sequences, kv heads, tokens, D].
    """
    norms = value.float().norm(dim=-1)
    usual = norms[:, :, 1:].median(-1).values
    ratios: torch.Tensor = (norms[:, :, 0] / usual).where(usual > 0, 1.0)
    return ratios


def probabilities(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    places: torch.Tensor,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """softmax(softcap(q k^T * scaling) + bias + mask), [sequences, heads, places, keys] float32, the plain way.

    query, key: [sequences, heads or kv heads, tokens, D]. mask: boolean (True is seen), additive, or None for a causal
    one. places: [n] query positions. The options are those that transformers' attention functions take; s_aux [heads]
    are learned sinks, which take their share of the softmax and are then left out, so that rows sum to less than 1.
    """
    import torch

    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    keys = key.float().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query[:, :, places].float() @ keys.transpose(2, 3) * scaling
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if position_bias is not None:
        scores = scores + position_bias[: len(query), :, places]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is None and causal:
        mask = (places[:, None] >= torch.arange(key.shape[2], device=key.device))[None, None]
    elif mask is not None:
        mask = mask[:, :, places, : key.shape[2]]
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if s_aux is None:
        return scores.softmax(-1)
    sinks = s_aux.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
