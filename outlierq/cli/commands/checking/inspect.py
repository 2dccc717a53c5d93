"""Look into a checkpoint, a statistics folder, or an unfinished run."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from outlierq.cli import shared

EXAMPLES = (
    "Examples:\n\n  outlierq inspect ./SmolLM2-135M-W4\n\n  outlierq inspect ./stats\n\n"
    "  outlierq inspect model.gguf --json"
)


def command(
    target: Annotated[str, typer.Argument(help="A checkpoint, a statistics folder, or the folder of a run.")],
    revision: shared.Revision = None,
    trust_remote_code: shared.RemoteCode = False,
    as_json: shared.AsJson = False,
) -> None:
    """Say what TARGET is and holds, from headers alone."""
    import outlierq

    facts = outlierq.inspect(target, revision=revision, trust_remote_code=trust_remote_code)
    if as_json:
        shared.print_json(facts)
        return
    for line in lines(facts):
        typer.echo(line)
    if facts.get("report"):
        from outlierq.report import terminal

        shared.show(terminal.summary(outlierq.Report.from_dict(facts["report"])))


def lines(facts: dict[str, Any]) -> list[str]:
    """The facts, one a line."""
    from outlierq.report.terminal import human_bytes

    shown = []
    for key, value in facts.items():
        if key in ("report", "groups", "settings", "identity") or value is None or value == []:
            continue
        if key == "bytes":
            value = f"{human_bytes(value)} ({value:,} bytes)"
        elif key == "units_done":
            value = f"{len(value)} ({', '.join(value[-3:])})"
        elif isinstance(value, dict):
            value = ", ".join(f"{name} {count}" for name, count in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        elif isinstance(value, float):
            value = f"{value:.3f}"
        elif isinstance(value, int) and not isinstance(value, bool):
            value = f"{value:,}"
        shown.append(f"{key.replace('_', ' '):<26} {value}")
    return shown
