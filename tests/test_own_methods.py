"""Methods that do not come with outlierq: of installed packages, and functions that a recipe names."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from outlierq import registry
from outlierq.core.errors import MethodError, OutputError, RecipeError
from outlierq.load import open_checkpoint
from outlierq.pipeline import quantize as quantizing
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.quantize import quantize
from outlierq.recipe import load, parse
from outlierq.registry import outside, packages
from outlierq.registry.declaring import REGISTERED

EXAMPLE = Path(__file__).parents[1] / "examples" / "own-method"
RECIPE = EXAMPLE / "clipped-w4.yaml"
DECORATED = """
from outlierq.registry import quantizer

@quantizer({name!r}, needs={needs!r}, paper="none")
def rounded(w, stats, scheme, *, strength: float = 0.5):
    return None
"""


@pytest.fixture
def environment(tmp_path, monkeypatch) -> Path:
    """A folder that packages can be put into, as if it were the environment's; all of it is forgotten afterwards."""
    registry.methods("quantize")
    tables = (REGISTERED, outside.REFERENCES, packages.TOLD)
    before, modules = [dict(table) for table in tables], set(sys.modules)
    folder = tmp_path / "environment"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    outside.import_installed.cache_clear()
    yield folder
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)
    for name in sys.modules.keys() - modules:
        if getattr(sys.modules[name], "__file__", None) and str(folder) in sys.modules[name].__file__:
            del sys.modules[name]
    outside.import_installed.cache_clear()


@pytest.fixture
def install(environment) -> Callable[..., None]:
    """A function that installs a package of one module, whose entry point names that module."""

    def put(name: str, code: str, version: str = "1.0") -> None:
        module = name.replace("-", "_")
        (environment / f"{module}.py").write_text(code)
        about = environment / f"{module}-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (about / "RECORD").write_text(f"{module}.py,,\n{about.name}/METADATA,,\n{about.name}/RECORD,,\n")
        (about / "entry_points.txt").write_text(f"[outlierq.methods]\n{name} = {module}\n")
        importlib.invalidate_caches()

    return put


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> Path:
    """The example, installed by pip into a folder of its own. Read-only."""
    source, target = tmp_path_factory.mktemp("source") / "own-method", tmp_path_factory.mktemp("installed")
    shutil.copytree(EXAMPLE, source)  # pip builds beside the source
    words = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", target, source]
    subprocess.run([sys.executable, "-m", "pip", *map(str, words)], check=True, capture_output=True)
    return target


def test_the_example_compresses_a_model_once_it_is_installed(environment, example, tiny_llama, tmp_path, outlierq):
    shutil.copytree(example, environment, dirs_exist_ok=True)
    importlib.invalidate_caches()
    done = outlierq("quantize", tiny_llama, "-r", RECIPE, "-o", tmp_path / "out", "--quiet")
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "out" / "outlierq.json").read_text())
    rows = [row for row in report["rows"] if row["method"] == "clipped"]
    assert len(rows) == 14 and all(0 < row["weight_error"] < 0.2 for row in rows)
    digest = sha256((EXAMPLE / "own_method.py").read_bytes()).hexdigest()
    assert report["versions"]["method clipped"] == f"the package own-method 0.1.0: own_method, sha256 {digest}"


def test_the_example_is_followed_by_reference_with_the_flag_alone(environment, tiny_llama, tmp_path, outlierq):
    shutil.copy(EXAMPLE / "own_method.py", environment)
    words = ("quantize", tiny_llama, "-r", RECIPE, "--set", "quantize.method=own_method:clipped", "--quiet")
    refused = outlierq(*words, "-o", tmp_path / "out")
    assert refused.code == 1 and "was not run (read that code, then add --trust-methods)" in refused.err
    assert "own_method" not in sys.modules and not (tmp_path / "out").exists()
    done = outlierq(*words, "-o", tmp_path / "out", "--trust-methods")
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "out" / "outlierq.json").read_text())
    assert report["settings"]["quantize"]["method"] == "own_method:clipped"
    assert report["versions"]["method own_method:clipped"].startswith("the module own_method: own_method, sha256 ")


def test_every_command_that_reads_a_recipe_has_the_flag(environment, tiny_llama, tmp_path, outlierq):
    shutil.copy(EXAMPLE / "own_method.py", environment)
    own = tmp_path / "own.yaml"
    own.write_text(RECIPE.read_text().replace("method: clipped", "method: own_method:clipped"))
    for words in (("recipes", "check", own), ("plan", tiny_llama, "-r", own)):
        assert outlierq(*words).code == 1
        assert outlierq(*words, "--trust-methods").code == 0
    for command in ("calibrate", "demo"):
        assert "--trust-methods" in outlierq(command, "--help").out


def test_trust_given_once_is_not_trust_for_ever(environment):
    shutil.copy(EXAMPLE / "own_method.py", environment)
    text = "quantize: {method: 'own_method:clipped'}"
    assert parse(text, trust_methods=True).quantize.method == "own_method:clipped"
    with pytest.raises(RecipeError, match="was not run"):
        parse(text)


def test_options_of_a_method_from_outside_are_checked_by_their_types(environment, example):
    shutil.copytree(example, environment, dirs_exist_ok=True)
    importlib.invalidate_caches()
    assert load(str(RECIPE)).quantize.options == {"share": 0.9}
    with pytest.raises(RecipeError, match=r"quantize.share: Input should be less than or equal to 1"):
        load(str(RECIPE), ["quantize.share=2"])
    with pytest.raises(RecipeError, match="did you mean 'share'"):
        load(str(RECIPE), ["quantize.shares=1"])


def test_a_run_goes_on_with_the_same_code_only(environment, tiny_llama, tmp_path, monkeypatch):
    def planned():
        sys.modules.pop("own_method", None)
        REGISTERED.pop(("quantize", "clipped"), None)
        importlib.invalidate_caches()
        recipe = load(str(RECIPE), ["quantize.method=own_method:clipped"], trust_methods=True)
        return make_plan(open_checkpoint(str(tiny_llama)), recipe)

    code, out = environment / "own_method.py", tmp_path / "out"
    shutil.copy(EXAMPLE / "own_method.py", code)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(quantizing.Output, "verify", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        quantize(planned(), out)
    code.write_text(code.read_text() + "\nCHANGED = True\n")
    with pytest.raises(OutputError, match="an unfinished run with another methods"):
        quantize(planned(), out)
    shutil.copy(EXAMPLE / "own_method.py", code)
    assert quantize(planned(), out) is not None


def test_a_recipe_without_such_methods_has_no_code_of_its_own():
    recipe = load("awq-gptq-w4")
    assert recipe.outside_code == {}


def test_a_package_that_cannot_be_imported_is_named_with_a_remedy_as_often_as_one_asks(install):
    install("broken-rounding", DECORATED.format(name="mine", needs=()) + "\nimport no_such_library", "0.3")
    for _ in range(2):
        with pytest.raises(MethodError) as refused:
            parse("quantize: {method: rtn}")
        assert refused.value.what == (
            "the methods of the package broken-rounding 0.3 cannot be imported "
            "(broken_rounding: ModuleNotFoundError: No module named 'no_such_library')"
        )
        assert refused.value.hint == "repair that package, or uninstall it: pip uninstall broken-rounding"


def test_a_package_that_leaves_the_process_is_an_error_too(install):
    install("leaving", "raise SystemExit(0)")
    with pytest.raises(MethodError, match=r"the package leaving 1.0 cannot be imported"):
        registry.methods("quantize")


def test_two_packages_with_one_name_are_both_named(install):
    install("first-rounding", DECORATED.format(name="mine", needs=()))
    install("second-rounding", DECORATED.format(name="mine", needs=()), "2.0")
    with pytest.raises(MethodError) as refused:
        registry.method("quantize", "mine")
    assert refused.value.what == (
        "two quantize methods are called 'mine': one of the package first-rounding 1.0, "
        "one of the package second-rounding 2.0"
    )
    assert "uninstall one" in refused.value.hint


def test_a_package_cannot_take_the_name_of_a_method_of_ours(install):
    install("own-rounding", DECORATED.format(name="gptq", needs=()))
    with pytest.raises(MethodError, match=r"'gptq': one of outlierq, one of the package own-rounding 1.0"):
        registry.method("quantize", "rtn")


def test_statistics_that_calibration_does_not_make_are_named_with_the_nearest(install):
    install("own-rounding", DECORATED.format(name="mine", needs=("hesian",)))
    with pytest.raises(MethodError) as refused:
        registry.method("quantize", "mine")
    assert "'mine' of the package own-rounding 1.0 needs the statistic 'hesian'" in refused.value.what
    assert "known: min, max, " in refused.value.what and refused.value.hint == "did you mean 'hessian'?"


WRONG_OPTIONS = {
    "strength = 0.5": "has an option 'strength' without a type or a default",
    "strength: float": "has an option 'strength' without a type or a default",
    "strength: Later = 0.5": "the annotations of .* cannot be read: name 'Later' is not defined",
}


@pytest.mark.parametrize("option", WRONG_OPTIONS)
def test_an_option_that_a_recipe_cannot_check_is_named_with_its_package(option, install):
    code = "from __future__ import annotations\n" + DECORATED.format(name="mine", needs=())
    install("own-rounding", code.replace("strength: float = 0.5", option))
    with pytest.raises(MethodError, match=WRONG_OPTIONS[option]) as refused:
        parse("quantize: {method: mine}")
    assert "the package own-rounding 1.0" in refused.value.what and refused.value.hint


def test_what_is_declared_of_an_option_that_there_is_not_is_named(install):
    code = DECORATED.format(name="mine", needs=()).replace("needs=()", "needs_if={'search': {'wide': ('hessian',)}}")
    install("own-rounding", code)
    with pytest.raises(MethodError, match=r"own-rounding 1.0 declares what its option 'search' means, but has no such"):
        registry.method("quantize", "mine")


BAD = {
    "no_such_module:rounded": "there is no module 'no_such_module' .install the package",
    "own_code.missing:rounded": "there is no module 'own_code.missing'",
    "own_code:round": "has no 'round' .did you mean 'rounded'",
    "own_code:": "has no ''",
    "own_code:plain": "carries no decorator of outlierq.registry, so it is no method .write @quantizer",
    "failing:rounded": "the module failing cannot be imported .TypeError: too early",
    "asking:rounded": "the quantize method 'other' of the module asking needs the statistic 'kurtoses'",
}


@pytest.mark.parametrize("reference", BAD)
def test_a_reference_that_leads_nowhere_is_one_fault_with_its_line_and_a_remedy(reference, environment):
    (environment / "own_code").mkdir()
    own = DECORATED.format(name="mine", needs=()) + "\ndef plain(w):\n    return w\n"
    (environment / "own_code" / "__init__.py").write_text(own)
    (environment / "failing.py").write_text("raise TypeError('too early')")
    (environment / "asking.py").write_text(DECORATED.format(name="other", needs=("kurtoses",)))
    importlib.invalidate_caches()
    with pytest.raises(RecipeError, match="1 fault\n  - line 2, quantize.method: .*" + BAD[reference]):
        parse(f"quantize:\n  method: '{reference}'", trust_methods=True)


def test_a_quantizer_is_no_transform(environment):
    shutil.copy(EXAMPLE / "own_method.py", environment)
    with pytest.raises(RecipeError, match=r"'own_method:clipped' is a quantize method .name it under `quantize`"):
        parse("transform: ['own_method:clipped']\nquantize: rtn", trust_methods=True)
