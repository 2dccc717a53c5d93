"""The steps of a CI job, end to end on loopback."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
SMALL = ("-s", "calibration.samples=6", "-s", "calibration.sequence_length=32", "-s", "gate.windows=2")


def demo(work: Path, *words: object) -> subprocess.CompletedProcess:
    """The script, in a process of its own."""
    files = ("--junit", work / "gate.xml", "--card", work / "card.md")
    command = [sys.executable, ROOT / "scripts" / "publish_demo.py", *files, *words]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=work, check=False)


def test_a_tiny_model_is_compressed_gated_and_published_in_three_processes(tiny_llama, tmp_path):
    more = ("--model", tiny_llama, "--name", "tiny-W4", *SMALL, "-s", "gate.window_length=64")
    done = demo(tmp_path, *more)
    assert done.returncode == 0, done.stderr
    assert "alice/tiny-W4:" in done.stdout and "private, gate passed" in done.stdout
    assert ElementTree.parse(tmp_path / "gate.xml").getroot().get("failures") == "0"
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in (tmp_path / "card.md").read_text()


@pytest.mark.slow
def test_a_failed_gate_ends_the_demo_with_3_and_publishes_nothing(tiny_llama, tmp_path):
    done = demo(tmp_path, "--model", tiny_llama, *SMALL, "-s", "gate.window_length=64", "--max-kl", "0")
    assert done.returncode == 3 and "FAILED  KL divergence" in done.stderr
    assert "outlierq publish" not in done.stdout and not (tmp_path / "card.md").exists()


@pytest.mark.slow
def test_the_default_model_is_published_within_six_minutes(tmp_path):
    done = demo(tmp_path)
    assert done.returncode == 0, done.stderr
    seconds = float(re.search(r"\((\d+) s\)$", done.stdout.strip())[1])
    assert seconds < 360, f"{seconds} s"
