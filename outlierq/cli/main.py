"""The `outlierq` command: registers the commands, turns our errors into a message and an exit code."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
from types import ModuleType
from typing import Any, NoReturn

import typer

from outlierq.cli import topics
from outlierq.cli.commands import (
    adapter,
    bench,
    calibrate,
    demo,
    detect,
    evaluate,
    plan,
    publish,
    quantize,
    recipes,
    tune,
)
from outlierq.cli.commands.checking import compare, diff, inspect, report, verify
from outlierq.cli.commands.choosing import fit, frontier, recommend, study, sweep
from outlierq.cli.help import Group, register, usage
from outlierq.cli.shared import translated
from outlierq.cli.streams import Streams
from outlierq.core.errors import EXIT_ERROR, OutlierqError, lacks_memory

INTERRUPTED, TERMINATED = 130, 143
SEVERAL = ("quantize", "calibrate")  # what torchrun may start several times
EPILOG = "Exit codes: 0 done · 1 an error, or SIGTERM · 2 wrong usage · 3 a quality gate failed · 130 Ctrl-C"

app = typer.Typer(
    name="outlierq",
    cls=Group,
    help="Compress an LLM checkpoint: one command, a smaller checkpoint that serving stacks load, its loss measured.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# Groups of the overview -> their commands.
COMMANDS: dict[str, dict[str, ModuleType]] = {
    "Compress": {"recommend": recommend, "plan": plan, "quantize": quantize, "calibrate": calibrate, "tune": tune},
    "Choose": {"fit": fit, "frontier": frontier, "sweep": sweep, "detect": detect},
    "Check": {
        "eval": evaluate,
        "verify": verify,
        "compare": compare,
        "diff": diff,
        "inspect": inspect,
        "report": report,
    },
    "Share": {"publish": publish, "adapter": adapter},
    "Try": {"demo": demo, "bench": bench},
}
for _panel, _modules in COMMANDS.items():
    for _name, _module in _modules.items():
        register(app, _name, translated(_module.command), _module.EXAMPLES, _panel)
app.add_typer(recipes.app, name="recipes", rich_help_panel="Choose")
app.add_typer(study.app, name="study", rich_help_panel="Choose")
register(app, "help", translated(topics.command), topics.EXAMPLES, "Try")


def _version(asked: bool) -> None:
    if asked:
        from outlierq import __version__

        typer.echo(f"outlierq {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks of errors.", envvar="OUTLIERQ_DEBUG"),
) -> None:
    if debug:
        os.environ["OUTLIERQ_DEBUG"] = "1"
    if context.obj is not None and context.obj.size > 1 and context.invoked_subcommand not in SEVERAL:
        raise OutlierqError(
            f"{context.invoked_subcommand} runs in one process, and {context.obj.size} were started",
            hint=f"start it without torchrun; several processes share the work of {' and '.join(SEVERAL)}",
        )


def run() -> None:
    """Entry point: runs a command and leaves with its exit code, quickly."""
    # Importing torch and transformers makes a million objects that stay; to look for garbage among them takes 0.3 s.
    gc.set_threshold(50_000)
    streams = Streams()
    try:
        _run()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    code = streams.exit_code(code)
    if "torch" not in sys.modules:
        sys.exit(code)
    # Taking torch and transformers apart would take the interpreter another second, with nothing left to do.
    atexit._run_exitfuncs()
    streams.flush()
    os._exit(code)


def _run() -> None:
    """Exit codes 0, 1, 2 and 3; no traceback for a user's mistake."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads of torch would spin while they wait for each other: with another program on the machine half of the time.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGTERM, _terminate)
    try:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            _command()
        else:
            from outlierq.pipeline.processes.ranks import joined

            with joined() as ranks:
                _command(obj=ranks)
    except OutlierqError as error:
        if os.environ.get("OUTLIERQ_DEBUG"):
            raise
        _say_error(str(error))
        sys.exit(error.exit_code)
    except (SystemExit, KeyboardInterrupt) as stop:
        # Typer turns Ctrl-C into this exit code, once it has begun.
        code = INTERRUPTED if isinstance(stop, KeyboardInterrupt) else stop.code
        if code in (INTERRUPTED, TERMINATED):
            typer.echo("\nstopped; run the same command again to continue", err=True)
        sys.exit(EXIT_ERROR if code == TERMINATED else code)
    except (OSError, MemoryError, RuntimeError) as error:
        said = _of_the_machine(error)
        if said is None or os.environ.get("OUTLIERQ_DEBUG"):
            raise
        _say_error(str(said))
        sys.exit(EXIT_ERROR)


def _command(**more: Any) -> NoReturn:
    """What the words of the command line ask for; wrong ones are said as any error.

    Typer's own box breaks what is to be copied, and in a job of GitHub it is full of codes for colours.
    """
    try:
        code = app(prog_name="outlierq", standalone_mode=False, **more)
    except typer.TyperException as error:
        if error.format_message():  # nothing where the help has been shown instead
            _say_error(_wrong_usage(error))
        sys.exit(error.exit_code)
    sys.exit(code or 0)


def _wrong_usage(error: typer.TyperException) -> str:
    """What is wrong with the command line, how it should look, and where to read more."""
    context = getattr(error, "ctx", None)
    if context is None:
        return error.format_message()
    return (
        f"{error.format_message()}\n  usage: {usage(context.command, context)}\n\nhint: {context.command_path} --help"
    )


def _say_error(text: str) -> None:
    """An error on stderr; in a job of GitHub also as an annotation."""
    from outlierq.report.ci.github import annotation

    typer.echo(f"error: {text}", err=True)
    marked = annotation(text)
    if marked is not None:
        typer.echo(marked, err=True)


def _terminate(*_: Any) -> None:
    """SIGTERM: leave as Ctrl-C does, so that files are closed and time spent is recorded."""
    raise SystemExit(TERMINATED)


def _of_the_machine(error: OSError | MemoryError | RuntimeError) -> OutlierqError | None:
    """What the machine could not do, and what to try; None when it is no fault of the machine."""
    if lacks_memory(error):
        return OutlierqError(
            f"there is not enough memory: {str(error).splitlines()[0] if str(error) else 'an allocation failed'}",
            hint="free some, or lower calibration.batch_size, and run the same command again; it continues where it "
            "stopped",
        )
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return OutlierqError(
            f"{where}{error.strerror or error}",
            hint="when the cause is gone, run the same command again; --debug shows where it happened",
        )
    return None
