"""CUDA kernels built as C++ and run on the CPU: `build(source)` gives a `Shim`, `Shim.run(launch)` plays a launch."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from os import getpid
from pathlib import Path
from tempfile import gettempdir

import numpy as np
import torch

from outlierq.kernels.launch import source_text
from outlierq.kernels.plan import INSTANCES, Launch

FOLDER = Path(__file__).parent
CACHE = Path(gettempdir()) / "outlierq-kernel-shim"
SCHEDULES = (0, 1, 2)
# -O1: building takes longer than running.
COMPILER = (
    "g++",
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-shared",
    "-U_FORTIFY_SOURCE",
    "-fno-strict-aliasing",
    "-w",
    "-DOQ_CPU",
)
FAULTS = {"none": 0, "skip_barrier": 1, "weak_wait": 2, "swap_b": 3, "skip_shuffle": 4}


class ShimError(Exception):
    """What the shim found wrong with a kernel while running it."""


def missing() -> str | None:
    """Why kernels cannot be built here; None when they can."""
    return None if shutil.which(COMPILER[0]) else "no g++ to build the kernels for the CPU"


@dataclass(frozen=True)
class Shim:
    """A kernel file as a library for the CPU."""

    library: ctypes.CDLL
    source: str

    def run(self, launch: Launch, schedule: int = 0, fault: str = "none", line: int = 0) -> None:
        """Run the launch on CPU tensors; ShimError when threads deadlock or an operation is misused."""
        sizes = (ctypes.c_int * 64)()
        count = self.library.parameter_sizes(launch.instance.encode(), sizes)
        assert count >= 0, f"{launch.instance} is not in the table of instances"
        values = [_argument(a) for a in launch.arguments]
        assert [ctypes.sizeof(v) for v in values] == list(sizes[:count]), "arguments do not fit the kernel's parameters"
        pointers = (ctypes.c_void_p * count)(*(ctypes.cast(ctypes.byref(v), ctypes.c_void_p) for v in values))
        said = self.library.run(
            launch.instance.encode(), (ctypes.c_uint * 3)(*launch.grid), launch.threads, launch.shared_bytes,
            pointers, schedule, FAULTS[fault], line,
        )  # fmt: skip
        if said:
            raise ShimError(said.decode())

    def lines(self, text: str) -> list[int]:
        """Numbers of the lines of the source in which `text` stands, as faults are given."""
        numbered = enumerate(source_text(self.source).splitlines(), 1)
        return [number for number, line in numbered if text in line and not line.lstrip().startswith("//")]


@cache
def build(source: str) -> Shim:
    """Compile outlierq/kernels/<source>.cu and its instances; the library is kept in a cache folder."""
    table = ",\n".join(f'shim::instance("{name}", {name})' for name in INSTANCES[source])
    code = f'{source_text(source)}\nstatic const shim::Instance instances[] = {{\n{table}\n}};\n#include "host.h"\n'
    headers = "".join((FOLDER / name).read_text() for name in ("cuda_cpu_shim.h", "host.h"))
    key = hashlib.sha256("\n".join([code, headers, *COMPILER]).encode()).hexdigest()[:20]
    built = CACHE / f"{source}-{key}.so"
    if not built.exists():
        CACHE.mkdir(exist_ok=True)
        # Under names of this process first: another one may build at the same time.
        written, partial = (CACHE / f"{source}-{key}-{getpid()}.{kind}" for kind in ("cpp", "so"))
        written.write_text(code)
        done = subprocess.run([*COMPILER, f"-I{FOLDER}", "-o", partial, written], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:4000]
        partial.rename(built)
        written.unlink()
    library = ctypes.CDLL(str(built))
    library.run.restype = ctypes.c_char_p
    return Shim(library, source)


def _argument(value: torch.Tensor | np.generic | None) -> ctypes._SimpleCData:
    """As CuPy would pass it: pointers of 8 bytes, numbers of their own width."""
    if value is None or isinstance(value, torch.Tensor):
        return ctypes.c_void_p(None if value is None else value.data_ptr())
    return {np.int32: ctypes.c_int32, np.int64: ctypes.c_int64, np.float32: ctypes.c_float}[type(value)](value.item())


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on a 16-byte boundary and no larger one, between bytes 0xFF: NaN in every floating type.

    What a kernel reads beside it spoils the result; what it writes there is found by `untouched`.
    """
    count = tensor.numel() * tensor.element_size()
    raw = torch.full((count + 192,), 255, dtype=torch.uint8)
    start = 64 + (16 - (raw.data_ptr() + 64)) % 32  # odd multiples of 16
    inside = raw[start : start + count].view(tensor.dtype).view(tensor.shape)
    inside.copy_(tensor)
    inside.guard = (raw, start, count)
    return inside


def untouched(tensor: torch.Tensor) -> bool:
    """Whether nothing was written beside a guarded tensor."""
    raw, start, count = tensor.guard
    return bool((raw[:start] == 255).all() and (raw[start + count :] == 255).all())
