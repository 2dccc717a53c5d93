"""`outlierq help`: what recipes, formats and gates are, in a page each; or the help of a command."""

from __future__ import annotations

from importlib import resources
from typing import Annotated

import typer

from outlierq.cli.help import lines_of, print_lines
from outlierq.core.errors import nearest

EXAMPLES = "Examples:\n\n  outlierq help recipes\n\n  outlierq help gates\n\n  outlierq help quantize"
TOPICS = ("recipes", "formats", "gates")


def command(
    context: typer.Context,
    topic: Annotated[str | None, typer.Argument(help=f"{', '.join(TOPICS)}, or a command.", metavar="TOPIC")] = None,
) -> None:
    """Explain recipes, formats or gates, or show the help of a command."""
    overview = context.parent
    assert overview is not None, "help is a command of outlierq"
    commands = getattr(overview.command, "commands", {})
    if topic is None:
        typer.echo(f"topics: {', '.join(TOPICS)}; or `outlierq help COMMAND`, as `outlierq COMMAND --help`")
    elif topic in TOPICS:
        print_lines(lambda width: lines_of(_text(topic), width))
    elif topic in commands:
        inner = commands[topic]
        inner.get_help(type(context)(inner, parent=overview, info_name=topic))
    else:
        known = [*TOPICS, *commands]
        close = nearest(topic, known)
        advice = f"did you mean {close}?" if close else f"choose {', '.join(TOPICS)}, or a command"
        raise typer.BadParameter(f"{topic!r} is no topic and no command; {advice}", param_hint="TOPIC")


def _text(topic: str) -> str:
    """The page of a topic; recipes are listed below theirs."""
    text = (resources.files("outlierq") / "data" / "help" / f"{topic}.txt").read_text(encoding="utf-8")
    if topic != "recipes":
        return text
    import outlierq

    listed = "\n".join(f"{name}: {said}" for name, said in outlierq.recipes().items())
    return f"{text}\n{listed}\n"
