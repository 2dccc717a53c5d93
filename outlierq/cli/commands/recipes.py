"""List, show and check recipes."""

from __future__ import annotations

from typing import Annotated

import typer

from outlierq.cli import shared
from outlierq.cli.help import Command, Group

app = typer.Typer(
    cls=Group,
    help="List, show and check recipes.",
    no_args_is_help=True,
    epilog="Examples:\n\n  outlierq recipes list\n\n  outlierq recipes show gptq-w4 > mine.yaml\n\n"
    "  outlierq recipes check mine.yaml",
)

Reference = Annotated[
    str,
    typer.Argument(help="A YAML file, or the name of a shipped recipe.", autocompletion=shared.recipe_names),
]


@app.command("list", cls=Command, epilog="Example:\n\n  outlierq recipes list --json")
def list_recipes(as_json: shared.AsJson = False) -> None:
    """The recipes that come with outlierq."""
    import outlierq

    descriptions = outlierq.recipes()
    if as_json:
        shared.print_json(descriptions)
        return
    width = max(len(name) for name in descriptions)
    for name, text in descriptions.items():
        typer.echo(f"{name:<{width}}  {text}")


@app.command("show", cls=Command, epilog="Example:\n\n  outlierq recipes show awq-w4 > mine.yaml")
def show(reference: Reference) -> None:
    """Print a recipe as it is written, comments included."""
    import outlierq

    typer.echo(outlierq.recipe_text(reference), nl=False)


@app.command("check", cls=Command, epilog="Example:\n\n  outlierq recipes check mine.yaml --set quantize.bits=3")
def check(reference: Reference, settings: shared.Settings = None, trust_methods: shared.TrustMethods = False) -> None:
    """Check a recipe; every fault is reported at once, with its line."""
    import outlierq

    recipe = outlierq.read_recipe(reference, settings, trust_methods=trust_methods)
    needs = ", ".join(sorted(recipe.all_needs)) or "no data"
    typer.echo(f"ok: {reference} ({recipe.description or 'no description'}; needs {needs})")
