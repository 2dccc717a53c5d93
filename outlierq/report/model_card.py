"""The card of a published checkpoint: the Hub's metadata, what was done, what it cost, and how to run it.

The text is `data/model_card.md.jinja`. The same checkpoint gives the same card, so a repeated upload changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml

from outlierq.core.errors import PublishError
from outlierq.core.machine.printable import over_texts, printable
from outlierq.core.machine.untrusted import LARGEST_YAML, yaml_tree
from outlierq.core.report import Report
from outlierq.export import Format, format_type
from outlierq.report.terminal import begun_with, human_bytes

T = TypeVar("T")
# What of the source's card holds for a compressed copy as well.
CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
MAX_NOTES = 10
# What means something within a line of Markdown, or begins a block in a list; underscores inside of words do not.
MARKS = re.compile(r"[\\`*\[\]<>|~#&]|(?<!\w)_|_(?!\w)")
UNKNOWN = "–"


@dataclass(frozen=True)
class CardPicture:
    """A picture beside the card."""

    file: str
    title: str


def source_metadata(folder: Path) -> dict[str, Any]:
    """The metadata at the head of the source's README.md, which `quantize` carries along; {} without any."""
    path = folder / "README.md"
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        text = file.read(LARGEST_YAML)
    head, fence, _ = text.removeprefix("---\n").partition("\n---")
    if not text.startswith("---\n") or not fence:
        return {}
    values, _ = yaml_tree(head, f"the metadata in {path}", PublishError)
    return values if isinstance(values, dict) else {}


def metadata(
    report: Report,
    repository: str,
    base_model: str | None,
    source: Mapping[str, Any],
    files: Sequence[str],
    licence: str | None = None,
) -> dict[str, Any]:
    """The card's metadata, in the Hub's terms.

    source: that of the source's card. licence: replaces the one found there. Without either, a licence file among
    `files` is named; PublishError when there is none, because a copy without its licence may not be passed on.
    """
    carried = {name: source[name] for name in CARRIED if source.get(name)}
    if licence is not None:
        carried = {**{name: value for name, value in carried.items() if "license" not in name}, "license": licence}
    if "license" not in carried:
        name = next((name for name in LICENCE_FILES if name in files), None)
        if name is None:
            raise PublishError(
                "the source names no licence, neither in README.md nor in a LICENSE file",
                hint="say which it is: --license apache-2.0",
            )
        carried |= {"license": "other", "license_name": "as-the-original", "license_link": name}
    format = report.settings.get("export", {}).get("format", "")
    values: dict[str, Any] = {"base_model": base_model, "base_model_relation": "quantized"} if base_model else {}
    return {
        **values,
        "quantized_by": repository.partition("/")[0],
        "library_name": format_type(format).library if format else Format.library,
        "pipeline_tag": "text-generation",
        **carried,
        "tags": ["outlierq", *([format] if format else []), *sorted({f"{row.bits}-bit" for row in report.rows})],
    }


def model_card(
    report: Report,
    repository: str,
    base_model: str | None,
    head: Mapping[str, Any],
    *,
    gate: Sequence[Mapping[str, Any]] = (),
    clients: Sequence[str] = (),
    pictures: Sequence[CardPicture] = (),
) -> str:
    """The whole README.md. report: without paths of this machine. head: see `metadata`. gate: rows that were kept."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False, finalize=_inline)
    environment.filters["code"] = _code
    template = (resources.files("outlierq") / "data" / "model_card.md.jinja").read_text(encoding="utf-8")
    settings = dict(report.settings)
    measured = report.evaluation
    text = environment.from_string(template).render(
        metadata=_Markdown(yaml.safe_dump(over_texts(dict(head), printable), sort_keys=False, allow_unicode=True)),
        name=repository.partition("/")[2],
        repository=_Markdown(repository),
        base_model=base_model,
        description=_sentence(settings.pop("description", "")),
        report=report,
        measured=measured,
        tasks=_tasks(measured or {}),
        task_conditions=_task_conditions(measured or {}),
        gate=gate,
        clients=clients,
        runs={client: _runs(client, clients) for client in ("transformers", "vLLM")} | {"vllm": _runs("vLLM", clients)},
        pictures=pictures,
        recipe=_fenced("yaml", yaml.safe_dump(_short(settings), sort_keys=False, allow_unicode=True)),
        notes=_few(list(dict.fromkeys(report.notes))),
        begun_with=begun_with,
        bytes=human_bytes,
        bits=lambda value: UNKNOWN if value is None else f"{value:.2f}",
        figure=lambda value: UNKNOWN if value is None else f"{value:.4g}",
    )
    return text.rstrip() + "\n"


def _runs(client: str, clients: Sequence[str]) -> bool:
    """Whether the facts say that a client loads the checkpoint."""
    said = [line for line in clients if line.startswith((client, "every client"))]
    return any(": loads" in line for line in said)


def _tasks(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of what was asked for (not of its parts), with the original's figure where it was measured."""
    before = {(row["task"], row["metric"]): row["value"] for row in measured.get("reference_tasks", {}).get("rows", ())}
    rows = measured.get("tasks", {}).get("rows", ())
    return [{**row, "before": before.get((row["task"], row["metric"]))} for row in rows if row["parent"] is None]


def _task_conditions(measured: Mapping[str, Any]) -> str:
    """How the tasks were run."""
    conditions = measured.get("tasks", {}).get("conditions", {})
    named = ("num_fewshot", "limit", "batch_size", "max_length", "seed", "backend")
    said = [f"{name} {conditions[name]}" for name in named if conditions.get(name) is not None]
    length, positions = conditions.get("max_length"), conditions.get("positions")
    shortened = length is not None and positions is not None and length < positions
    return ", ".join([*said, *([f"the model has {positions} positions"] if shortened else [])])


def _short(settings: T) -> T | dict[Any, Any] | list[Any]:
    """Settings without what is not set."""
    if isinstance(settings, Mapping):
        return {key: _short(value) for key, value in settings.items() if value not in (None, [], {}, ())}
    return [_short(value) for value in settings] if isinstance(settings, list | tuple) else settings


def _sentence(text: str) -> str:
    return " ".join(text.split()).rstrip(".")


class _Markdown(str):
    """Text that stands in the card as it is: ours, or checked before."""

    __slots__ = ()


def _inline(value: T) -> T | _Markdown:
    """What the template writes: any text that is not ours without meaning in Markdown or HTML, on one line."""
    if not isinstance(value, str) or isinstance(value, _Markdown):
        return value
    return _Markdown(MARKS.sub(r"\\\g<0>", printable(value, lines=False)))


def _code(text: str) -> _Markdown:
    """The text as code within a line."""
    text = printable(text, lines=False)
    fence = _fence(text, 1)
    return _Markdown(f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}")


def _fenced(language: str, text: str) -> _Markdown:
    """The text as a block of code, which nothing in it ends."""
    fence = _fence(text, 3)
    return _Markdown(f"{fence}{language}\n{printable(text)}{fence}")


def _fence(text: str, least: int) -> str:
    """More backticks than stand in a row anywhere in the text."""
    return "`" * max([least, *(len(run) + 1 for run in re.findall("`+", text))])


def _few(notes: list[str]) -> list[str]:
    """The first notes, and how many more there are."""
    more = len(notes) - MAX_NOTES
    return notes if more <= 0 else [*notes[:MAX_NOTES], f"and {more} more, all of them in outlierq.json"]
