"""How much memory a run needs at most, and what it does to need less.

`peaks` is a model, not a measurement: an upper bound for each phase of a run, from shapes alone. `choose` saves memory
step by step, in the phase that needs most, until all phases stay below a ceiling; the ways that leave the result as it
is come first. A ceiling that no saving reaches is refused before work starts, with the smallest one that works.

Ceilings are for resident memory. Pages of the file cache do not count: the system takes them back when it likes. Those
of libraries are such pages, and how many are resident is the machine's choice; `BASE_BYTES` has room for them all the
same, while a test can only hold a run to what it made itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from outlierq.core.errors import OutlierqError
from outlierq.core.machine.heap import return_memory_at_once
from outlierq.core.model import InputGroup, largest
from outlierq.pipeline.asked.resources import Resources
from outlierq.pipeline.planning.phases import BASE_BYTES, FLOAT, Phases, peaks
from outlierq.pipeline.planning.work import NO_SAVINGS, Savings, Work

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Weights of a stack that are solved at a time when memory is short, and sequences of a batch: the least.
LEAST_WEIGHTS = 1 << 18
# Without a ceiling, freed memory goes back to the system at once from this size on: that of whole stacks and hessians.
# Fresh pages take time (half as many of them from 32 MiB on as from 2), and what stays is given back after each block.
LARGE = 32 << 20


def evaluation_bytes(models: Sequence[PreTrainedModel], dtype: str, window_length: int) -> int:
    """Upper bound of resident memory while these models are measured side by side on a text, all weights in memory."""
    from outlierq.evaluate.divergence import CHUNK_ELEMENTS

    itemsize = 4 if dtype == "float32" else 2
    held, most = 0, 0
    for model in models:
        config = model.config.get_text_config()
        sizes = [parameter.numel() for parameter in model.parameters()]  # a shared one once
        inner = max((max(p.shape) for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n), default=0)
        hidden = largest(config, "hidden_size")
        held += sum(sizes) * itemsize + window_length * config.vocab_size * (itemsize + FLOAT)
        token = itemsize * (4 * min(inner, 8 * hidden) + 12 * hidden)
        if len(models) > 1:  # states of every block of the reference, to compare with
            held += largest(config, "num_hidden_layers") * window_length * hidden * itemsize // len(models)
        scores = largest(config, "num_attention_heads", 1) * window_length * 2 * FLOAT
        most = max(most, window_length * (token + scores), 2 * FLOAT * max(sizes))
    logits: int = 4 * FLOAT * min(CHUNK_ELEMENTS, window_length * models[0].config.get_text_config().vocab_size)
    return BASE_BYTES + held + most + logits


def check_evaluation(models: Sequence[PreTrainedModel], dtype: str, window_length: int, ceiling: int | None) -> None:
    """OutlierqError when a measurement would need more than the ceiling: models are measured whole, not by block."""
    needed = evaluation_bytes(models, dtype, window_length)
    if ceiling is not None and needed > ceiling:
        raise OutlierqError(
            f"--max-memory {ceiling >> 20} MiB is too little to measure {len(models)} whole model(s) in {dtype}: up to "
            f"{-(-needed >> 20)} MiB",
            hint="measure with --dtype bfloat16, without --reference, or on a machine with more memory",
        )


def in_passes(groups: Sequence[InputGroup], most: int | None) -> list[list[InputGroup]]:
    """The groups of a block, dealt to as few passes over the text as keep the hessians of each within `most` bytes.

    A group that has more by itself gets a pass of its own.
    """
    passes: list[list[InputGroup]] = []
    room = 0
    for group in groups:
        size = (1 + len(group.parts)) * FLOAT * group.sites[0].in_features ** 2 if group.sites else 0
        if not passes or (most is not None and size > room):
            passes.append([])
            room = most or 0
        passes[-1].append(group)
        room -= size
    return passes or [[]]


def choose(work: Work, ceiling: int) -> Savings:
    """The savings with which the run stays below `ceiling` bytes; as few as possible, harmless ones first.

    OutlierqError names the smallest ceiling that works when this one is too low.
    """
    savings = NO_SAVINGS
    while True:
        sizes = peaks(work, savings)
        phase = max(sizes, key=sizes.__getitem__)
        if sizes[phase] <= ceiling:
            return savings
        tried = next((more for more in _more(work, savings, phase) if peaks(work, more)[phase] < sizes[phase]), None)
        if tried is None:
            raise too_low(sizes[phase], ceiling)
        savings = tried


def _more(work: Work, savings: Savings, phase: str) -> Iterator[Savings]:
    """The next steps of every saving that may help in a phase; those that leave the result as it is come first."""
    calibration = work.calibration
    if calibration is not None and savings.spill_bytes:
        yield replace(savings, spill_bytes=0)
    if work.statistics and phase != "tables" and calibration is not None and not (work.permutes or work.writes_stats):
        largest = Phases(work, savings).largest_hessian
        now = Phases(work, savings).collected()
        if savings.stats_bytes is None or now > largest:
            yield replace(savings, stats_bytes=max(largest, now // 2))
    if phase == "solve":
        most = savings.most_weights or 1 << 28
        while most > LEAST_WEIGHTS:
            most //= 2
            yield replace(savings, most_weights=most)
    if calibration is not None:
        now = savings.batch_size or calibration.batch_size
        if now > 1:
            yield replace(savings, batch_size=now // 2)


def smallest_ceiling(work: Work) -> int:
    """The least ceiling that `choose` accepts, in bytes."""
    savings = NO_SAVINGS
    while True:
        sizes = peaks(work, savings)
        phase = max(sizes, key=sizes.__getitem__)
        tried = next((more for more in _more(work, savings, phase) if peaks(work, more)[phase] < sizes[phase]), None)
        if tried is None:
            return sizes[phase]
        savings = tried


def check_together(works: Sequence[Work], ceiling: int) -> None:
    """OutlierqError when the ceiling is too low for one of several pieces of work, with the least that does for all."""
    least = max(map(smallest_ceiling, works))
    if ceiling < least:
        raise too_low(least, ceiling)


def too_low(least: int, ceiling: int) -> OutlierqError:
    """The refusal of a ceiling below the least that works."""
    mib = 1 << 20
    return OutlierqError(
        f"--max-memory {ceiling / mib:.0f} MiB is too little for this run: it needs up to {least / mib:.0f} MiB, of "
        f"which Python, torch and transformers are {BASE_BYTES // mib} MiB",
        hint=f"give --max-memory {-(-least // mib)}MiB or more",
    )


def obeying(work: Work, resources: Resources) -> Savings:
    """The savings of a run with this ceiling, and the allocators told of it; none without a ceiling."""
    ceiling = resources.max_memory
    if ceiling is None:
        if work.statistics:
            return_memory_at_once(LARGE)
        return NO_SAVINGS
    savings = choose(work, ceiling)
    obey(resources.device, ceiling)
    return savings


def obey(device: str, ceiling: int) -> None:
    """Tell the allocators: freed memory goes back at once, and a GPU gives no more than the ceiling."""
    return_memory_at_once()
    if device.startswith("cuda"):
        import torch

        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, ceiling / whole), device)
