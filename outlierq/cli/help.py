"""`--help` as plain lines: options in groups, no name ever cut, examples that can be copied at any width.

Typer's own boxes cut names at 80 columns and fold commands without a backslash, so that a copied example breaks.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

WIDEST = 100  # columns; longer lines are hard to read
ROOM = 64  # columns from which on names and what they mean stand beside each other
NAMES = 30  # columns for names; longer ones stand on a line of their own
# Options by what they are about, in the order of the groups; all others come first, as "Options".
GROUPS = {
    "Recipe": ("--recipe", "--set", "--format", "--like", "--client", "--numbers"),
    "Calibration": (
        "--stats",
        "--samples",
        "--sequence-length",
        "--chat-template",
        "--seed",
        "--sensitivity",
        "--serve",
    ),
    "Measuring": (
        *("--tasks", "--data-dir", "--text", "--windows", "--window-length", "--limit", "--num-fewshot"),
        *("--batch-size", "--backend", "--runtime", "--dtype", "--no-bos", "--max-length", "--kv-cache", "--generate"),
        *("--record", "--no-cache"),
    ),
    "Quality gate": ("--max-kl", "--max-perplexity-increase", "--min-top1", "--min-task", "--junit"),
    "Machine": ("--device", "--max-memory", "--stream-from-hub", "--restart"),
    "Source": ("--revision", "--trust-remote-code", "--trust-methods"),
    "Output": ("--json", "--csv", "--markdown", "--quiet", "--verbose", "--log-file", "--help"),
}
KINDS = {"str": "TEXT", "list[str]": "TEXT", "path": "PATH", "int": "N", "int range": "N"}
KINDS |= {"float": "NUMBER", "float range": "NUMBER", "bool": ""}
WORD = re.compile(r"""(?:[^\s'"]|'[^']*'|"[^"]*")+""")
NAMED = r"(?:--[\w-]+(?: \S+)?|[\w-]+(?:, [\w-]+)*): "  # how a line of a list begins
Line = tuple[str, str]  # what is coloured, and what follows it plainly


class Command(TyperCommand):
    """A command whose help is `page`."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print it; nothing is left for the formatter."""
        print_lines(lambda width: page(self, ctx, width))


class Group(TyperGroup):
    """The same for a command with further commands."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print it; nothing is left for the formatter."""
        print_lines(lambda width: page(self, ctx, width))


def page(command: Any, context: Any, width: int) -> list[Line]:
    """The lines of a command's help, none longer than `width` but for single words."""
    lines: list[Line] = [*_folded(f"Usage: {usage(command, context)}", width, hang=4), ("", "")]
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        lines += [*_folded(" ".join(paragraph.split()), width), ("", "")]
    for title, rows in _sections(command, context):
        lines += [(title, ""), *_rows(rows, width), ("", "")]
    return [*lines, *examples(command.epilog or "", width)]


def usage(command: Any, context: Any) -> str:
    """How the command is called: "outlierq plan [OPTIONS] MODEL"."""
    pieces = command.collect_usage_pieces(context)
    words = (piece.strip("{}").upper() if piece.startswith("{") else piece for piece in pieces)
    return " ".join([context.command_path, *words])


def examples(epilog: str, width: int) -> list[Line]:
    """What stands below a help: titles, remarks, and commands that are broken with backslashes."""
    lines: list[Line] = []
    for part in filter(None, (line.strip() for line in epilog.split("\n"))):
        if part.startswith("outlierq "):
            lines += [(line, "") for line in broken(part, width)]
        elif part.endswith(":") and not lines:
            lines.append((part.removesuffix(":"), ""))
        else:
            lines += _folded(part, width, indent=2 if lines else 0)
    return lines


def broken(command: str, width: int) -> list[str]:
    """A command on several lines, which a shell reads as one; an option keeps its value beside it."""
    pairs: list[str] = []
    for word in WORD.findall(command):
        if pairs and pairs[-1].startswith("-") and " " not in pairs[-1] and not word.startswith(("-", "|", ">")):
            pairs[-1] += f" {word}"
        else:
            pairs.append(word)
    lines = [f"  {pairs[0]}"]
    for pair in pairs[1:]:
        if len(lines[-1]) + 1 + len(pair) > width - len(" \\"):
            lines[-1] += " \\"
            lines.append(f"      {pair}")
        else:
            lines[-1] += f" {pair}"
    return lines


def lines_of(text: str, width: int) -> list[Line]:
    """The lines of a page: paragraphs are folded, commands broken, other indented lines left as they are.

    A line "name: what it is" begins a paragraph of its own, which hangs.
    """
    lines: list[Line] = []
    for block in text.strip().split("\n\n"):
        rows = block.split("\n")
        if len(rows) == 1 and not lines:
            lines.append((rows[0], ""))
        elif rows[0].startswith("  "):
            commands = ((row.strip(), row) for row in rows)
            lines += [line for command, row in commands for line in _command_or_code(command, row, width)]
        else:
            for paragraph in re.split(rf"\n(?={NAMED})", block):
                hang = 4 if re.match(NAMED, paragraph) else 0
                lines += _folded(" ".join(paragraph.split()), width, hang=hang)
        lines.append(("", ""))
    return lines[:-1]


def _command_or_code(command: str, row: str, width: int) -> list[Line]:
    """A command in lines that can be copied, or a line of a file as it is."""
    return [(line, "") for line in broken(command, width)] if command.startswith("outlierq ") else [("", row)]


def print_lines(made: Callable[[int], list[Line]]) -> None:
    """Print lines that are made for the width of the terminal."""
    from rich.text import Text

    from outlierq.report.terminal import make_console

    console = make_console()
    for coloured, plain in made(min(console.width, WIDEST)):
        style = "cyan" if coloured.startswith(" ") else "bold"
        console.print(Text.assemble((coloured, style), plain), soft_wrap=True)


def _sections(command: Any, context: Any) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Commands by panels, arguments, and options by groups."""
    panels: dict[str, list[tuple[str, str]]] = {}
    for name in getattr(command, "commands", ()):
        inner = command.get_command(context, name)
        said = " ".join(inspect.cleandoc(inner.help or "").split("\n\n")[0].split())
        panels.setdefault(inner.rich_help_panel or "Commands", []).append((name, said))
    yield from panels.items()
    options: dict[str, list[tuple[str, str]]] = {title: [] for title in ("Arguments", "Options", *GROUPS)}
    for param in command.get_params(context):
        record = param.get_help_record(context)
        if record is not None:
            title = "Options" if panels else _group(param)
            options[title].append((_names(param, record[0]), record[1]))
    yield from ((title, rows) for title, rows in options.items() if rows)


def _group(param: Any) -> str:
    """The group of an option: its own word for it, or the one that its name stands for."""
    if not param.opts[0].startswith("-"):
        return "Arguments"
    return param.rich_help_panel or next(
        (title for title, names in GROUPS.items() if {*names} & {*param.opts}), "Options"
    )


def _names(param: Any, shown: str) -> str:
    """Names and the kind of value, "-r, --recipe TEXT"; typer writes "-r, --recipe <str>"."""
    names = shown.partition(" <")[0]
    if not param.opts[0].startswith("-"):
        return names.strip("{}").upper()
    kind = re.search(r"<(.*)>$", shown)
    return " ".join(filter(None, [names, KINDS.get(kind[1], kind[1].upper()) if kind else ""]))


def _rows(rows: Sequence[tuple[str, str]], width: int) -> Iterator[Line]:
    """Names, and beside or below them what they mean."""
    column = min(NAMES, max(len(name) for name, _ in rows)) + 4
    for name, said in rows:
        if width < ROOM:
            yield f"  {name}", ""
            yield from _folded(said, width, indent=6)
            continue
        first, *others = textwrap.wrap(said, width - column, break_long_words=False, break_on_hyphens=False) or [""]
        if len(name) > column - 4:
            yield f"  {name}", ""
            others.insert(0, first)
        else:
            yield f"  {name:<{column - 2}}", first
        yield from (("", " " * column + line) for line in others)


def _folded(text: str, width: int, indent: int = 0, hang: int = 0) -> Iterable[Line]:
    """A paragraph in lines."""
    first, then = " " * indent, " " * (indent + hang)
    options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    return (("", line) for line in textwrap.wrap(text, width, initial_indent=first, subsequent_indent=then, **options))


def register(app: typer.Typer, name: str, command: Any, examples: str, panel: str) -> None:
    """Add a command with its examples to a group of the overview."""
    app.command(name, cls=Command, epilog=examples, rich_help_panel=panel)(command)
