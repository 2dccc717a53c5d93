"""What pyproject.toml cannot say: the compiled part, and recipes that lie beside the package and go into its wheels.

Without a compiler for C the compiled part is left out, and torch does its work; that wheel fits every machine.
"""

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


setup(
    ext_modules=[NATIVE],
    cmdclass={"build_py": WithRecipes, "build_ext": IfCompiled, "bdist_wheel": TaggedAsBuilt},
)
