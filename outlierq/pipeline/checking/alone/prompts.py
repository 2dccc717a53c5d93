"""Is each chat template one? Parsed, never run: a template may be hostile."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from outlierq.core.machine.untrusted import brief
from outlierq.pipeline.checking.alone.settings import file_of
from outlierq.pipeline.checking.finding import Findings

if TYPE_CHECKING:
    from outlierq.core.model import Checkpoint

CHECK = "tokenizer"


def check_prompts(checkpoint: Checkpoint, findings: Findings) -> None:
    """Every template of the checkpoint must be a template, and must read the messages one by one."""
    for name, text in templates_of(checkpoint):
        what = _fault(text)
        if what:
            findings.fault(CHECK, name, what)


def templates_of(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """(file, text) of each chat template, wherever it is kept."""
    for file in checkpoint.files if checkpoint.kind != "gguf" else ():
        if file.name.endswith(".jinja"):
            yield file.name, file.read().decode(errors="replace")
        elif file.name == "chat_template.json":
            yield file.name, _text(file.read())
    inside = (file_of(checkpoint, "tokenizer_config.json") or {}).get("chat_template")
    for text in [inside] if isinstance(inside, str) else [part.get("template") for part in _parts(inside)]:
        if isinstance(text, str):
            yield "tokenizer_config.json", text


def _parts(value: Any) -> list[dict[str, Any]]:
    """Several templates by name."""
    return [part for part in value if isinstance(part, dict)] if isinstance(value, list) else []


def _text(content: bytes) -> str:
    """The template in a chat_template.json; nothing where there is none."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return "{% no JSON"
    text = value.get("chat_template") if isinstance(value, dict) else None
    return text if isinstance(text, str) else ""


def _fault(text: str) -> str | None:
    """What is wrong with a template; None when nothing is, or when it cannot be told."""
    try:
        from jinja2 import Environment, TemplateError, meta, nodes
    except ImportError:  # transformers runs without it as long as no template is used
        return None
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except TemplateError as error:
        # transformers has a tag of its own, `generation`; what else is not known here is no template there, either.
        return (
            None if "generation" in str(error) else f"is a chat template that cannot be read: {brief(str(error), 80)}"
        )
    except RecursionError:
        return None
    if "messages" not in meta.find_undeclared_variables(tree):
        return "is a chat template that leaves out the messages"
    printed = [part for output in tree.find_all(nodes.Output) for part in output.nodes]
    if any(isinstance(part, nodes.Name) and part.name == "messages" for part in printed):
        return "is a chat template that prints the messages as Python shows them"
    return None
