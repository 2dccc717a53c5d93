"""The card of a published checkpoint: the Hub's metadata, what was done, what it cost, and how to run it.

The text is `data/model_card.md.jinja`. The same checkpoint gives the same card, so a repeated upload changes nothing.
"""

from __future__ import annotations

import re
import shlex
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
from outlierq.pipeline.measuring.measure import Measurement
from outlierq.recipe import HUB, recipe_yaml
from outlierq.report.markdown import Markdown, code, fenced, inline
from outlierq.report.terminal import begun_with, human_bytes

T = TypeVar("T")
# What of the source's card holds for a compressed copy as well.
# Of its tags those that are of the file, and not of the model, do not.
OF_FILES = re.compile(
    r"(?i)^(safetensors|gguf|pytorch|tf|jax|onnx|mlx|quantized|compressed-tensors|awq|gptq|fp8|nvfp4|mxfp4|bitsandbytes|"
    r"[\d.]+-bit|region:.*|base_model:.*|license:.*|arxiv:.*|dataset:.*|autotrain_compatible|endpoints_compatible)$"
)
CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
MAX_NOTES = 10
CACHED = 8192  # positions, for which a cache is reckoned
UNKNOWN = "–"


@dataclass(frozen=True)
class CardPicture:
    """A picture beside the card."""

    file: str
    title: str


@dataclass(frozen=True)
class Beside:
    """What the files beside a card hold. weight_bytes: of the weights; cache_bytes: of `CACHED` positions, in 16 bits;
    None where that is not known.
    """

    pictures: Sequence[CardPicture] = ()
    weight_bytes: int | None = None
    cache_bytes: int | None = None


NOTHING = Beside()


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
    ours = ["outlierq", *([format] if format else []), *sorted({f"{row.bits}-bit" for row in report.rows})]
    values: dict[str, Any] = {"base_model": base_model, "base_model_relation": "quantized"} if base_model else {}
    return {
        **values,
        "quantized_by": repository.partition("/")[0],
        "library_name": format_type(format).library if format else Format.library,
        "pipeline_tag": "text-generation",
        **carried,
        "tags": list(dict.fromkeys([*_tags(source), *ours])),
    }


def _tags(source: Mapping[str, Any]) -> list[str]:
    """The tags of the source's card that say what the model is."""
    tags = source.get("tags")
    listed = tags if isinstance(tags, list) else []
    return [tag for tag in listed if isinstance(tag, str) and not OF_FILES.match(tag)]


def model_card(
    report: Report,
    repository: str,
    base_model: str | None,
    head: Mapping[str, Any],
    *,
    gate: Sequence[Mapping[str, Any]] = (),
    clients: Sequence[str] = (),
    beside: Beside = NOTHING,
) -> str:
    """The whole README.md. report: without paths of this machine. head: see `metadata`. gate: rows that were kept."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False, finalize=inline)
    environment.filters["code"] = code
    template = (resources.files("outlierq") / "data" / "model_card.md.jinja").read_text(encoding="utf-8")
    settings = dict(report.settings)
    measured = report.evaluation
    text = environment.from_string(template).render(
        metadata=Markdown(yaml.safe_dump(over_texts(dict(head), printable), sort_keys=False, allow_unicode=True)),
        name=repository.partition("/")[2],
        repository=Markdown(repository),
        base_model=base_model,
        description=_sentence(settings.pop("description", "")),
        report=report,
        measured=measured,
        tasks=_tasks(measured or {}),
        task_conditions=_task_conditions(measured or {}),
        gate=gate,
        clients=clients,
        runs={client: _runs(client, clients) for client in ("transformers", "vLLM")} | {"vllm": _runs("vLLM", clients)},
        pictures=beside.pictures,
        recipe=fenced("yaml", recipe_yaml(report.settings)),
        made_by=shlex.join(["outlierq", "quantize", base_model or "MODEL", "-r", HUB + repository, "-o", "out"]),
        measured_by=_measuring(measured, repository, base_model) if measured else None,
        samples=measured["samples"] if measured and "samples" in measured else (),
        weight_bytes=beside.weight_bytes,
        cache_bytes=beside.cache_bytes,
        cached=CACHED,
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


def _measuring(measured: Mapping[str, Any], repository: str, base_model: str | None) -> str:
    """The command that measures the same again. A text of somebody's own is named by its last part."""
    conditions, usual = measured["conditions"], vars(Measurement())
    words = ["outlierq", "eval", repository, "--reference", base_model or "MODEL"]
    for name, value in conditions.items():
        if name in usual and value not in (usual[name], None, []) and name not in ("bos", "generate"):
            words += [f"--{name.replace('_', '-')}", ",".join(value) if isinstance(value, list) else str(value)]
    words += [] if conditions.get("bos", True) else ["--no-bos"]
    words += ["--generate"] if conditions.get("generate") else []
    return shlex.join(words)


def _sentence(text: str) -> str:
    return " ".join(text.split()).rstrip(".")


def _few(notes: list[str]) -> list[str]:
    """The first notes, and how many more there are."""
    more = len(notes) - MAX_NOTES
    return notes if more <= 0 else [*notes[:MAX_NOTES], f"and {more} more, all of them in outlierq.json"]
