"""Write results together with the machine and the tools that made them, without any path or host name."""

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

PACKAGES = ["outlierq", "llmcompressor", "gptqmodel", "auto-round", "compressed-tensors", "transformers", "torch"]
LIST_VERSIONS = """
import json, platform, sys
from importlib.metadata import PackageNotFoundError, version
found = {"python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def write_results(path: Path, sections: dict) -> None:
    """Write `sections` as JSON, after the machine and the versions in our environment, which evaluates."""
    document = {"machine": machine(), "versions": versions(sys.executable), **sections}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")


def machine() -> dict:
    """Processor, memory, system and date."""
    return {
        "processor": proc_field("/proc/cpuinfo", "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_kib": int(proc_field("/proc/meminfo", "MemTotal").split()[0]),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def proc_field(path: str, key: str) -> str:
    """The first value of `key` in a `key: value` file of /proc. Raises KeyError if there is none."""
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    raise KeyError(f"no {key} in {path}")


def versions(python: str) -> dict[str, str]:
    """The version of a Python, and those of the benchmarked packages in its environment."""
    found = subprocess.run([python, "-c", LIST_VERSIONS, *PACKAGES], check=True, capture_output=True, text=True)
    return json.loads(found.stdout)
