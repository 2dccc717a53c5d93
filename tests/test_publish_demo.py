"""The CI job: the demo runs end to end on loopback, and the workflow file gives commands that exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOW = ROOT / "examples" / "github-workflow.yml"
SMALL = ("-s", "calibration.samples=6", "-s", "calibration.sequence_length=32", "-s", "gate.windows=2")


def demo(work: Path, *words: object) -> subprocess.CompletedProcess:
    """The script, in a process of its own."""
    files = ("--junit", work / "gate.xml", "--card", work / "card.md")
    command = [sys.executable, ROOT / "scripts" / "publish_demo.py", *files, *words]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=work, check=False)


def commands() -> list[list[str]]:
    """Every call of outlierq in the workflow and in docs/ci.md."""
    steps = yaml.safe_load(WORKFLOW.read_text())["jobs"]["compress"]["steps"]
    lines = [line for step in steps for line in step.get("run", "").splitlines()]
    lines += (ROOT / "docs" / "ci.md").read_text().splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("outlierq ")]


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


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_of_the_workflow_and_of_the_page_is_one_that_exists(words):
    """Parsed by the command line itself, which knows every option; nothing is run."""
    from typer.main import get_command

    from outlierq.cli.main import app

    command = get_command(app).commands[words[0]]
    context = command.make_context(words[0], list(words[1:]))
    assert context.params and not context.args


def test_the_workflow_publishes_only_on_tags_and_after_the_gate():
    job = yaml.safe_load(WORKFLOW.read_text())["jobs"]["compress"]["steps"]
    runs = [step.get("run", "") for step in job]
    (gate,) = [i for i, run in enumerate(runs) if run.startswith("outlierq quantize")]
    sent = [i for i, run in enumerate(runs) if run.startswith("outlierq publish") and "--dry-run" not in run]
    assert len(commands()) > 5 and len(sent) == 1 and sent[0] > gate
    assert job[sent[0]]["if"] == "startsWith(github.ref, 'refs/tags/')"
    secret = [i for i, step in enumerate(job) if "HF_TOKEN" in step.get("env", {})]
    assert secret == sent, "only the step that publishes sees the token"
