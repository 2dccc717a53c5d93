"""What all pages share: one style, one script, and templates in which everything from outside is text.

Everything that comes from outside (names, tokens, sentences) goes through Jinja's escaping; as a second lock the page's
Content-Security-Policy runs only the scripts whose hashes it names and lets nothing load from anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from outlierq import __version__
from outlierq.core.errors import OutputError
from outlierq.core.machine.own_files import write_atomically
from outlierq.core.machine.printable import over_texts, printable

if TYPE_CHECKING:
    from markupsafe import Markup

T = TypeVar("T")


def render(template: str, *, css: str = "", script: str = "page.js", **content: Any) -> str:
    """The page of `TEMPLATE.html`, which extends page.html. css: rules of its own after the shared ones. script: the
    file that it runs.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    code = part(script)
    environment = Environment(
        loader=FunctionLoader(part),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=printable_value,
    )
    environment.filters["breakable"] = breakable
    environment.filters["drawing"] = Markup
    return environment.get_template(f"{template}.html").render(
        **content,
        version=__version__,
        css=Markup(part("page.css") + css),
        script=Markup(code),
        script_hashes=Markup(policy_hash(code)),
    )


def part(name: str) -> str:
    """A file of this folder."""
    return (files("outlierq.report.pages") / name).read_text(encoding="utf-8")


def write(path: Path, content: bytes) -> None:
    """The whole file or none of it, and its folder; OutputError when that is not possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise OutputError(f"cannot write {path} ({len(content)} bytes): {error.strerror or error}") from error


def model_name(source: str) -> str:
    """A model as people call it, of what a user gave: owner/name as it is, of a path the last part that says something.

    A snapshot in a Hub cache (models--owner--name/snapshots/REVISION) is owner/name; a GGUF file loses its ending.
    """
    parts = [each for each in source.replace("\\", "/").split("/") if each not in ("", ".", "..")]
    cached = next((each for each in parts if each.startswith("models--")), None)
    if cached is not None:
        return cached.removeprefix("models--").replace("--", "/")
    if len(parts) == 2 and not source.startswith(("/", ".", "~")):
        return source.rstrip("/")
    return parts[-1].removesuffix(".gguf") if parts else source


def breakable(name: str) -> Markup:
    """A dotted name that may be broken after a dot."""
    from markupsafe import Markup, escape

    return Markup(".<wbr>").join(escape(printable(each)) for each in name.split("."))


def printable_value(value: T) -> T:
    """What a template writes: our own markup as it is, any other text without characters that act."""
    return cast("T", printable(str(value))) if type(value) is str else value


def page_json(values: Any) -> str:
    """JSON in one line, without characters that act."""
    return json.dumps(over_texts(values, printable), ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def element_json(values: Any) -> str:
    """The same for a script element: "<" can be written as an escape, so that no value ends the element."""
    return page_json(values).replace("<", "\\u003c")


def policy_hash(script: str) -> str:
    """The hash by which a Content-Security-Policy names an inline script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
