"""List, show and check recipes."""

from __future__ import annotations

from typing import Annotated

import typer

from outlierq.cli import shared

app = typer.Typer(
    help="List, show and check recipes.",
    no_args_is_help=True,
    epilog="Examples:\n\n  outlierq recipes list\n\n  outlierq recipes show gptq-w4 > mine.yaml\n\n"
    "  outlierq recipes check mine.yaml",
)

Reference = Annotated[
    str,
    typer.Argument(help="A YAML file, or the name of a shipped recipe.", autocompletion=shared.recipe_names),
]


@app.command("list", epilog="Example:\n\n  outlierq recipes list --json")
def list_recipes(as_json: shared.AsJson = False) -> None:
    """The recipes that come with outlierq."""
    from outlierq.recipe import description, shipped

    found = {name: description(path) for name, path in shipped().items()}
    if as_json:
        shared.print_json(found)
        return
    width = max(len(name) for name in found)
    for name, text in found.items():
        typer.echo(f"{name:<{width}}  {text}")


@app.command("show", epilog="Example:\n\n  outlierq recipes show awq-w4 > mine.yaml")
def show(reference: Reference) -> None:
    """Print a recipe as it is written, comments included."""
    from outlierq.recipe import find, read

    typer.echo(read(find(reference)), nl=False)


@app.command("check", epilog="Example:\n\n  outlierq recipes check mine.yaml --set quantize.bits=3")
def check(reference: Reference, settings: shared.Settings = None, trust_methods: shared.TrustMethods = False) -> None:
    """Check a recipe; every fault is reported at once, with its line."""
    from outlierq.recipe import load
    from outlierq.registry import transform_method

    recipe = load(reference, settings, trust_methods=trust_methods)
    pruning = (transform_method(step.method).needs for step in recipe.pruning)
    needs = ", ".join(sorted(recipe.needs.union(*pruning))) or "no data"
    typer.echo(f"ok: {reference} ({recipe.description or 'no description'}; needs {needs})")
