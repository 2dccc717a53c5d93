"""The compiled part; pyproject.toml says all else. Without a compiler for C it is left out, and torch does its work."""

from setuptools import Extension, setup

# Not a Python module: outlierq/ops/compiled/rounding.py loads it. Contracted or reordered sums would change last bits.
NATIVE = Extension(
    "outlierq.native.compiled",
    [f"outlierq/native/{name}.c" for name in ("rows", "pack", "tokens")],
    depends=["outlierq/native/floats.h"],
    extra_compile_args=["-O3", "-fopenmp-simd", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"],
    optional=True,
)

setup(ext_modules=[NATIVE])
