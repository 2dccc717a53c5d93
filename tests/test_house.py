"""What a reader stumbles over stays below its bound, and the counting itself sees what it should: scripts/house.py."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import house


@pytest.fixture(scope="module")
def counted() -> list[house.Row]:
    """The rows of this tree; to read all of its files takes seconds."""
    return house.counted_rows()


def functions(source: str, path: str = "pack/file.py") -> list[house.Function]:
    return list(house.functions_in(Path(path), ast.parse(source)))


def test_every_counted_row_keeps_its_bound_and_every_bound_belongs_to_a_row(counted):
    timed = {"outlierq --help", "import outlierq"}
    assert {row.name for row in counted} | timed == set(house.BOUNDS)
    broken = ["\n".join(house.lines_of(row, places=True)) for row in counted if not row.holds]
    assert not broken, "\n".join(broken)


def test_an_import_inside_a_function_closes_a_circle_and_one_for_annotations_does_not(tmp_path, monkeypatch):
    sources = {
        "__init__": "",
        "upper": "import round_house.lower",
        "lower": "def late():\n    from round_house.upper import late",
        "typed": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from round_house import user",
        "user": "from round_house import typed",
    }
    folder = tmp_path / "round_house"
    folder.mkdir()
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert house.circles_in("round_house") == [{"round_house.upper", "round_house.lower"}]


def test_arguments_count_without_the_object_and_with_those_behind_the_star():
    (method,) = functions("class C:\n    def f(self, a, b, c, d, *, e, f, g): ...")
    (static,) = functions("class C:\n    @staticmethod\n    def f(a, b, c, d, *, e, f, g, h): ...")
    (command,) = functions("def f(a, b, c, d, e, f, g, h): ...", "outlierq/cli/commands/quantize.py")
    assert (len(method.arguments), house.has_many_arguments(method)) == (7, False)
    assert (len(static.arguments), house.has_many_arguments(static)) == (8, True)
    assert not house.has_many_arguments(command)


@pytest.mark.parametrize(
    ("returns", "vague"),
    [("Any", True), ("object", True), ("Any | None", True), ("typing.Any", True), ("dict[str, Any]", False)],
)
def test_a_return_of_anything_is_vague_and_a_dictionary_of_anything_is_not(returns, vague):
    (function,) = functions(f"def f() -> {returns}: ...")
    assert house.is_vague(function) == vague


def test_a_probe_is_a_question_to_a_format_or_a_checkpoint_by_its_name():
    source = """
hasattr(self.form, "plain")
getattr(exporter(name), "conflict", None)
getattr(config, "hidden_size", None)
getattr(checkpoint, name)
"""
    row = house.probes({Path("pack/file.py"): ast.parse(source)})
    assert [place.split(" ")[0] for place in row.places] == ["pack/file.py:2", "pack/file.py:3"]


def test_shapes_are_asked_of_public_functions_with_tensors_and_may_stand_in_their_class():
    source = '''
def spoken(w: torch.Tensor) -> float:
    """w: [out, in]."""
def silent(w: torch.Tensor | None) -> float:
    """The error."""
def _private(w: torch.Tensor): ...
def plain(name: str) -> int: ...
class Grid:
    """scale: [out, groups]."""
    def encode(self) -> torch.Tensor:
        """The codes."""
'''
    row = house.shapes(functions(source))
    assert row.value == pytest.approx(66.7)
    assert row.places == ("pack/file.py:4 silent",)
