"""What the machine executes: compiled kernels hold the tensor-core, copy and load instructions that they are made for.

The compiler is free to turn PTX into something slower (wide loads into narrow ones, registers into local memory). This
looks at the machine code. It needs nvcc and nvdisasm, which `pip install nvidia-cuda-nvdisasm` brings.
"""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
from collections import Counter
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pytest
from test_kernels_compile import ALL, compiled

from outlierq.kernels.plan import INSTANCES

# By source: a pattern of its instances ("" is all), what must occur in them, and how often at least.
PACKED = [
    ("", r"LDSM\.16\.M88\.4", 4),  # ldmatrix: fragments of the inputs
    ("", r"LDGSTS\.E\.BYPASS\.128.*", 8),  # cp.async past the first-level cache, 16 bytes each
    ("", r"LDGDEPBAR", 2),
]
EXPECTED = {
    "w4a16_gemv": [
        ("Half", r"HMMA\.16816\.F32", 16),
        ("Bfloat", r"HMMA\.16816\.F32\.BF16", 16),
        ("", r"LDG\.E\.NA\.128\.CONSTANT", 4),  # weights are read once: not kept in the first-level cache
    ],
    "w4a16_gemm": [("Half", r"HMMA\.16816\.F32", 8), ("Bfloat", r"HMMA\.16816\.F32\.BF16", 8), *PACKED],
    "w8a8_outlier": [
        ("", r"IMMA\.16832\.S8\.S8", 16),  # int8 products, exact in int32
        ("Half", r"HMMA\.16816\.F32", 8),  # the outlier columns
        ("Bfloat", r"HMMA\.16816\.F32\.BF16", 8),
        *PACKED,
    ],
    "quant_rows": [
        ("", r"LDG\.E\.128", 1), ("", r"STG\.E\.128", 1), ("", r"SHFL\.BFLY", 5), ("", r"F2I\.NTZ", 8)
    ],
    "dequant": [("", r"LDG\.E\.128", 1), ("", r"STG\.E\.128", 1)],
    "fwht": [("", r"LDG\.E\.128", 1), ("", r"STS\.128|LDS\.128", 1)],
    "kv": [
        ("kv_quant.* 0>", r"LDG\.E\.128", 1), ("kv_quant.* 1>", r"LDG\.E", 1),  # by channel: two columns a thread
        ("kv_dequant", r"STG\.E\.128", 1),
    ],
}  # fmt: skip
LOCAL_MEMORY = r"(LDL|STL)(\..*)?"
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)", re.MULTILINE)


@cache
def disassembler() -> Path | None:
    """nvdisasm on the path, or of its Python package (whose files are not marked executable)."""
    found = shutil.which("nvdisasm")
    if found:
        return Path(found)
    try:
        listed = files("nvidia-cuda-nvdisasm") or []
    except PackageNotFoundError:
        return None
    path = next((Path(file.locate()) for file in listed if file.name == "nvdisasm"), None)
    if path is not None and not path.stat().st_mode & stat.S_IXUSR:
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


needs_tools = pytest.mark.skipif(
    shutil.which("nvcc") is None or disassembler() is None,
    reason="nvcc and nvdisasm are needed: a CUDA toolkit, and pip install nvidia-cuda-nvdisasm",
)


def instructions(listing: str) -> Counter[str]:
    """How often each instruction occurs in a listing of nvdisasm; predicates do not count."""
    return Counter(INSTRUCTION.findall(listing))


def disassembled(binary: Path) -> Counter[str]:
    """The instructions of a compiled kernel."""
    done = subprocess.run([disassembler(), "-c", binary], check=True, capture_output=True, text=True)
    return instructions(done.stdout)


def occurring(found: Counter[str], pattern: str) -> int:
    """How many instructions match the whole pattern."""
    return sum(count for name, count in found.items() if re.fullmatch(pattern, name))


def check(source: str, instance: str, architecture: str, folder: Path) -> None:
    compiled(source, [instance], architecture, folder, "-cubin")
    found = disassembled(folder / f"{source}.out")
    assert sum(found.values()) > 100
    assert occurring(found, LOCAL_MEMORY) == 0, f"{instance} on {architecture} keeps values in local memory"
    for part, pattern, least in EXPECTED[source]:
        if re.search(part, instance):
            count = occurring(found, pattern)
            assert count >= least, f"{instance} on {architecture}: {count} of {pattern}; it has {dict(found)}"


def one_of_each_type(source: str) -> list[str]:
    """Two instances that differ in their type (of a cache, for both kernels, by token and by channel)."""
    chosen = {}
    for name in INSTANCES[source]:
        kernel, kind, *numbers = re.findall(r"\w+", name)
        chosen[kernel, kind, *(numbers[-1:] if source == "kv" else ())] = name
    return list(chosen.values())


def test_a_listing_is_counted_with_and_without_predicates():
    listing = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @P0  LDG.E.128 R4, [R2.64] ;
        /*0020*/             @!UP1 LDGSTS.E.BYPASS.128 [R7], [R2.64] ;
    .L_x_1:
        /*0030*/                   STL [R1], R4 ;
    """
    found = instructions(listing)
    assert found == {"MOV": 1, "LDG.E.128": 1, "LDGSTS.E.BYPASS.128": 1, "STL": 1}
    assert occurring(found, LOCAL_MEMORY) == 1 and occurring(found, r"LDG\.E") == 0


def test_every_kernel_has_expectations():
    assert EXPECTED.keys() == INSTANCES.keys() - {"selftest"}  # which is every wrapper once, for correctness alone
    assert all(one_of_each_type(source) for source in EXPECTED)


@needs_tools
def test_the_int8_product_uses_both_kinds_of_tensor_cores_and_wide_asynchronous_copies(tmp_path):
    check("w8a8_outlier", one_of_each_type("w8a8_outlier")[-1], "sm_80", tmp_path)


@needs_tools
@pytest.mark.slow
@pytest.mark.parametrize("source", EXPECTED)
@pytest.mark.parametrize("architecture", ALL)
def test_every_architecture_gets_the_instructions_meant(source, architecture, tmp_path):
    for instance in one_of_each_type(source):
        check(source, instance, architecture, tmp_path)


@needs_tools
@pytest.mark.slow
def test_local_memory_is_noticed_where_there_is_some(tmp_path):
    source, binary = tmp_path / "indexed.cu", tmp_path / "indexed.out"
    source.write_text(
        "__global__ void indexed(int* p) {\n"
        "  int held[512];\n"
        "  for (int i = 0; i < p[0]; i++) held[p[i] & 511] = i;\n"
        "  p[0] = held[p[1] & 511];\n"
        "}\n"
    )
    subprocess.run(["nvcc", "-arch=sm_80", "-cubin", "-o", binary, source], check=True)
    assert occurring(disassembled(binary), LOCAL_MEMORY) > 0
