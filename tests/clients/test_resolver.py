"""What vLLM's own reader of configs takes each module of our checkpoints for is what the file holds.

Of every architecture that transformers can build, tiny and random: nothing is loaded, so no kernel is needed, and a
tower, an extra block or an expert that the config does not declare is found all the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import outlierq
from clients.jobs import REPOSITORY, SCRIPTS, Refused, python_of

sys.path.insert(0, str(REPOSITORY / "scripts"))

pytestmark = pytest.mark.clients

RECIPE = "rtn-w8"


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of each architecture that can be made and compressed. Read-only."""
    from coverage_models import architectures, tiny_model, write_checkpoint

    work, written = tmp_path_factory.mktemp("resolver"), {}
    for name, kind in sorted(architectures().items()):
        try:
            write_checkpoint(tiny_model(name, kind), work / name)
        except Exception:  # whatever transformers raises for a tiny config of this type: `make coverage` says so
            continue
        try:
            outlierq.quantize(str(work / name), RECIPE, out=work / f"{name}-w8", device="cpu")
        except outlierq.OutlierqError:
            continue
        written[name] = work / f"{name}-w8"
    assert len(written) > 100
    return written


def resolved(folders: list[Path], work: Path) -> dict[str, Any]:
    """What vLLM says of each folder, by its name."""
    job, out = work / "resolve.json", work / "resolved.json"
    job.write_text(json.dumps({"folders": [str(folder) for folder in folders]}))
    command = [python_of("vllm"), SCRIPTS / "resolve_vllm.py", job, out]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    if done.returncode:
        raise Refused(done.stderr[-3000:])
    return {Path(folder).name: answer for folder, answer in json.loads(out.read_text()).items()}


def test_every_module_is_taken_for_what_the_file_holds(exports, tmp_path):
    answers = resolved(list(exports.values()), tmp_path)
    wrong = {name: answer["wrong"][:3] for name, answer in answers.items() if answer["wrong"]}
    assert not wrong
    assert sum(answer["class"] is not None for answer in answers.values()) > 60
    assert all(answer["modules"] > 4 for answer in answers.values())


def test_a_module_that_the_config_does_not_declare_plain_is_told(exports, tmp_path):
    folder = exports["qwen2_vl"]
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"] = ["lm_head"]
    planted = tmp_path / "planted"
    planted.mkdir()
    (planted / "config.json").write_text(json.dumps(config))
    for shard in folder.glob("*.safetensors"):
        (planted / shard.name).symlink_to(shard)
    told = resolved([planted], tmp_path)["planted"]["wrong"]
    assert told and all("visual" in module for module, _, _ in told)
