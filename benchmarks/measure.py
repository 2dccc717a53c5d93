"""Run one command and measure it as a whole process: CPU seconds, wall seconds, peak resident memory.

Linux counts into a child's peak the memory its parent held when it forked. A parent that has loaded torch would
therefore spoil the figure of a lean child, so `measure` starts this file as a small process of its own, and that starts
the command. For the same reason this file imports the standard library only.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def measure(command: list[str], log: Path, environment: dict[str, str] | None = None) -> dict:
    """Run `command` with its output in `log`; return its cost. Raises RuntimeError with the log's end if it fails.

    environment: variables set on top of ours.
    The cost: user_seconds, system_seconds, cpu_seconds (all threads, and all processes that the command
    waited for), wall_seconds, peak_bytes (of the largest process), load_average (of one minute, at the start).
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "cost.json")
        relay = [sys.executable, "-I", __file__, "--report", str(report), "--log", str(log), "--", *command]
        subprocess.run(relay, check=True, env={**os.environ, **(environment or {})})
        cost = json.loads(report.read_text())
    exit_code = cost.pop("exit_code")
    if exit_code != 0:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"exit code {exit_code} from {' '.join(command)}\nend of {log}:\n{end}")
    return cost


def wait_for(command: list[str], log: Path) -> dict:
    """Start `command`, wait, and read what the kernel counted for it."""
    load_average = os.getloadavg()[0]
    start = time.monotonic()
    with log.open("wb") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return {
        "exit_code": child.returncode,
        "user_seconds": round(usage.ru_utime, 2),
        "system_seconds": round(usage.ru_stime, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "wall_seconds": round(time.monotonic() - start, 2),
        "peak_bytes": usage.ru_maxrss * 1024,
        "load_average": round(load_average, 2),
    }


def main() -> None:
    """`measure.py --report cost.json --log run.log -- COMMAND...`"""
    parser = argparse.ArgumentParser(description="Run a command and write what it cost.")
    parser.add_argument("--report", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--log", type=Path, required=True, help="file for the command's output")
    parser.add_argument("command", nargs="+", help="the command, after --")
    arguments = parser.parse_args()
    cost = wait_for(arguments.command, arguments.log)
    arguments.report.write_text(json.dumps(cost, indent=2) + "\n")


if __name__ == "__main__":
    main()
