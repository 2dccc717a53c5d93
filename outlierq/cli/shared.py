"""What several commands share: options, the device, progress, and printing."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from outlierq.core.errors import ArgumentError, OutlierqError

if TYPE_CHECKING:
    from outlierq.core.limits import Limits
    from outlierq.core.model import Checkpoint
    from outlierq.pipeline.events import Listener
    from outlierq.pipeline.planning.plan import Plan
    from outlierq.pipeline.processes.ranks import Ranks
    from outlierq.recipe import Recipe

T = TypeVar("T")


def recipe_names(incomplete: str) -> list[str]:
    """The shipped recipes that a shell offers; where none fits it offers files by itself."""
    from outlierq.recipe.shipped import shipped

    return [name for name in shipped() if name.startswith(incomplete)]


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


def open_model(source: str, revision: str | None = None, trust_remote_code: bool = False) -> Checkpoint:
    """The checkpoint named on the command line."""
    from outlierq.load import open_checkpoint

    return open_checkpoint(source, revision=revision, trust_remote_code=trust_remote_code)


def open_streamed(
    context: typer.Context,
    source: str,
    out: Path,
    revision: str | None,
    trust_remote_code: bool,
    restart: bool = False,
) -> Checkpoint:
    """The Hub id named on the command line; its shards come and go beside `out`. They stay for a run that goes on."""
    from outlierq.load import stream_checkpoint

    shards = out.with_name(f"{out.name}.shards")
    checkpoint = stream_checkpoint(
        source, shards, revision=revision, trust_remote_code=trust_remote_code, restart=restart
    )
    context.call_on_close(checkpoint.store.close)
    return checkpoint


def open_headers(source: str, revision: str | None, trust_remote_code: bool) -> Checkpoint:
    """The checkpoint, of a Hub id without its weights."""
    from outlierq.load import is_hub_id, stream_checkpoint

    if is_hub_id(source):
        from huggingface_hub import is_offline_mode

        if not is_offline_mode():
            return stream_checkpoint(source, None, revision=revision, trust_remote_code=trust_remote_code)
    return open_model(source, revision, trust_remote_code)


def load_recipe(reference: str, settings: list[str] | None, trust_methods: bool = False) -> Recipe:
    """The checked recipe."""
    from outlierq import recipe

    return recipe.load(reference, settings, trust_methods=trust_methods)


def choose_device(wanted: str) -> str:
    """ "cpu" or "cuda"; an error when cuda is asked for and there is none."""
    if wanted not in ("auto", "cpu", "cuda"):
        raise typer.BadParameter(f"{wanted!r} is not a device; choose auto, cpu or cuda", param_hint="--device")
    if wanted == "cpu":
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if wanted == "cuda":
        raise OutlierqError("--device cuda: torch finds no CUDA device", hint="use --device cpu")
    return "cpu"


def ranks_of(context: typer.Context, stream_from_hub: bool) -> Ranks:
    """The processes that share this command's work."""
    from outlierq.pipeline.processes.ranks import ALONE

    ranks = context.obj or ALONE
    if stream_from_hub:
        refuse_several(ranks, "--stream-from-hub")
    return ranks


def ceiling(max_memory: str | None) -> int | None:
    """The bytes of --max-memory, None without it."""
    if max_memory is None:
        return None
    from outlierq.core.machine.heap import return_memory_at_once
    from outlierq.recipe import parse_size

    return_memory_at_once()  # before the model is built: its empty parts are allocated for a moment
    try:
        return parse_size(max_memory)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--max-memory") from None


def refuse_several(ranks: Ranks, what: str) -> None:
    """OutlierqError when several processes were started for something that one must do."""
    if ranks.size > 1:
        raise OutlierqError(
            f"{what} needs one process, and {ranks.size} were started", hint="start the same command without torchrun"
        )


def print_json(values: Any) -> None:
    """Data for machines, on stdout."""
    from outlierq.core.machine.printable import whole_characters

    text = json.dumps(whole_characters(values), indent=2, default=str)
    typer.echo(text.replace("\x7f", "\\u007f"))  # the one control character that json.dumps leaves as it is


def show(*parts: Any, stderr: bool = False) -> None:
    """Print rich renderables, plainly when it is not a terminal."""
    from outlierq.report.terminal import make_console

    console = make_console(stderr=stderr)
    for part in parts:
        console.print(part)


def say(text: str, quiet: bool = False) -> None:
    """One line of log on stderr."""
    if not quiet:
        typer.echo(text, err=True)


def plan_shower(quiet: bool) -> Callable[[Plan], None]:
    """What shows a plan on stderr, unless nothing is to be said."""

    def shown(plan: Plan) -> None:
        from outlierq.report import terminal

        if not quiet:
            show(terminal.plan_of(plan), stderr=True)

    return shown


def gate_limits(
    max_kl: float | None, max_perplexity_increase: str | None, min_top1: str | None, min_task: list[str] | None
) -> Limits:
    """The limits given on the command line."""
    from outlierq.core.limits import Limits, TaskLimit, share

    def read(parse: Callable[[str], T], text: str | None, option: str) -> T | None:
        try:
            return None if text is None else parse(text)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint=option) from None

    return Limits(
        max_kl,
        read(share, max_perplexity_increase, "--max-perplexity-increase"),
        read(share, min_top1, "--min-top1"),
        tuple(read(TaskLimit.parse, text, "--min-task") for text in min_task or ()),
    )


def refuse_unwritable(*paths: Path | None) -> None:
    """OutlierqError before any work when a file that is written after it cannot be; folders are made when needed."""
    for path in filter(None, paths):
        nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
        if path.is_dir() or not (nearest == path or nearest.is_dir()) or not os.access(nearest, os.W_OK):
            raise OutlierqError(
                f"{path} cannot be written: "
                + ("it is a folder" if path.is_dir() else f"{nearest} is no folder that can be written to"),
                hint="nothing was done; name another place",
            )


@contextmanager
def progress(quiet: bool) -> Iterator[Listener]:
    """A listener that draws a progress bar on a terminal, and prints a line now and then elsewhere."""
    from outlierq.report.progress import bar, lines

    if quiet:
        yield lambda event: None
    elif sys.stderr.isatty():
        with bar() as listen:
            yield listen
    else:
        yield lines(say)


def translated(command: Callable[..., None]) -> Callable[..., None]:
    """The command, which says of a value that makes no sense to which option it was given."""

    @functools.wraps(command)
    def call(*words: Any, **options: Any) -> None:
        try:
            command(*words, **options)
        except ArgumentError as error:
            raise typer.BadParameter(error.what, param_hint=f"--{error.argument.replace('_', '-')}") from None

    return call


def command_line() -> str:
    """What the user typed, so that a result says how to repeat it."""
    import shlex

    return shlex.join(["outlierq", *sys.argv[1:]])


def out_path(text: str) -> Path:
    """The output folder, absolute, so that its parent is known."""
    return Path(text).expanduser().absolute()
