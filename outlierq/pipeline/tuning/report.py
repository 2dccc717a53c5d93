"""The report of a tuned checkpoint that another program wrote, which has brought none."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import version

from outlierq import __version__
from outlierq.core.model import StudiedModel
from outlierq.core.report import STORED, Report, SiteRow
from outlierq.pipeline.block.report import PACKAGES
from outlierq.pipeline.checking.source.against import Comparison
from outlierq.recipe import Quantize, Recipe

# Says in the report that nobody knows which folds were made: `verify` then infers them, as of any foreign checkpoint.
UNKNOWN_FOLDS = {"block": None, "group": "", "method": "", "fold": "not known: another program made the weights"}


def first_report(packed: StudiedModel, original: StudiedModel, comparison: Comparison) -> Report:
    """What can be told of weights that another program has rounded."""
    before = sum(info.nbytes for info in original.checkpoint.tensors.values())
    after = sum(packed.checkpoint.stored_bytes(name) for name in packed.checkpoint.tensors)
    weights = sum(parameter.numel() for parameter in original.skeleton.parameters())
    recipe = Recipe(name="another program", quantize=Quantize(method=STORED, ignore=()))
    rows = tuple(_rows(packed, comparison))
    known = [row.bits_per_weight for row in rows]
    return Report(
        model=original.checkpoint.source,
        recipe=recipe.name,
        settings=recipe.model_dump(mode="json"),
        out="",
        fingerprint=original.checkpoint.fingerprint,
        versions={"outlierq": __version__, "python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        seeds={},
        machine={"name": platform.machine(), "system": platform.system()},
        rows=rows,
        transforms=(UNKNOWN_FOLDS,),
        notes=("the weights were rounded by another program",),
        source_bytes=before,
        output_bytes=after,
        bits_per_weight=8 * after / weights,
        quantized_bits_per_weight=sum(known) / len(known) if known else None,
        source_bits_per_weight=8 * before / weights,
        seconds={},
    )


def _rows(packed: StudiedModel, comparison: Comparison) -> Iterator[SiteRow]:
    """One for each packed weight whose codes can be told."""
    plain = packed.checkpoint
    for site in packed.structure.sites:
        if site.weight not in plain.linears or site.weight not in comparison.errors:
            continue
        quantized = plain.quantized(site.weight)
        scheme, error = quantized.scheme, comparison.errors[site.weight]
        yield SiteRow(
            site=site.module,
            method="another program",
            bits=scheme.bits,
            group_size=scheme.group_size,
            symmetric=scheme.symmetric,
            output_error=None,
            weight_error=error,
            bits_per_weight=quantized.bits_per_weight,
            seconds=0.0,
            numbers=scheme.numbers,
        )
