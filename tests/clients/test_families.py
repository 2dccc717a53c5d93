"""vLLM and transformers load the families that are served most, and compute what the dequantized model computes.

Of random weights: no text makes sense to them, so perplexities say nothing, and losses are compared token by token.
What the plan says that a client does not load is refused by it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest

from clients.families import EXPORTS, FAMILIES, Exported, export
from clients.jobs import Dequantized, Refused, agreement, ask, home

pytestmark = pytest.mark.clients

COUNT = 2  # windows
# A client may differ by so many times what bfloat16 does to the dequantized model (0.8 to 1.4 were measured); kernels
# for int4 experts round their inputs to int8, which nobody asked for (1.6).
ARITHMETIC, ROUNDED = 1.5, 2.0
# What is true of a class, and not of schemes: experts that no softmax chooses have no kernel in vLLM's CPU build.
NO_KERNEL = {"deepseek-v3-mtp-w4": "No WNA16 MoE backend supports"}
REFUSED = {
    **NO_KERNEL,
    "deepseek-v3-mtp-w8a8": "No Int8 MoE backend supports",  # and kv_b_proj, of which the plan says it
    "gpt-oss-mxfp4": "No MXFP4 MoE backend supports",
    "qwen3-moe-two-schemes-w4": "All MoE projections need to have same quantization scheme",
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Callable[[str], Exported]:
    """An export by name; the tests of one follow each other."""
    return lru_cache(maxsize=1)(lambda name: export(name, tmp_path_factory.mktemp(name)))


def with_kernels(name: str) -> dict[str, str]:
    """Variables for vLLM: on AMD's CPUs its kernels for experts come from zentorch."""
    place = home() / "zentorch"
    if not place.exists() or not name.startswith(("qwen3-moe", "mixtral")):
        return {}
    return {"PYTHONPATH": str(place), "VLLM_CPU_INT4_W4A8": "1"}


def assert_agrees(client: str, name: str, folder: Path, record, work: Path, **options) -> None:
    """Losses and the continuation are those of the dequantized model."""
    answer = ask(client, folder, work, count=COUNT, **options)
    model = Dequantized(folder, count=COUNT)
    found = agreement(answer, model)
    record(answer.client, name, found)
    rounded = client == "vllm" and "moe" in name and name.endswith("w4")
    limit = (ROUNDED if rounded else ARITHMETIC) * model.arithmetic
    assert found.typical <= limit and found.regret <= 2 * found.large  # of two tokens
    if experts := [path for path in folder.glob("*.safetensors") if swapped(path)]:
        assert len(experts) == 1
        assert agreement(answer, Dequantized(other(folder, work), count=COUNT)).typical > limit


def swapped(path: Path) -> dict[str, str]:
    """Names of tensors with two experts changed over."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if ".experts.0." in name]  # noqa: SIM118
    pairs = {name: name.replace(".experts.0.", ".experts.1.") for name in names}
    return pairs | {second: first for first, second in pairs.items()}


def other(folder: Path, work: Path) -> Path:
    """Not any mixture would do: with two of its experts changed over it is another one."""
    from safetensors.torch import load_file, save_file

    copied = shutil.copytree(folder, work / "swapped")
    (copied / "outlierq.json").unlink()  # it knows that the file was changed
    path = copied / "model.safetensors"
    names, tensors = swapped(path), load_file(path)
    save_file({names.get(name, name): tensor for name, tensor in tensors.items()}, path, {"format": "pt"})
    return copied


@pytest.mark.parametrize("client", ["vllm", "transformers"])
@pytest.mark.parametrize("name", EXPORTS)
def test_a_client_computes_what_the_dequantized_model_computes_or_the_plan_says_no(
    name, client, exported, record, tmp_path
):
    made = exported(name)
    is_vllm = client == "vllm"
    options = {"environment": with_kernels(name), **FAMILIES[EXPORTS[name][0]].options} if is_vllm else {}
    if not made.says("vLLM 0.32" if is_vllm else "transformers") or (is_vllm and name in NO_KERNEL):
        with pytest.raises(Refused, match=REFUSED[name] if is_vllm else "transformers stopped"):
            ask(client, made.folder, tmp_path, count=COUNT, **options)
    else:
        assert_agrees(client, name, made.folder, record, tmp_path, **options)
