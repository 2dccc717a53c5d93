"""`outlierq recommend`: three recipes that suit a model, a card, a client and a goal, each asked of the planner."""

from __future__ import annotations

import re
import shlex
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from outlierq.core.errors import ArgumentError, OutlierqError, nearest
from outlierq.core.model import Checkpoint
from outlierq.core.report import Shown
from outlierq.pipeline.advising.expected import Expected, expected
from outlierq.pipeline.advising.hardware import Card, card_of, smallest_card, table
from outlierq.pipeline.asked.events import Listener, silent
from outlierq.pipeline.asked.request import Source, is_gguf
from outlierq.pipeline.fitting.goal import CARD_SHARE, cache_shape, cache_size, loaded_bytes
from outlierq.pipeline.fitting.storage import CLIENTS
from outlierq.pipeline.plan import decided
from outlierq.pipeline.planning.plan import Plan
from outlierq.recipe import Recipe, given

GOALS = ("size", "speed", "quality")
MOST = 3  # recipes that are shown
SAME_SIZE = 1.05  # results that differ by less are alike in size, and what they lose decides
# Positions for which a card should hold a cache beside the weights, or all of the model's where it has fewer.
USUAL_CONTEXT = 8192
# vLLM's build for CPUs would else round inputs of 4-bit weights to int8, unasked; its cache gets 2 GiB.
ON_CPU = "VLLM_CPU_INT4_W4A8=0 VLLM_CPU_KVCACHE_SPACE=2"
# After what a client says of one scheme, what it says of others: "loads; has no kernel for ..."
DOUBTS = re.compile(r"(^|; )(has no|does not|not tried|needs a plug-in|reads .* wrongly)|: not tried")


@dataclass(frozen=True)
class Fit:
    """Whether a card holds the weights and a cache in 16 bits. loaded_bytes: of the weights while they run. context:
    the most positions whose cache fits, beside them, into 90 % of the card, 0 for none; None where that is not known.
    """

    fits: bool | None
    loaded_bytes: int
    context: int | None
    words: str


@dataclass(frozen=True)
class Suggestion:
    """A recipe that suits. goal: for which it stands here. output_bytes: exact, of the result without its report.

    client: what the client says of it. command: to copy; then: what runs the result.
    """

    recipe: str
    goal: str
    why: str
    output_bytes: int
    source_bytes: int
    bits_per_weight: float
    fit: Fit
    expected: Expected
    client: str
    command: str
    then: str


@dataclass(frozen=True)
class Recommendation(Shown):
    """What suits a model. refused: recipe -> why it was passed over. remarks: what holds for all. checked: the date of
    the facts.
    """

    model: str
    card: Card
    client: str
    goal: str | None
    suggestions: tuple[Suggestion, ...]
    refused: Mapping[str, str]
    remarks: tuple[str, ...]
    checked: str

    @property
    def passed_over(self) -> list[str]:
        """The refused recipes, those with one reason together."""
        return _by_reason(self.refused)

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        card = {"name": self.card.name, "words": self.card.words, "memory": self.card.memory}
        rows = [vars(s) | {"fit": vars(s.fit), "expected": vars(s.expected)} for s in self.suggestions]
        others = {"client": self.client, "goal": self.goal, "refused": dict(self.refused)}
        said = {"remarks": list(self.remarks), "checked": self.checked}
        return {"model": self.model, "card": card, **others, "suggestions": rows, **said}


def recommend(
    source: Source,
    *,
    gpu: str | None = None,
    client: str | None = None,
    goal: str | None = None,
    stats: Path | None = None,
    listen: Listener = silent,
) -> Recommendation:
    """The first three recipes that the planner accepts, the client loads and the card runs, those that fit it first.

    gpu: a card of data/hardware.json, "cpu", or None for what many have in common. client: None is llama.cpp for
    "cpu", else vllm. goal: None gives one recipe for each. ArgumentError for unknown names, OutlierqError when no
    recipe works, with what was said of each.
    """
    card = card_of(gpu)
    served = _known(client or ("llama.cpp" if card.is_cpu else "vllm"), list(CLIENTS), "for", "a client")
    if goal is not None:
        goal = _known(goal, list(GOALS), "goal", "a goal")
    candidates = _Candidates(source, card, served)
    rows = _one_each(candidates) if goal is None else _first(candidates, goal, MOST)
    if not rows:
        raise _nothing(source, card, served, candidates.refused)
    suggestions = tuple(_suggestion(candidates, *row, stats, listen) for row in rows)
    facts = table("recommended")
    of_card = card.remark if served == "vllm" else ""
    remarks = tuple(filter(None, [facts["remarks"].get(served), of_card, *_common(suggestions)]))
    return Recommendation(
        source.name, card, served, goal, suggestions, candidates.refused, remarks, table("hardware")["checked"]
    )


class _Candidates:
    """Recipes for a model, a card and a client; each is planned once. refused: recipe -> why."""

    def __init__(self, source: Source, card: Card, client: str):
        self.source, self.card, self.client = source, card, client
        self.refused: dict[str, str] = {}
        self._plans: dict[str, Plan | None] = {}
        self._opened: dict[Source, Source] = {}

    def of(self, goal: str) -> Iterable[tuple[str, Plan]]:
        """Those that work, in the order of preference for a goal; for size those that are not nearly the smallest come
        later, by their bytes."""
        if goal != "size":
            return self._working(goal)
        rows = list(self._working(goal))
        nearly = SAME_SIZE * min((plan.output_bytes for _, plan in rows), default=0)
        return sorted(rows, key=lambda row: row[1].output_bytes if row[1].output_bytes > nearly else 0)

    def _working(self, goal: str) -> Iterator[tuple[str, Plan]]:
        """Those that work, in the order of data/recommended.json."""
        for name in table("recommended")["order"][self.client][goal]:
            if name not in self._plans:
                self._plans[name] = self._planned(name)
            plan = self._plans[name]
            if plan is not None:
                yield name, plan

    def _planned(self, name: str) -> Plan | None:
        """The plan of a recipe; None, with the reason kept, where the card, the planner or the client objects."""
        needs = table("recommended")["recipes"][name].get("needs")
        if needs is not None and self.client == "vllm" and needs not in self.card.runs:
            kind, where = table("hardware")["words"][needs], self.card.name
            where = f"some of the {self.card.words}" if self.card.memory is None else where
            self.refused[name] = f"vLLM has no kernel on {where} for {kind}"
            return None
        recipe = given(name)
        try:
            plan = decided(self._framed(recipe), recipe)
        except OutlierqError as error:
            self.refused[name] = error.what
            return None
        said = self.lines(plan)
        doubt = (
            next((line for line in said if not _loads(line)), None) if said else f"nothing is known of {self.client}"
        )
        if doubt is not None:
            self.refused[name] = doubt
            return None
        if not plan.schemes:
            self.refused[name] = "it would quantize nothing of this model"
            return None
        if self._file is not None and recipe.export.format == "gguf" and plan.output_bytes >= self.stored_bytes(plan):
            sizes = _size(plan.output_bytes), _size(self.stored_bytes(plan))
            self.refused[name] = "it would make a file of {} out of one of {}".format(*sizes)
            return None
        return plan

    @property
    def _file(self) -> Path | None:
        """The source where it is a GGUF file."""
        path = None if isinstance(self.source.place, Checkpoint) else Path(self.source.name).expanduser()
        return path if path is not None and is_gguf(path) else None

    def stored_bytes(self, plan: Plan) -> int:
        """What the source takes: of a GGUF file all of it, whose tensors a plan may count as they are decoded."""
        return plan.source_bytes if self._file is None else self._file.stat().st_size

    def _framed(self, recipe: Recipe) -> Source:
        """The source, or a GGUF file in its own frame; each is opened once."""
        framed = self.source.in_its_frame(recipe)
        if framed not in self._opened:
            self._opened[framed] = replace(framed, place=framed.headers(), like=None)
        return self._opened[framed]

    def lines(self, plan: Plan) -> list[str]:
        """What is known of the client with a plan; of vLLM, of its build for this card."""
        word = CLIENTS[self.client].word
        said = [line for line in plan.clients if line.startswith((word, "every client"))]
        if self.client == "vllm":
            said = [line for line in said if ("CPU" in line.partition(":")[0]) == self.card.is_cpu]
        return said

    def fit(self, plan: Plan) -> Fit:
        """How the result fits the card."""
        decodes = self.client == "transformers" and any("(d" in line for line in self.lines(plan))
        held = 2 * plan.parameters if decodes else loaded_bytes(plan)
        return _fit(plan, held, self.card)


def _loads(line: str) -> bool:
    """Whether a line about a client says that it loads the result, and raises no doubt."""
    what = line.partition(": ")[2]
    return what.startswith("loads") and not DOUBTS.search(what)


def _first(candidates: _Candidates, goal: str, most: int, but: Collection[str] = ()) -> list[tuple[str, str, Plan]]:
    """The first that fit the card, then those that do not: recipe, goal and plan. but: recipes to pass over."""
    fitting: list[tuple[str, str, Plan]] = []
    others: list[tuple[str, str, Plan]] = []
    for name, plan in candidates.of(goal):
        if name not in but:
            (others if candidates.fit(plan).fits is False else fitting).append((name, goal, plan))
        if len(fitting) == most:
            break
    return [*fitting, *others][:most]


def _one_each(candidates: _Candidates) -> list[tuple[str, str, Plan]]:
    """The first for each goal that is not there yet; quality comes first, so that none of the others loses less."""
    rows: list[tuple[str, str, Plan]] = []
    for goal in reversed(GOALS):
        rows += _first(candidates, goal, 1, [name for name, _, _ in rows])
    return sorted(rows, key=lambda row: GOALS.index(row[1]))


def _suggestion(
    candidates: _Candidates, name: str, goal: str, plan: Plan, stats: Path | None, listen: Listener
) -> Suggestion:
    """Everything that is said of a recipe."""
    command, then = _commands(candidates, plan, stats)
    return Suggestion(
        recipe=name,
        goal=goal,
        why=table("recommended")["recipes"][name]["why"],
        output_bytes=plan.output_bytes,
        source_bytes=candidates.stored_bytes(plan),
        bits_per_weight=plan.bits_per_weight,
        fit=candidates.fit(plan),
        expected=expected(plan, stats, listen=listen),
        client="; ".join(candidates.lines(plan)),
        command=command,
        then=then,
    )


def _fit(plan: Plan, held: int, card: Card) -> Fit:
    """How many positions a card holds beside so many bytes of weights."""
    shape = cache_shape(plan)
    if shape is None:
        limit = None if card.memory is None else CARD_SHARE * card.memory
        words = f"{_size(held)} of weights; how large its cache is, is not known"
        return Fit(None if limit is None else held <= limit, held, None, words)
    positions = int(shape.get("max_position_embeddings") or USUAL_CONTEXT)
    usual = min(positions, USUAL_CONTEXT)
    if card.memory is None:
        needed = held + cache_size(shape, usual)
        name = smallest_card(needed, CARD_SHARE)
        words = f"{_size(needed)} with a cache for {usual:,} positions"
        return Fit(None, held, None, f"{words}; the smallest card that is known to hold it: {name or 'none'}")
    limit = CARD_SHARE * card.memory
    most = bisect_right(range(1, positions + 1), limit, key=lambda length: held + cache_size(shape, length))
    if most == 0:
        return Fit(False, held, 0, f"no: {_size(held)} of weights, {_size(int(limit))} to fill")
    words = f"with a cache in 16 bits for {most:,} positions beside it"
    few = f", of the model's {positions:,}" if most < positions else ", all that the model has"
    return Fit(most >= usual, held, most, words + few)


def _commands(candidates: _Candidates, plan: Plan, stats: Path | None) -> tuple[str, str]:
    """What writes the checkpoint, and what runs it."""
    source, recipe = candidates.source, plan.recipe
    stem = re.sub(r"[^\w.-]+", "-", Path(source.name).name.removesuffix(".gguf")) or "model"
    out = f"{stem}-{recipe.name.removeprefix('gguf-')}" + (".gguf" if recipe.export.format == "gguf" else "")
    words = ["outlierq", "quantize", source.name, "-r", recipe.name, "-o", out]
    if stats is not None and recipe.reads_statistics:
        words += ["--stats", str(stats)]
    elif recipe.needs and recipe.calibration is not None:
        positions = (cache_shape(plan) or {}).get("max_position_embeddings")
        if positions and positions < recipe.calibration.sequence_length:
            words += ["-s", f"calibration.sequence_length={positions}"]
    if source.revision:
        words += ["--revision", source.revision]
    words += ["--trust-remote-code"] if source.trust_remote_code else []
    return shlex.join(words), _running(candidates.client, candidates.card, out)


def _running(client: str, card: Card, out: str) -> str:
    """How a client runs a result on a card."""
    place = shlex.quote(f"./{out}")
    return {
        "vllm": f"{ON_CPU} vllm serve {place} --dtype bfloat16" if card.is_cpu else f"vllm serve {place}",
        "llama.cpp": f"llama-server -m {place}",
        "transformers": f'AutoModelForCausalLM.from_pretrained("./{out}")',
    }[client]


def _common(suggestions: Sequence[Suggestion]) -> list[str]:
    """What has to be said when nothing fits."""
    if any(each.fit.fits is not False for each in suggestions):
        return []
    return ["nothing of this fits the card: take a larger one, or share the model among several"]


def _nothing(source: Source, card: Card, client: str, refused: Mapping[str, str]) -> OutlierqError:
    """That no recipe works, and why not."""
    said = "\n".join(f"  {line}" for line in _by_reason(refused))
    others = " or ".join(f"--for {name}" for name in CLIENTS if name != client)
    return OutlierqError(
        f"no recipe that is known for {client} on {card.name} works for {source.name}:\n{said}",
        hint=f"try {others}, or another --gpu",
    )


def _by_reason(refused: Mapping[str, str]) -> list[str]:
    """The recipes that were passed over, those with one reason together: "a, b: why"."""
    names: dict[str, list[str]] = {}
    for name, why in refused.items():
        names.setdefault(why, []).append(name)
    return [f"{', '.join(together)}: {why}" for why, together in names.items()]


def _known(name: str, names: list[str], argument: str, kind: str) -> str:
    """The name; ArgumentError with the nearest one that is known."""
    if name.lower() in names:
        return name.lower()
    close = nearest(name.lower(), names)
    advice = f"did you mean {close}?" if close else f"choose {', '.join(names)}"
    raise ArgumentError(f"{name!r} is not {kind} that is known; {advice}", argument=argument)


def _size(count: int) -> str:
    """GB with three figures; MB below a tenth of one."""
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"
