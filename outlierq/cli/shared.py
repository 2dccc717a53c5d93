"""What several commands share: options, the device, progress, and printing."""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from outlierq.core.errors import ArgumentError, OutlierqError
from outlierq.report.log import Log

if TYPE_CHECKING:
    from outlierq.pipeline.asked.events import Event, Listener
    from outlierq.pipeline.planning.plan import Plan

T = TypeVar("T")


def recipe_names(incomplete: str) -> list[str]:
    """The shipped recipes that a shell offers; where none fits it offers files by itself."""
    from outlierq.recipe.shipped import shipped

    return [name for name in shipped() if name.startswith(incomplete)]


Like = Annotated[
    Path | None,
    typer.Option(help="A GGUF file that llama.cpp's converter made of MODEL: the result is written into its frame."),
]
Model = Annotated[str, typer.Argument(help="A Hugging Face folder, a Hub id (owner/name), or a GGUF file.")]
RecipeName = Annotated[
    str,
    typer.Option(
        "--recipe",
        "-r",
        help="A YAML file, or the name of a shipped recipe (`outlierq recipes list`).",
        autocompletion=recipe_names,
    ),
]
OptionalRecipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "-r",
        help="A YAML file, or the name of a shipped recipe (`outlierq recipes list`).",
        show_default="gptq-w4",
        autocompletion=recipe_names,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="Override a key of the recipe: quantize.group_size=64. May be repeated."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, or cuda; auto takes a GPU when there is one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines to stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no tables on stderr.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="A line on stderr for every step.")]
LogFile = Annotated[
    Path | None,
    typer.Option("--log-file", metavar="FILE", help="Add what is said and done to this file, with the time."),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        metavar="SIZE",
        help="Most memory that a process may hold, on the host and on its GPU each: 4GiB. What cannot stay below it is "
        "refused before work starts.",
    ),
]
StreamFromHub = Annotated[
    bool,
    typer.Option(
        "--stream-from-hub",
        help="Fetch the weight files of a Hub id when they are needed and delete them again: for models larger than "
        "the disk.",
    ),
]
Text = Annotated[str | None, typer.Option(help="Text file to measure on; default: the held-out part of `mix`.")]
Windows = Annotated[int, typer.Option(min=0, help="Number of windows of the text; 0 takes all.")]
WindowLength = Annotated[int, typer.Option(min=2, help="Tokens in a window; windows do not overlap.")]
GroupSize = Annotated[str, typer.Option(help="Columns that share a scale, or `channel`.")]
Restart = Annotated[bool, typer.Option("--restart", help="Throw away an unfinished run in the same place.")]
MaxKl = Annotated[float | None, typer.Option(min=0, help="Exit with 3 when KL per token is above this (nats).")]
MaxPerplexityIncrease = Annotated[
    str | None, typer.Option(metavar="SHARE", help="Exit with 3 when perplexity rises by more: 3% or 0.03.")
]
MinTop1 = Annotated[
    str | None, typer.Option(metavar="SHARE", help="Exit with 3 when top-1 agreement is below this: 90% or 0.9.")
]
MinTask = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TASK:POINTS",
        help="Exit with 3 when a task scores less: mmlu:-1.0 against the original, mmlu:40 by itself. May be repeated.",
    ),
]
DataDir = Annotated[Path | None, typer.Option(help="Read the tasks' data from here instead of the Hub.")]
Junit = Annotated[Path | None, typer.Option(help="Write what the gate says as JUnit XML, for CI servers.")]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="The format to write, instead of the recipe's export.format. Alone, with a MODEL that is compressed "
        "already: convert it without loss.",
    ),
]
Stats = Annotated[Path, typer.Option(help="The statistics that `outlierq calibrate` wrote.")]
Client = Annotated[str, typer.Option(help="What has to load the result: transformers, vllm or llama.cpp.")]
Numbers = Annotated[
    list[str] | None,
    typer.Option(help="Choose among these numbers only: int4, int8, fp8, nvfp4, Q4_K ... May be repeated."),
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Measure again even if the same was measured before.")]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that the checkpoint brings along. Read it first.")
]
TrustMethods = Annotated[
    bool,
    typer.Option(
        "--trust-methods",
        help="Follow `method: package.module:function` of the recipe: that runs its Python code. Read it first.",
    ),
]


@dataclass(frozen=True)
class Watching:
    """How much of a command's work is told, and where it is kept."""

    verbose: bool = False
    log: Log = field(default_factory=Log)


WATCHING: ContextVar[Watching] = ContextVar("watching")


def watching() -> Watching:
    """What was asked for; the usual outside of a command."""
    return WATCHING.get(Watching())


def print_json(values: Any) -> None:
    """Data for machines, on stdout."""
    from outlierq.core.machine.printable import whole_characters

    text = json.dumps(whole_characters(values), indent=2, default=str)
    typer.echo(text.replace("\x7f", "\\u007f"))  # the one control character that json.dumps leaves as it is


def show(*parts: Any, stderr: bool = False) -> None:
    """Print rich renderables, plainly when it is not a terminal; strings as they are, however long."""
    from outlierq.report.terminal import make_console

    console = make_console(stderr=stderr)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str), markup=not isinstance(part, str))
        watching().log.show(part)


def numbers_of(text: str | None, argument: str) -> tuple[int, ...]:
    """Whole numbers separated by commas: 3,4,5; ArgumentError names the argument."""
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise ArgumentError(f"{text!r} are no whole numbers separated by commas", argument=argument) from None


def say(text: str, quiet: bool = False) -> None:
    """One line of log on stderr."""
    watching().log.write(text)
    if not quiet:
        typer.echo(text, err=True)


def plan_shower(stderr: bool = True) -> Callable[[Plan], None]:
    """What shows a plan, and what it will cost where that is known."""

    def shown(plan: Plan) -> None:
        from outlierq.report import terminal

        costs = [] if plan.expected is None else terminal.expectations(plan)
        show(terminal.plan_of(plan), *costs, stderr=stderr)

    return shown


@contextmanager
def progress(quiet: bool) -> Iterator[Listener]:
    """A listener that draws two lines on a terminal, and prints one now and then elsewhere; the log gets every step."""
    from outlierq.report.progress import bar, lines, on_terminal

    asked = watching()
    quiet = quiet or os.environ.get("RANK", "0") != "0"  # of several processes one tells
    with ExitStack() as shown:
        listeners = []
        if not quiet and on_terminal():
            listeners.append(shown.enter_context(bar()))
        if not quiet and (asked.verbose or not on_terminal()):
            listeners.append(shown.enter_context(lines(_on_stderr, steps=asked.verbose)))
        if asked.log:
            listeners.append(shown.enter_context(lines(asked.log.write, steps=True)))

        def listen(event: Event) -> None:
            for each in listeners:
                each(event)

        yield listen


def _on_stderr(text: str) -> None:
    typer.echo(text, err=True)


def watched(command: Callable[..., None]) -> Callable[..., None]:
    """The command with --verbose and --log-file, where it can be --quiet: where there is something to watch."""
    signature = inspect.signature(command, eval_str=True)
    if "quiet" not in signature.parameters:
        return command

    @functools.wraps(command)
    def call(*words: Any, verbose: bool = False, log_file: Path | None = None, **options: Any) -> None:
        log = Log(log_file)
        before = WATCHING.set(Watching(verbose, log))
        log.write(command_line())
        try:
            command(*words, **options)
            log.write("done")
        except OutlierqError as error:
            log.write(f"error: {error}")
            raise
        except BaseException as error:
            log.write(f"ended: {error or type(error).__name__}")
            raise
        finally:
            WATCHING.reset(before)

    kind = inspect.Parameter.KEYWORD_ONLY
    more = {"verbose": (Verbose, False), "log_file": (LogFile, None)}
    added = [inspect.Parameter(name, kind, default=d, annotation=a) for name, (a, d) in more.items()]
    call.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *added])  # type: ignore[attr-defined]
    call.__annotations__ = command.__annotations__ | {name: annotation for name, (annotation, _) in more.items()}
    return call


def translated(command: Callable[..., None]) -> Callable[..., None]:
    """The command as it is registered: it says of a value that makes no sense to which option it was given."""

    @functools.wraps(command)
    def call(*words: Any, **options: Any) -> None:
        try:
            command(*words, **options)
        except ArgumentError as error:
            raise typer.BadParameter(error.what, param_hint=f"--{error.argument.replace('_', '-')}") from None

    return watched(call)


def on_page(text: Callable[[], str]) -> None:
    """Add to the page of a CI job what a run came to, where there is such a page; one that is full loses nothing."""
    from outlierq.report.ci import github

    if github.SUMMARY in os.environ:
        try:
            github.add_summary(text())
        except OSError as error:
            say(f"note: the summary of this job cannot be written: {error}")


def command_line() -> str:
    """What the user typed, so that a result says how to repeat it."""
    import shlex

    return shlex.join(["outlierq", *sys.argv[1:]])
