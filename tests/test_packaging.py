"""What is installed is the checkout: wheel and sdist hold every file, and the wheel compresses a model by itself."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[1]
MADE = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd")  # what is made on the spot, and in no repository
CODE = ("outlierq", "recipes")
BESIDE = (
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "LICENSE",
    "README.md",
    "CHANGELOG.md",
    "Makefile",
    "constraints.txt",
)
NO_COMPILER = {"CC": "/nonexistent/cc"}
COMPILER = shutil.which(sysconfig.get_config_var("CC").split()[0])


def version(root: Path) -> str:
    """What setup.py takes for the version of a checkout."""
    return runpy.run_path(str(ROOT / "setup.py"))["version"](root)


def build(hook: str, source: Path, out: Path, **environment: str) -> Path:
    """What `pip` calls to build, without its isolation and so without an index: `build_wheel` or `build_sdist`."""
    code = f"from setuptools import build_meta; build_meta.{hook}({str(out)!r})"
    out.mkdir()
    subprocess.run(
        [sys.executable, "-c", code], cwd=source, env=os.environ | environment, check=True, stdout=subprocess.DEVNULL
    )
    (made,) = out.iterdir()
    return made


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy, since building writes into the source."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in CODE:
        shutil.copytree(ROOT / name, copy / name, ignore=MADE)
    for name in BESIDE:
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory) -> Path:
    """The sdist, unpacked."""
    place = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("build_sdist", checkout, place / "built")) as archive:
        archive.extractall(place, filter="data")
    (folder,) = (path for path in place.iterdir() if path.name.startswith("outlierq-"))
    return folder


@pytest.fixture(scope="module")
def wheels(sdist, tmp_path_factory) -> dict[str, Path]:
    """Built of the sdist with a compiler for C, where there is one, and without."""
    place = tmp_path_factory.mktemp("wheels")
    found = {}
    for name, environment in {"compiled": {}, "pure": NO_COMPILER}.items():
        if name == "pure" or COMPILER:
            source = shutil.copytree(sdist, place / f"source-{name}")
            compile_quickly(source)
            found[name] = build("build_wheel", source, place / name, **environment)
    return found


def compile_quickly(source: Path) -> None:
    """Optimize nothing: how fast the compiled part is, is not tried here, and that takes four fifths of the time."""
    text = (source / "setup.py").read_text()
    assert '"-O3"' in text
    (source / "setup.py").write_text(text.replace('"-O3"', '"-O0"'))


def installed(wheel: Path, place: Path) -> Path:
    """The interpreter of a new environment with this wheel; all else comes from the environment that runs the tests."""
    output_of(sys.executable, "-m", "venv", "--without-pip", place, cwd=place.parent)
    python = place / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index")
    output_of(*pip, wheel, cwd=place.parent)
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(output_of(python, "-c", ask, cwd=place.parent).strip())
    # A path in a .pth file is added after the environment's own, and .pth files in it (editable installs) are not read.
    (packages / "borrowed.pth").write_text("\n".join(p for p in sys.path if p.endswith("-packages")) + "\n")
    return python


def output_of(*command: object, cwd: Path) -> str:
    """What a command prints to stdout, run far from the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_sdist_holds_every_file_of_the_checkout(checkout, sdist):
    held, there = files_below(sdist), files_below(checkout)
    assert {f"recipes/{path.name}" for path in (ROOT / "recipes").iterdir()} < there
    assert {name for name in there if not name.startswith(("outlierq.egg-info", "build/"))} <= held
    assert {"LICENSE", "README.md"} <= held


def test_a_wheel_holds_every_file_of_the_package_and_every_recipe(checkout, wheels):
    package = {f"outlierq/{name}" for name in files_below(checkout / "outlierq")}
    recipes = {f"outlierq/recipes/{name}" for name in files_below(checkout / "recipes")}
    assert len(package) > 200 and len(recipes) > 20
    for wheel in wheels.values():
        held = set(zipfile.ZipFile(wheel).namelist())
        assert package | recipes <= held
        beside = {name.split("/")[0] for name in held} - {"outlierq"}
        assert all(name.endswith(".dist-info") for name in beside)
        assert any(name.endswith("licenses/LICENSE") for name in held)


def test_a_wheel_is_for_one_platform_only_where_something_was_compiled(wheels):
    assert wheels["pure"].name.endswith("-py3-none-any.whl")
    assert not any(name.endswith((".so", ".pyd")) for name in zipfile.ZipFile(wheels["pure"]).namelist())
    if COMPILER:
        assert not wheels["compiled"].name.endswith("-any.whl")
        assert any("outlierq/native/compiled" in name for name in zipfile.ZipFile(wheels["compiled"]).namelist())


def test_an_installed_wheel_compresses_a_model_compiled_or_not(wheels, tiny_llama, tmp_path):
    for name, wheel in wheels.items():
        python = installed(wheel, tmp_path / name)
        where = Path(output_of(python, "-c", "import outlierq; print(outlierq.__file__)", cwd=tmp_path).strip())
        assert where.is_relative_to(tmp_path / name)
        command = (python.with_name("outlierq"), "quantize", tiny_llama, "-r", "rtn-w4", "-o", tmp_path / f"out-{name}")
        output_of(*command, "--quiet", cwd=tmp_path)
    written = {(tmp_path / f"out-{name}" / "model.safetensors").read_bytes() for name in wheels}
    assert len(written) == 1


def test_an_installed_wheel_brings_recipes_kernels_and_the_version(checkout, wheels, tmp_path):
    from outlierq.recipe import shipped

    python = installed(wheels["pure"], tmp_path / "environment")
    assert output_of(python, "-m", "outlierq", "--version", cwd=tmp_path) == f"outlierq {version(checkout)}\n"
    listed = output_of(python.with_name("outlierq"), "recipes", "list", cwd=tmp_path)
    assert [line.split()[0] for line in listed.splitlines()] == list(shipped())
    kernels = sorted(path.stem for path in (ROOT / "outlierq" / "kernels").glob("*.cu"))
    assert len(kernels) > 5
    code = f"from outlierq.kernels.launch import source_text\nfor n in {kernels!r}: print(len(source_text(n)) > 0)"
    assert output_of(python, "-c", code, cwd=tmp_path).split() == ["True"] * len(kernels)


MOST_PACKAGES, MOST_BYTES = 45, 1_200_000_000  # beside outlierq itself; with torch for CPUs


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """The interpreter of an environment with nothing but pip. What is installed comes from an index."""
    place = tmp_path_factory.mktemp("bare") / "environment"
    output_of(sys.executable, "-m", "venv", place, cwd=place.parent)
    return place / "bin" / "python"


@pytest.mark.slow
def test_the_core_is_at_most_45_packages_and_1_2_gigabytes_with_torch(bare, wheels, tmp_path):
    install = (bare, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt")
    output_of(*install, "torch", cwd=tmp_path)
    output_of(*install, wheels["pure"], cwd=tmp_path)
    held = json.loads(output_of(bare, "-m", "pip", "list", "--format=json", cwd=tmp_path))
    packages = {package["name"].lower() for package in held} - {"pip", "outlierq"}
    assert {"torch", "transformers"} < packages and len(packages) <= MOST_PACKAGES, sorted(packages)
    folder = Path(output_of(bare, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES


@pytest.mark.slow
def test_uvx_and_pipx_run_the_wheel_as_the_readme_says(wheels, tmp_path, monkeypatch):
    lines = re.findall(r"^((?:uvx|pipx) .*?) +#", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {line.split()[0] for line in lines} == {"uvx", "pipx"}
    tools = tmp_path / "tools"
    output_of(sys.executable, "-m", "venv", tools, cwd=tmp_path)
    output_of(tools / "bin" / "python", "-m", "pip", "install", "--quiet", "uv", "pipx", cwd=tmp_path)
    wheel_folders = [line.split("=", 1)[1].strip("'") for line in pip_settings(tools) if line.startswith("global.find")]
    settings = {"UV_CONSTRAINT": ROOT / "constraints.txt", "PIP_CONSTRAINT": ROOT / "constraints.txt"}
    settings |= {name: tmp_path / name.lower() for name in ("UV_CACHE_DIR", "UV_TOOL_DIR", "PIPX_HOME", "PIPX_BIN_DIR")}
    if wheel_folders:
        settings["UV_FIND_LINKS"] = wheel_folders[0]
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    for line in lines:
        words = [str(wheels["pure"]) if word == "." else word for word in line.split()]
        words = ["--version" if word == "demo" else word for word in words]  # the demo has a test of its own
        said = output_of(tools / "bin" / words[0], *words[1:], cwd=tmp_path)
        assert words[0] == "pipx" or said.startswith("outlierq ")
    assert output_of(tmp_path / "pipx_bin_dir" / "outlierq", "--version", cwd=tmp_path).startswith("outlierq ")


def pip_settings(environment: Path) -> list[str]:
    """What this machine tells pip, which uv does not read."""
    return output_of(environment / "bin" / "python", "-m", "pip", "config", "list", cwd=environment).splitlines()


class TestVersion:
    """The tag is the version, and no checkout is without one."""

    @pytest.fixture
    def repository(self, tmp_path):
        """`git` in a new checkout with a changelog and one commit."""
        folder = tmp_path / "checkout"
        folder.mkdir()
        (folder / "CHANGELOG.md").write_text("# Changelog\n\n## 1.5.0 (unreleased)\n\n- a\n\n## 1.4.0 (2026-01-01)\n")
        named = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false", "-c", "tag.gpgsign=false")

        def git(*words: str) -> Path:
            subprocess.run(["git", *named, *words], cwd=folder, check=True, capture_output=True)
            return folder

        git("init")
        git("commit", "--allow-empty", "-m", "first")
        return git

    @pytest.mark.parametrize("tag", ["v0.1.0", "v2.10.3", "v1.0.0rc1"])
    def test_is_the_tag(self, repository, tag):
        assert version(repository("tag", tag)) == tag.removeprefix("v")
        repository("tag", "-d", tag)
        assert version(repository("tag", "-a", tag, "-m", "annotated")) == tag.removeprefix("v")

    def test_between_tags_is_later_than_the_one_and_earlier_than_the_next(self, repository):
        repository("tag", "v1.4.0")
        between = version(repository("commit", "--allow-empty", "-m", "second"))
        assert Version("1.4.0") < Version(between) < Version("1.4.1") and re.fullmatch(r"1\.4\.1\.dev1\+g\w+", between)
        repository("tag", "v1.5.0rc1")
        between = version(repository("commit", "--allow-empty", "-m", "third"))
        assert between.startswith("1.5.0rc2.dev1+g")

    def test_without_tags_is_what_the_changelog_is_written_for(self, repository):
        folder = repository("tag", "nightly")
        assert version(folder) == "1.5.0.dev0"
        changelog = folder / "CHANGELOG.md"
        changelog.write_text(changelog.read_text().replace("unreleased", "2026-12-31"))
        assert version(folder) == "1.5.0"

    def test_of_an_archive_inside_of_another_repository_is_not_that_ones_tag(self, repository):
        folder = repository("tag", "v9.0.0") / "vendored"
        folder.mkdir()
        shutil.copy(folder.parent / "CHANGELOG.md", folder)
        assert version(folder) == "1.5.0.dev0"

    def test_without_git_is_the_same(self, repository, monkeypatch):
        folder = repository("tag", "v1.4.0")
        monkeypatch.setenv("PATH", str(folder))
        assert version(folder) == "1.5.0.dev0"

    def test_of_an_sdist_is_what_it_was_built_as(self, repository, sdist, checkout):
        folder = repository("tag", "v1.4.0")
        (folder / "PKG-INFO").write_text("Metadata-Version: 2.4\nName: outlierq\nVersion: 3.2.1\n")
        assert version(folder) == "3.2.1"
        assert version(sdist) == version(checkout)

    def test_of_code_that_is_not_installed_is_older_than_any(self, tmp_path):
        (tmp_path / "outlierq").mkdir()
        shutil.copy(ROOT / "outlierq" / "__init__.py", tmp_path / "outlierq")
        command = (sys.executable, "-S", "-c", "import outlierq; print(outlierq.__version__)")
        assert output_of(*command, cwd=tmp_path) == "0.dev0\n"
