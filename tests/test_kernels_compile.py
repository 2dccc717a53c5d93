"""Every kernel compiles for every architecture without a warning or a spill, within its registers."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from outlierq.kernels.launch import OPTIONS, source_text
from outlierq.kernels.plan import INSTANCES, REGISTERS

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc to compile the kernels with")
QUICK = ("sm_80", "sm_90a")
ALL = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_120")
# CuPy adds -ftz=true by itself.
FLAGS = ("-ftz=true", "-cubin", "-Xptxas", "-v", "-Werror", "all-warnings")
INSTRUCTIONS = {
    "w4a16_gemv": ("mma.sync.aligned.m16n8k16", "ld.global.nc.L1::no_allocate.v4"),
    "w4a16_gemm": ("mma.sync.aligned.m16n8k16", "ldmatrix", "cp.async.cg"),
    "w8a8_outlier": ("m16n8k32.row.col.s32.s8.s8.s32", "mma.sync.aligned.m16n8k16", "ldmatrix", "cp.async.cg"),
}


def compiled(source: str, names: list[str], architecture: str, folder, *flags: str) -> str:
    """What the compiler says about a file with these instances of a kernel."""
    table = ", ".join(f"(void*){name}" for name in names)
    written = folder / f"{source}.cu"
    written.write_text(f"{source_text(source)}\nvoid* instances[] = {{{table}}};\n")
    command = ["nvcc", *OPTIONS, f"-arch={architecture}", *flags, "-o", folder / f"{source}.out", written]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def check_resources(source: str, names: list[str], architecture: str, folder) -> None:
    said = compiled(source, names, architecture, folder, *FLAGS)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(registers) == len(frames) == len(names)
    assert set(frames) == {("0", "0", "0")}
    assert max(registers) <= REGISTERS[source], f"{source} on {architecture}: {sorted(registers)}"


def test_every_source_has_instances_and_a_bound_on_registers():
    from importlib import resources

    sources = {path.name.removesuffix(".cu") for path in resources.files("outlierq.kernels").iterdir()
               if path.name.endswith(".cu")}  # fmt: skip
    assert sources and sources == set(INSTANCES) == set(REGISTERS)


@pytest.mark.parametrize("source", INSTANCES)
@pytest.mark.parametrize("architecture", QUICK)
def test_kernels_compile_for_the_oldest_architecture_and_for_hopper(source, architecture, tmp_path):
    check_resources(source, INSTANCES[source][::5], architecture, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("source", INSTANCES)
@pytest.mark.parametrize("architecture", ALL)
def test_every_instance_compiles_for_every_architecture(source, architecture, tmp_path):
    check_resources(source, INSTANCES[source], architecture, tmp_path)


@pytest.mark.parametrize("source", INSTRUCTIONS)
def test_the_instructions_meant_are_the_ones_used(source, tmp_path):
    compiled(source, INSTANCES[source][:1], "sm_80", tmp_path, "-ptx")
    text = (tmp_path / f"{source}.out").read_text()
    assert all(instruction in text for instruction in INSTRUCTIONS[source])
