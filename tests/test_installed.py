"""A library that is missing or too old is said in one sentence, with the line that mends it, before work starts."""

from __future__ import annotations

import ast
import json
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from outlierq.core.errors import OutlierqError
from outlierq.core.machine import installed

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "outlierq"


@pytest.fixture
def without(monkeypatch):
    """Hides modules, as if they were not installed."""

    def hide(*names: str) -> None:
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)

    return hide


def imports(tree: ast.AST) -> set[str]:
    """The libraries that a file imports when it runs."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_every_room_that_imports_a_library_of_an_extra_asks_for_it():
    asked, used = {}, {}
    for path in PACKAGE.rglob("*.py"):
        tree, room = ast.parse(path.read_text()), path.parent
        used.setdefault(room, set()).update(imports(tree) & installed.EXTRAS.keys())
        calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name))
        names = {call.args[0].value for call in calls if call.func.id == "needs_extra"}
        asked.setdefault(room, set()).update(names)
    brought = {"eval": {"datasets", "pyarrow"}}  # lm-eval depends on them
    assert sum(map(len, used.values())) > 5
    for room, names in used.items():
        there = asked[room] | (brought["eval"] if "lm_eval" in asked[room] else set())
        assert names <= there, room


def test_every_extra_named_in_a_hint_is_one_of_the_package():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(installed.EXTRAS.values()) <= extras.keys()
    assert {"all", "cuda", "dev"} <= extras.keys()


class TestAMissingLibrary:
    def test_of_tasks_is_said_before_anything_is_measured(self, outlierq, tiny_llama, without):
        without("lm_eval")
        answer = outlierq("eval", tiny_llama, "--tasks", "wikitext")
        assert answer.code == 1
        assert answer.err == "error: lm_eval is not installed\n\nhint: pip install 'outlierq[eval]'\n"

    def test_of_a_gate_with_tasks_is_said_before_anything_is_compressed(self, outlierq, tiny_llama, without, tmp_path):
        without("lm_eval")
        answer = outlierq("quantize", tiny_llama, "-r", "rtn-w4", "-o", tmp_path / "out", "--min-task", "wikitext:1")
        assert answer.code == 1 and "pip install 'outlierq[eval]'" in answer.err
        assert list(tmp_path.iterdir()) == []

    def test_of_pictures_is_said_before_a_calibration_runs(self, outlierq, tiny_llama, without, tmp_path):
        without("vl_convert")
        answer = outlierq("detect", tiny_llama, "--png", tmp_path / "pictures")
        assert answer.code == 1 and "pip install 'outlierq[report]'" in answer.err
        assert "calibration" not in answer.err

    def test_of_gguf_is_said_when_a_file_is_read_or_planned(self, outlierq, tiny_llama, without, tmp_path):
        file = tmp_path / "model.gguf"
        file.write_bytes(b"GGUF")
        without("gguf")
        for words in (("inspect", file), ("plan", tiny_llama, "-r", "rtn-w4", "--format", "gguf")):
            answer = outlierq(*words)
            assert answer.code == 1 and "pip install 'outlierq[gguf]'" in answer.err

    @pytest.mark.parametrize(
        ("library", "text"), [("pyarrow", "{path: x.parquet, column: text}"), ("datasets", "{dataset: a/b}")]
    )
    def test_of_calibration_text_is_said(self, library, text, outlierq, tiny_llama, without, tmp_path):
        (tmp_path / "x.parquet").write_bytes(b"PAR1")
        without(library)
        where = text.replace("x.parquet", str(tmp_path / "x.parquet"))
        answer = outlierq("calibrate", tiny_llama, "-o", tmp_path / "stats", "--set", f"calibration.text={where}")
        assert answer.code == 1 and "pip install 'outlierq[datasets]'" in answer.err

    def test_leaves_all_else_at_work(self, outlierq, tiny_llama, without, tmp_path):
        without(*installed.EXTRAS)
        answer = outlierq("quantize", tiny_llama, "-r", "rtn-w4", "-o", tmp_path / "out", "--max-kl", "9")
        assert answer.code == 0, answer.err


class TestALibraryThatIsTooOld:
    @pytest.fixture(autouse=True)
    def asked_again(self):
        installed.check_versions.cache_clear()
        yield
        installed.check_versions.cache_clear()

    def asking_for(self, monkeypatch, *lines: str) -> None:
        monkeypatch.setattr(metadata, "requires", lambda name: list(lines))

    def test_is_said_with_both_versions_and_the_remedy(self, monkeypatch, outlierq, tiny_llama, tmp_path):
        there = metadata.version("transformers")
        self.asking_for(monkeypatch, "transformers<100,>=99.5")
        answer = outlierq("quantize", tiny_llama, "-r", "rtn-w4", "-o", tmp_path / "out")
        assert answer.code == 1
        assert f"transformers {there} is too old: outlierq needs transformers<100,>=99.5" in answer.err
        assert "hint: pip install --upgrade 'transformers<100,>=99.5'" in answer.err

    def test_of_an_extra_is_none_of_the_core(self, monkeypatch):
        self.asking_for(monkeypatch, 'transformers>=99; extra == "eval"', "no-such-library>=1", "transformers>=1,<2")
        installed.check_versions()

    def test_is_nothing_that_stops_listing_recipes(self, monkeypatch, outlierq):
        self.asking_for(monkeypatch, "transformers>=99")
        assert outlierq("recipes", "list").code == 0

    def test_cannot_be_told_where_outlierq_is_not_installed(self, monkeypatch):
        def unknown(name: str) -> list[str]:
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(metadata, "requires", unknown)
        installed.check_versions()

    def test_is_an_error_of_ours(self, monkeypatch):
        self.asking_for(monkeypatch, "transformers>=99")
        with pytest.raises(OutlierqError, match="too old"):
            installed.check_versions()


class TestRanges:
    """pyproject.toml says what is allowed; the constraints are what is tried of it."""

    @pytest.fixture(scope="class")
    def allowed(self) -> dict[str, SpecifierSet]:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = project["optional-dependencies"]
        optional = [line for name in ("datasets", "eval", "gguf", "report") for line in extras[name]]
        wanted = map(Requirement, [*project["dependencies"], *optional])
        return {asked.name: asked.specifier for asked in wanted if asked.name != "outlierq"}

    def pins(self, name: str) -> dict[str, str]:
        lines = (ROOT / name).read_text().splitlines()
        return dict(line.split("==") for line in lines if not line.startswith("#"))

    def test_the_oldest_versions_are_the_lower_ends(self, allowed):
        lower = {name: next(s.version for s in found if s.operator == ">=") for name, found in allowed.items()}
        oldest = self.pins("constraints-oldest.txt")
        assert oldest.keys() == lower.keys() and len(oldest) > 15
        for name, number in oldest.items():
            assert Version(number) == Version(lower[name]), name

    def test_the_exact_versions_are_allowed(self, allowed):
        exact = self.pins("constraints.txt")
        assert {"torch", "transformers", "compressed-tensors", "huggingface_hub"} <= exact.keys() & allowed.keys()
        for name in exact.keys() & allowed.keys():
            assert allowed[name].contains(exact[name]), name

    def test_versions_that_fit_beside_other_programs_are_allowed(self, allowed):
        kept = json.loads((ROOT / "docs" / "resolved.json").read_text())
        assert {"vllm==0.33.0", "llmcompressor==0.14.0.1"} == kept.keys()
        names = {name.replace("_", "-"): found for name, found in allowed.items()}
        for versions in (versions for pythons in kept.values() for versions in pythons.values()):
            assert len(versions) > 5
            assert all(names[name].contains(number) for name, number in versions.items())
