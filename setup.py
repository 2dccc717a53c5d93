"""What pyproject.toml cannot say: the version, the compiled part, and recipes that lie beside the package and go into
its wheels.

Without a compiler for C the compiled part is left out, and torch does its work; that wheel fits every machine.
"""

import re
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

# Not a Python module: outlierq/ops/compiled/rounding.py loads it. Contracted or reordered sums would change last bits.
SOURCES = ("rows", "pack", "unpack", "tokens", "products", "vectors", "solve", "gram", "types")
NATIVE = Extension(
    "outlierq.native.compiled",
    [f"outlierq/native/{name}.c" for name in SOURCES],
    depends=[str(header) for header in Path("outlierq/native").glob("*.h")],
    extra_compile_args=["-O3", "-fopenmp-simd", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"],
    extra_link_args=["-pthread"],
    optional=True,
)


def version(root: Path) -> str:
    """The tag vX.Y.Z of the checkout; between tags the next one as .devN; in an sdist, what it was built as.

    Where no tag is known (a shallow clone, an archive), what CHANGELOG.md is written for: X.Y.Z once that has a date,
    X.Y.Z.dev0 before. Not setuptools-scm, which needs tags or a variable for that, and a package more to build.
    """
    built = re.search(r"^Version: (.+)$", _text(root / "PKG-INFO"), re.MULTILINE)
    if built:
        return built[1]
    tagged = re.fullmatch(r"v(\d+(?:\.\d+)+(?:(?:a|b|rc)\d+)?)-(\d+)-g([0-9a-f]+)", _described(root))
    if tagged:
        name, distance, commit = tagged.groups()
        following = re.sub(r"\d+$", lambda last: str(int(last[0]) + 1), name)
        return name if distance == "0" else f"{following}.dev{distance}+g{commit}"
    name, date = re.search(r"^## (\S+) \((.*)\)$", _text(root / "CHANGELOG.md"), re.MULTILINE).groups()
    return name if re.fullmatch(r"\d{4}-\d\d-\d\d", date) else f"{name}.dev0"


def _described(root: Path) -> str:
    """The nearest tag, how many commits ago it was, and this commit; empty where git knows none.

    A container that builds wheels mounts a checkout of somebody else, which git would refuse to read.
    """
    if not (root / ".git").exists():  # git would look for one around it
        return ""
    words = ("git", "-c", f"safe.directory={root}", "describe", "--tags", "--long", "--match", "v[0-9]*")
    try:
        return subprocess.run(words, cwd=root, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        return ""


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


class WithRecipes(build_py):
    """Recipes go into the package; an editable install finds them beside it (outlierq/recipe/shipped.py)."""

    def run(self):
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib, "outlierq", "recipes")
            folder.mkdir(parents=True, exist_ok=True)
            for recipe in sorted(Path("recipes").glob("*.yaml")):
                self.copy_file(str(recipe), str(folder / recipe.name))


class IfCompiled(build_ext):
    """What could not be compiled is forgotten, so that nothing names a platform for it."""

    def run(self):
        super().run()
        made = [e for e in self.extensions if Path(self.get_ext_fullpath(e.name)).exists()]
        self.distribution.ext_modules = self.extensions = made


class TaggedAsBuilt(bdist_wheel):
    """setuptools chooses the tag before it compiles; here it is known whether there is anything for one platform."""

    def run(self):
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


if __name__ == "__main__":
    setup(
        version=version(Path(__file__).resolve().parent),
        ext_modules=[NATIVE],
        cmdclass={"build_py": WithRecipes, "build_ext": IfCompiled, "bdist_wheel": TaggedAsBuilt},
    )
