"""Imports go downwards, stages never meet, and the command line answers without the heavy libraries."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "datasets", "numpy", "compressed_tensors", "gguf", "lm_eval", "huggingface_hub")
COMMANDS = (
    "quantize",
    "calibrate",
    "recommend",
    "fit",
    "frontier",
    "sweep",
    "detect",
    "plan",
    "eval",
    "publish",
    "compare",
    "diff",
    "verify",
    "inspect",
    "report",
    "recipes",
    "study",
    "adapter",
    "tune",
    "bench",
    "demo",
    "help",
)


def contracts() -> list[dict]:
    from importlinter.api import read_configuration

    return read_configuration(str(ROOT / "pyproject.toml"))["contracts_options"]


def heavy_after(code: str) -> list[str]:
    """The heavy libraries that a fresh interpreter has loaded after running `code`."""
    ending = f"import json, sys; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{ending}"], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_every_import_contract_holds(capsys):
    from importlinter.cli import lint_imports

    failed = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert not failed, capsys.readouterr().out


def test_every_part_of_the_package_has_its_place_in_the_layers():
    (layers,) = [c["layers"] for c in contracts() if c["type"] == "layers" and "containers" not in c]
    placed = {module.strip().removeprefix("outlierq.") for layer in layers for module in layer.split("|")}
    package = ROOT / "outlierq"
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    files = {path.stem for path in package.glob("*.py")} - {"__init__", "__main__"}
    assert len(folders) > 5
    assert folders | files <= placed


def test_every_room_of_a_stage_has_its_place_among_the_others():
    rooms = {c["containers"][0]: c["layers"] for c in contracts() if "containers" in c}
    assert "outlierq.pipeline" in rooms
    for stage, layers in rooms.items():
        placed = {module.strip() for layer in layers for module in layer.split("|")}
        folders = {path.parent.name for path in (ROOT / stage.replace(".", "/")).glob("*/__init__.py")}
        assert folders and folders <= placed


def test_only_the_command_line_may_import_typer_and_rich():
    (forbidden,) = [contract for contract in contracts() if "typer" in contract.get("forbidden_modules", ())]
    assert set(forbidden["forbidden_modules"]) == {"typer", "rich"}
    sources = {name.removeprefix("outlierq.") for name in forbidden["source_modules"]}
    folders = {path.parent.name for path in (ROOT / "outlierq").glob("*/__init__.py")}
    assert folders - sources <= {"cli", "report"}


def test_only_the_launcher_of_kernels_may_import_cupy():
    (forbidden,) = [contract for contract in contracts() if "cupy" in contract.get("forbidden_modules", ())]
    assert forbidden["source_modules"] == ["outlierq"]
    assert forbidden["ignore_imports"] == ["outlierq.kernels.launch -> cupy"]


def test_help_of_no_command_loads_a_heavy_library():
    calls = [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS), ["recipes", "show", "--help"]]
    code = f"""
from typer.testing import CliRunner
from outlierq.cli.main import app
for call in {calls!r}:
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, (call, result.output)
"""
    assert heavy_after(code) == []


def test_the_commands_listed_here_are_those_of_the_command_line():
    from outlierq.cli.main import app

    names = {command.name for command in app.registered_commands} | {group.name for group in app.registered_groups}
    assert names == set(COMMANDS)


@pytest.mark.parametrize("module", ["outlierq", "outlierq.registry", "outlierq.recipe", "outlierq.report"])
def test_modules_that_messages_need_load_no_heavy_library(module):
    assert heavy_after(f"import {module}") == []


def test_core_loads_no_heavy_library():
    names = sorted(path.stem for path in (ROOT / "outlierq" / "core").glob("*.py"))
    assert len(names) > 3
    assert heavy_after("\n".join(f"import outlierq.core.{name}" for name in names)) == []


@pytest.mark.parametrize("package", ["load", "runtime"])
def test_names_that_are_imported_on_first_use_have_their_types(package):
    module = importlib.import_module(f"outlierq.{package}")
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    typed = [node for part in tree.body if isinstance(part, ast.If) for node in ast.walk(part)]
    homes = {
        alias.asname: node.module.removeprefix(f"outlierq.{package}.")
        for node in typed
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert homes == module._HOMES and homes


ALLOWED = ("outlierq", "outlierq.cli", "outlierq.core.errors", "outlierq.report")


def imports_of(tree: ast.AST) -> set[str]:
    """The modules of ours that a file imports, inside functions, too."""
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return {name for name in names if name.partition(".")[0] == "outlierq"}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "outlierq" / "cli" / "commands").glob("[a-z]*.py")), ids=lambda p: p.stem
)
def test_a_command_translates_its_options_into_one_call_of_a_public_function(path):
    import outlierq

    tree = ast.parse(path.read_text())
    foreign = {name for name in imports_of(tree) if not any(name == a or name.startswith(f"{a}.") for a in ALLOWED[1:])}
    assert foreign <= {"outlierq"}
    commands = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    calls = [called for node in commands if (called := public_calls(node, outlierq))]
    assert calls and all(len(called) == 1 for called in calls), calls


def public_calls(function: ast.FunctionDef, outlierq) -> list[str]:
    """The public functions that a function calls as `outlierq.name(...)`; values such as `outlierq.Limits` are none."""
    called = [ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)]
    names = [name.removeprefix("outlierq.") for name in called if name.startswith("outlierq.")]
    return [name for name in names if inspect.isfunction(getattr(outlierq, name.partition(".")[0]))]


def test_what_commands_share_does_no_work():
    tree = ast.parse((ROOT / "outlierq" / "cli" / "shared.py").read_text())
    checked = [
        node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    found = set().union(*map(imports_of, checked))
    assert found and all(
        name.startswith(("outlierq.report", "outlierq.core", "outlierq.recipe.shipped")) for name in found
    )
