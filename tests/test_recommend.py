"""`outlierq recommend`: what it names is planned, loads, has the exact size, and is said with its reasons."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from gguf_models import write_model

import outlierq as public
from outlierq.core.errors import ArgumentError
from outlierq.pipeline.advising.hardware import card_of, table
from outlierq.pipeline.advising.recommend import GOALS, _loads
from outlierq.pipeline.fitting.storage import CLIENTS
from outlierq.recipe import given, parse_size, shipped

ROOT = Path(__file__).parents[1]
FACTS = table("recommended")


@pytest.fixture(scope="module")
def stats(tiny_llama, tmp_path_factory) -> Path:
    """Statistics of the tiny model with sensitivities. Read-only."""
    folder = tmp_path_factory.mktemp("stats") / "stats"
    public.calibrate(tiny_llama, out=folder, samples=4, sequence_length=32, sensitivity=True, device="cpu")
    return folder


@pytest.fixture(scope="module")
def llama_256(tools, tmp_path_factory) -> Path:
    """Widths that whole groups and llama.cpp's blocks divide. Read-only."""
    return tools.write_llama(tmp_path_factory.mktemp("wide") / "llama-256", hidden_size=256, intermediate_size=256)


@pytest.mark.parametrize(("client", "gpu"), [("vllm", "L4"), ("vllm", "B200"), ("transformers", None), ("vllm", "cpu")])
def test_what_is_named_is_planned_to_the_byte_and_loads_in_the_client(tiny_llama, client, gpu):
    advice = public.recommend(tiny_llama, gpu=gpu, client=client)
    assert len({each.recipe for each in advice.suggestions}) == 3
    assert [each.goal for each in advice.suggestions] == list(GOALS)
    for each in advice.suggestions:
        plan = public.plan(tiny_llama, each.recipe)
        assert each.output_bytes == plan.output_bytes and each.why
        said = [line for line in plan.clients if line.startswith(CLIENTS[client].word)]
        assert each.client in "; ".join(said) and _loads(each.client)


SERVED = [("vllm", None), ("vllm", "MI300X"), ("vllm", "cpu"), ("transformers", None)]


@pytest.mark.parametrize(("client", "gpu"), SERVED)
def test_none_of_three_is_known_to_lose_less_than_the_one_for_quality(tiny_llama, client, gpu):
    rows = {each.goal: each for each in public.recommend(tiny_llama, gpu=gpu, client=client).suggestions}
    losses = {goal: row.expected.value for goal, row in rows.items() if row.expected.value is not None}
    assert len(losses) == 3 and losses["quality"] == min(losses.values()), {g: r.recipe for g, r in rows.items()}


def test_a_small_gain_of_size_does_not_outweigh_what_is_lost(tiny_llama):
    first, *_ = public.recommend(tiny_llama, goal="size").suggestions
    smaller = public.plan(tiny_llama, "mxfp4").output_bytes
    assert first.recipe == "best-w4" and smaller < first.output_bytes < 1.05 * smaller


def test_a_goal_gives_three_in_its_order_and_passes_over_what_the_card_does_not_run(tiny_llama):
    advice = public.recommend(tiny_llama, gpu="H100", goal="speed")
    names = [each.recipe for each in advice.suggestions]
    order = FACTS["order"]["vllm"]["speed"]
    assert len(names) == 3 and names == sorted(names, key=order.index)
    assert "no kernel on H100" in advice.refused["nvfp4-w4a4"]
    assert public.recommend(tiny_llama, gpu="b200", goal="speed").suggestions[0].recipe == "nvfp4-w4a4"


def test_the_command_runs_as_it_stands(tiny_llama, outlierq, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "40")
    answer = outlierq("recommend", tiny_llama, "--for", "transformers", "--goal", "speed")
    assert answer.code == 0 and answer.err == ""
    (line,) = [line.strip() for line in answer.out.splitlines() if "outlierq quantize" in line and "rtn-w8" in line]
    done = outlierq(*shlex.split(line)[1:], "-q")
    assert done.code == 0, done.err
    size = sum(path.stat().st_size for path in Path("tiny-llama-rtn-w8").iterdir() if path.name != "outlierq.json")
    assert f"({size:,} bytes, exact)" in " ".join(answer.out.split())


def test_a_command_asks_for_no_longer_windows_than_the_model_has_positions(tools, outlierq, tmp_path, monkeypatch):
    model = tools.write_llama(tmp_path / "short", hidden_size=128, intermediate_size=128, max_position_embeddings=64)
    (first, *_) = public.recommend(model, gpu="L4", goal="size").suggestions
    assert first.command.endswith("-s calibration.sequence_length=64")
    monkeypatch.chdir(tmp_path)
    assert outlierq(*shlex.split(first.command)[1:], "-s", "calibration.samples=4", "-q").code == 0


def test_json_holds_everything(tiny_llama, outlierq):
    values = json.loads(outlierq("recommend", tiny_llama, "--gpu", "l40s", "--json").out)
    assert values["card"]["name"] == "L40S" and values["client"] == "vllm" and values["checked"]
    first = values["suggestions"][0]
    assert first["fit"]["fits"] is True and first["expected"]["kind"] == "measured" and first["output_bytes"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--gpu", "h10"), "did you mean H100?"),
        (("--gpu", "zz"), "choose T4, A10"),
        (("--for", "vlm"), "did you mean vllm?"),
        (("--goal", "sped"), "did you mean speed?"),
    ],
)
def test_an_unknown_name_is_wrong_usage_and_the_nearest_is_offered(tiny_llama, outlierq, words, said):
    answer = outlierq("recommend", tiny_llama, *words)
    assert answer.code == 2 and said in " ".join(answer.err.replace("│", " ").split())


@pytest.mark.parametrize("name", ["RTX 4090", "rtx-4090", "NVIDIA GeForce RTX 4090", "geforce rtx4090"])
def test_a_card_may_be_spelled_as_people_do(name):
    assert card_of(name).name == "RTX4090"


def test_losses_are_predicted_from_statistics_where_they_are_given(tiny_llama, stats):
    advice = public.recommend(tiny_llama, gpu="L4", stats=stats)
    losses = [each.expected for each in advice.suggestions]
    assert all(each.kind == "predicted" and each.unit == "nats" and each.value > 0 for each in losses)
    assert losses[2].value < losses[0].value, "quality loses less than size"


def test_statistics_go_into_the_commands_that_can_take_them(llama_256, tmp_path):
    folder = tmp_path / "stats"
    public.calibrate(llama_256, out=folder, samples=4, sequence_length=32, device="cpu")
    advice = public.recommend(llama_256, gpu="L4", goal="size", stats=folder)
    commands = {each.recipe: each.command for each in advice.suggestions}
    assert f"--stats {folder}" in commands["gptq-w4"] and "--stats" not in commands["best-w4"]
    words = {each.recipe: each.expected.words for each in advice.suggestions}
    assert "before awq_held_out" in words["awq-gptq-w4"] and "% of the linears' outputs" in words["gptq-w4"]


def test_statistics_of_another_model_are_refused(untied_llama, stats):
    with pytest.raises(public.OutlierqError, match=r"(?i)statistics"):
        public.recommend(untied_llama, gpu="L4", stats=stats)


def test_what_does_not_fit_the_card_comes_last_and_is_said(tiny_llama, monkeypatch):
    from outlierq.pipeline.advising import recommend

    in_8_bits = public.recommend(tiny_llama, gpu="L4", goal="quality").suggestions[0]
    assert in_8_bits.recipe == "rtn-w8"
    cache = 2 * 2 * 2 * 16 * 2 * 512  # blocks, keys and values, heads, width, bytes, positions
    memory = int((in_8_bits.fit.loaded_bytes + cache - 1) / 0.9)
    monkeypatch.setattr(recommend, "card_of", lambda name: recommend.Card("X", "x", memory, card_of("L4").runs))
    advice = public.recommend(tiny_llama, client="vllm", goal="quality")
    fits = [each.fit.fits for each in advice.suggestions]
    assert fits == [True, True, True] and "rtn-w8" not in {each.recipe for each in advice.suggestions}
    memory //= 10
    advice = public.recommend(tiny_llama, client="vllm", goal="quality")
    assert {each.fit.fits for each in advice.suggestions} == {False} and "nothing of this fits" in advice.remarks[-1]


def test_for_a_processor_it_is_llama_cpp(llama_256, outlierq):
    answer = outlierq("recommend", llama_256, "--gpu", "cpu")
    assert answer.code == 0 and re.findall(r"\d\. (\S+)", answer.out)[1:] == ["gguf-q4_k_s", "gguf-q8_0"]
    assert "llama-server -m ./llama-256-q8_0.gguf" in answer.out


def test_a_gguf_file_is_opened_once_in_each_form_and_becomes_no_larger_one(tmp_path, monkeypatch):
    from outlierq.load import FramedCheckpoint
    from outlierq.pipeline.asked import request

    file, opened = tmp_path / "model.gguf", []
    folder = write_model(tmp_path / "model", "llama", hidden_size=256, intermediate_size=256, attention_bias=False)
    public.quantize(folder, "gguf-q8_0", out=file, progress=False)
    framed, source = FramedCheckpoint.__init__, request.Source.open

    def counted(self):
        opened.extend(["class"] if isinstance(self.place, str | Path) else [])
        return source(self)

    monkeypatch.setattr(
        FramedCheckpoint, "__init__", lambda self, *a, **k: opened.append("own") or framed(self, *a, **k)
    )
    monkeypatch.setattr(request.Source, "open", counted)
    advice = public.recommend(file, gpu="cpu")
    assert sorted(set(opened)) == ["class", "own"] and len(opened) <= 3  # one as the template
    assert advice.suggestions and all(each.output_bytes < file.stat().st_size for each in advice.suggestions)
    assert "it would make a file of" in advice.refused["gguf-q8_0"]
    assert all(each.source_bytes == file.stat().st_size for each in advice.suggestions)


def test_a_model_that_no_recipe_suits_gets_the_reason_of_each(tiny_llama, tmp_path, outlierq):
    import shutil

    odd = Path(shutil.copytree(tiny_llama, tmp_path / "odd"))
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(config | {"architectures": ["OddForCausalLM"]}))
    answer = outlierq("recommend", odd, "--goal", "size")
    assert answer.code == 1 and "no recipe that is known for vllm" in answer.err and "--for transformers" in answer.err
    lines = [line for line in answer.err.splitlines() if "it has no class OddForCausalLM" in line]
    assert len(lines) == 1 and "gptq-w4" in lines[0] and ": vLLM 0.33 (GPU, as documented): not tried" in lines[0]


class TestFacts:
    """The data that it stands on."""

    def test_every_recipe_that_is_named_is_shipped_and_has_a_reason(self):
        named = {name for goals in FACTS["order"].values() for order in goals.values() for name in order}
        assert named == set(FACTS["recipes"]) and named <= set(shipped())
        assert {tuple(goals) for goals in FACTS["order"].values()} == {GOALS} and set(FACTS["order"]) == set(CLIENTS)
        assert all(len(set(order)) == len(order) > 2 for goals in FACTS["order"].values() for order in goals.values())

    def test_every_need_is_explained_and_some_card_has_it(self):
        hardware = table("hardware")
        needs = {recipe["needs"] for recipe in FACTS["recipes"].values() if "needs" in recipe}
        runs = {word for card in hardware["cards"].values() for word in card["runs"]}
        assert needs | runs == set(hardware["words"]) and needs <= runs
        assert set(hardware["any"]["runs"]) | set(hardware["cpu"]["runs"]) <= runs

    def test_every_card_has_its_memory_and_a_source(self):
        cards = table("hardware")["cards"]
        assert {"L4", "H100", "B200", "MI350"} <= set(cards)
        for card in cards.values():
            assert parse_size(card["memory"]) >= 16e9 and card["source"].startswith("https://") and card["words"]

    @pytest.mark.parametrize("name", [n for n in FACTS["recipes"] if "needs" in FACTS["recipes"][n]])
    def test_what_a_recipe_needs_of_a_card_is_what_its_numbers_are(self, name):
        quantize = given(name).quantize
        inputs, need = quantize.activations, FACTS["recipes"][name]["needs"]
        if inputs is not None:
            assert need == ("w4afp8" if quantize.bits == 4 and quantize.kind == "int" else given_numbers(inputs))
        else:
            assert need == (
                "fp4-weights" if quantize.kind == "float" else {8: "int8-weights"}.get(quantize.bits, "int4")
            )

    def test_measured_losses_are_those_of_the_benchmarks(self):
        first, second = (json.loads((ROOT / file).read_text()) for file in FACTS["measured"]["files"])
        known = dict(first["kl"])
        for mix in second["models"][0]["mixes"]:
            known[f"gguf-{mix['mix'].lower()}"] = mix["ours"]["kl"]
        held = FACTS["measured"]["kl"]
        assert len(held) > 15 and held == {name: float(f"{known[name]:.3g}") for name in held}


def given_numbers(inputs) -> str:
    """What inputs are rounded to, as data/hardware.json calls it."""
    if inputs.scales == "two-level":
        return "nvfp4"
    return "fp8" if inputs.kind == "float" else "int8"


def test_an_unknown_card_raises_in_python_too(tiny_llama):
    with pytest.raises(ArgumentError, match="did you mean L40S"):
        public.recommend(tiny_llama, gpu="L40Z")


def test_without_a_card_nothing_is_said_that_is_not_true_of_each(outlierq, tiny_llama):
    said = outlierq("recommend", tiny_llama).out
    assert "on any GPU" not in said.replace("for vllm on any GPU", "")
    assert "some of the NVIDIA GPUs from Ampere on" in " ".join(said.split()) and "hold it: T4" not in said
