"""lm-eval tasks run offline from both layouts of local data, and leave nothing changed."""

import copy
import io
import json
import logging
import os
import random

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from outlierq.core.errors import OutlierqError, SourceError
from outlierq.evaluate.task_data import find_local, leaf_tasks, task_folders, task_manager
from outlierq.evaluate.tasks import Served, run_tasks

PAGES = [{"page": " = One = \n \n The cat sat . \n"}, {"page": " = Two = \n \n A dog ran , twice . \n"}]
SUBJECTS = ("anatomy", "virology")


def question(subject, index):
    return {"question": f"{subject} {index}?", "subject": subject, "choices": ["a", "b", "c", "d"], "answer": index % 4}


def arc(index):
    choices = {"text": ["one", "two", "three", "four"], "label": ["A", "B", "C", "D"]}
    return {"id": str(index), "question": f"Which {index}?", "choices": choices, "answerKey": "ABCD"[index % 4]}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def tokenizer():
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<end>"]
    core = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Plain folders, all subjects of MMLU in one file."""
    root = tmp_path_factory.mktemp("plain")
    write(root / "wikitext2-raw/test.jsonl", PAGES)
    write(root / "mmlu/test.jsonl", [question(subject, i) for i in range(4) for subject in SUBJECTS])
    write(root / "mmlu/dev.jsonl", [question(subject, i) for i in range(5) for subject in SUBJECTS])
    write(root / "arc/ARC-Easy/test.jsonl", [arc(i) for i in range(4)])
    write(root / "arc/ARC-Challenge/test.jsonl", [arc(i) for i in range(3)])
    return root


@pytest.fixture(scope="module")
def hub_shaped(tmp_path_factory):
    """Folders named like the data sets and configurations of the Hub."""
    root = tmp_path_factory.mktemp("hub")
    write(root / "EleutherAI/wikitext_document_level/wikitext-2-raw-v1/test.jsonl", PAGES)
    for subject in SUBJECTS:
        write(root / f"cais/mmlu/{subject}/test.jsonl", [question(subject, i) for i in range(4)])
        write(root / f"cais/mmlu/{subject}/dev.jsonl", [question(subject, i) for i in range(5)])
    write(root / "allenai/ai2_arc/ARC-Easy/test-00000-of-00002.jsonl", [arc(i) for i in range(2)])
    write(root / "allenai/ai2_arc/ARC-Easy/test-00001-of-00002.jsonl", [arc(i) for i in range(2, 4)])
    write(root / "allenai/ai2_arc/ARC-Challenge/test.jsonl", [arc(i) for i in range(3)])
    return root


def run(model, tokenizer, root, *names, **options):
    return run_tasks(model, tokenizer, list(names), data_dir=root, batch_size=4, **options)


def test_both_layouts_give_the_same_figures(model, tokenizer, plain, hub_shaped):
    names = ("wikitext", "arc_easy", "arc_challenge", "mmlu_anatomy", "mmlu_virology")
    result = run(model, tokenizer, plain, *names)
    assert result == run(model, tokenizer, hub_shaped, *names)
    found = {(row["task"], row["metric"]): row for row in result["rows"]}
    assert list(dict.fromkeys(row["task"] for row in result["rows"])) == list(names)
    assert found["wikitext", "word_perplexity"]["value"] > 1
    assert found["arc_easy", "acc"]["samples"] == 4
    assert found["arc_challenge", "acc_norm"]["samples"] == 3
    assert found["mmlu_anatomy", "acc"]["samples"] == 4
    assert 0 <= found["mmlu_anatomy", "acc"]["value"] <= 1
    assert result["conditions"]["data"] == "local"
    assert result["conditions"]["num_fewshot"] == dict.fromkeys(names, 0)
    assert result["versions"]["wikitext"] == 2
    json.dumps(result, allow_nan=False)


def test_bits_per_byte_equals_a_plain_computation(model, tokenizer, plain):
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    nll = bytes_in_all = 0
    for page in PAGES:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(wikitext_detokenizer(page))["input_ids"]]])
        with torch.no_grad():
            logp = model(ids).logits[:, :-1].double().log_softmax(-1)
        nll -= logp.gather(-1, ids[:, 1:, None]).sum().item()
        bytes_in_all += len(page["page"].encode())
    rows = run(model, tokenizer, plain, "wikitext")["rows"]
    measured = next(row["value"] for row in rows if row["metric"] == "bits_per_byte")
    assert measured == pytest.approx(nll / bytes_in_all / np.log(2), rel=1e-5)


@pytest.mark.parametrize(("asked", "length"), [(None, 512), (0, 512), (64, 64), (9999, 512)])
def test_contexts_are_as_long_as_asked_and_the_conditions_say_so(model, tokenizer, plain, asked, length):
    conditions = run(model, tokenizer, plain, "wikitext", max_length=asked)["conditions"]
    assert (conditions["max_length"], conditions["positions"]) == (length, 512)


def test_contexts_shorter_than_the_model_are_said_beside_the_figures(model, tokenizer, plain, monkeypatch):
    from rich.console import Console

    from outlierq.evaluate import tasks
    from outlierq.report import terminal
    from outlierq.report.model_card import _task_conditions

    def shown(result):
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(terminal.tasks(result))
        return console.export_text()

    monkeypatch.setattr(tasks, "CONTEXT_LIMIT", 16)
    cut = run(model, tokenizer, plain, "wikitext")
    assert "in contexts of 16 of the model's 512 positions" in shown(cut)
    assert "max_length 16" in _task_conditions({"tasks": cut}) and "512 positions" in _task_conditions({"tasks": cut})
    whole = run(model, tokenizer, plain, "wikitext", max_length=0)
    assert "contexts" not in shown(whole) and "positions" not in _task_conditions({"tasks": whole})
    assert whole["rows"][0]["value"] != cut["rows"][0]["value"]


def test_a_group_comes_before_its_members(model, tokenizer, tmp_path):
    subjects = [task.removeprefix("mmlu_") for task in leaf_tasks(task_manager(["mmlu"]), ["mmlu"])]
    assert len(subjects) == 57
    write(tmp_path / "mmlu/test.jsonl", [question(subject, 1) for subject in subjects])
    rows = run(model, tokenizer, tmp_path, "mmlu_stem", limit=1)["rows"]
    assert rows[0]["task"] == "mmlu_stem"
    assert rows[0]["parent"] is None
    assert rows[0]["samples"] == len(rows) - 1 == 19
    assert {row["parent"] for row in rows[1:]} == {"mmlu_stem"}


def test_examples_come_from_the_development_split(model, tokenizer, plain, tmp_path):
    seen = []
    result = run(model, tokenizer, plain, "mmlu_anatomy", num_fewshot=2, limit=2, progress=seen.append)
    assert result["conditions"]["num_fewshot"] == {"mmlu_anatomy": 2}
    assert result["rows"][0]["samples"] == 2
    assert seen == sorted(seen)
    assert seen[-1] >= 2
    write(tmp_path / "mmlu/test.jsonl", [question("anatomy", i) for i in range(4)])
    assert run(model, tokenizer, tmp_path, "mmlu_anatomy")["rows"]
    with pytest.raises(SourceError, match="needs the split `dev`; the files hold test"):
        run(model, tokenizer, tmp_path, "mmlu_anatomy", num_fewshot=2)


def test_the_split_that_is_scored_must_be_there(model, tokenizer, tmp_path):
    write(tmp_path / "allenai/ai2_arc/ARC-Easy/validation.jsonl", [arc(0)])
    with pytest.raises(SourceError, match="`arc_easy` needs the split `test`"):
        run(model, tokenizer, tmp_path, "arc_easy")


def test_tasks_without_local_data_are_listed(model, tokenizer, plain):
    with pytest.raises(
        SourceError, match=r"no data for 55 tasks: mmlu_abstract_algebra \(cais/mmlu/abstract_algebra\)"
    ):
        run(model, tokenizer, plain, "mmlu", "wikitext")
    with pytest.raises(SourceError, match="piqa"):
        run(model, tokenizer, plain, "piqa")


def test_files_of_one_configuration_do_not_stand_for_another(tmp_path):
    write(tmp_path / "arc/test.jsonl", [arc(0)])
    assert find_local(tmp_path, "allenai/ai2_arc", "ARC-Easy") is None


def test_an_unknown_task_gets_the_nearest_name(model, tokenizer):
    with pytest.raises(OutlierqError, match="knows no task `arc_eazy`") as raised:
        run_tasks(model, tokenizer, ["arc_eazy"])
    assert "`arc_easy`" in raised.value.hint
    with pytest.raises(OutlierqError, match="no tasks were named"):
        run_tasks(model, tokenizer, [])


def test_a_task_asked_for_twice_is_refused(model, tokenizer, plain):
    with pytest.raises(OutlierqError, match="`arc_easy` is asked for twice, by `ai2_arc` and by `arc_easy`"):
        run(model, tokenizer, plain, "ai2_arc", "arc_easy")


def test_a_broken_data_file_is_named(model, tokenizer, tmp_path):
    write(tmp_path / "arc/ARC-Easy/test.jsonl", [arc(0)])
    with open(tmp_path / "arc/ARC-Easy/test.jsonl", "a") as file:
        file.write("{")
    with pytest.raises(SourceError, match=r"line 2 of .*ARC-Easy/test\.jsonl is not JSON"):
        run(model, tokenizer, tmp_path, "arc_easy")


def test_nothing_global_is_changed(model, tokenizer, plain, caplog, capfd):
    import datasets.config
    import huggingface_hub.constants

    def state():
        return (
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.random.get_rng_state().tolist(),
            dict(os.environ),
            huggingface_hub.constants.HF_HUB_OFFLINE,
            datasets.config.HF_HUB_OFFLINE,
            logging.getLogger("lm_eval").level,
            tokenizer.pad_token,
            model.training,
            len(model._forward_hooks),
        )

    model.train()
    before = state()
    run(model, tokenizer, plain, "arc_easy", limit=1, progress=lambda done: None)
    assert state() == before
    model.eval()
    assert not caplog.records
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_no_connection_is_tried_with_local_data(model, tokenizer, plain, monkeypatch):
    import socket

    def refuse(*_arguments, **_options):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert run(model, tokenizer, plain, "arc_easy", limit=1)["rows"]


def test_a_tag_over_several_folders_keeps_all_its_members():
    assert len(task_folders()["glue"]) > 1
    assert len(leaf_tasks(task_manager(["glue"]), ["glue"])) >= 9


def test_files_may_lie_in_the_data_sets_own_folder_and_be_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    from outlierq.evaluate.task_data import load_local

    folder = tmp_path / "EleutherAI/wikitext_document_level"
    folder.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PAGES), folder / "test-00000-of-00001.parquet")
    found = find_local(tmp_path, "EleutherAI/wikitext_document_level", "wikitext-2-raw-v1")
    assert load_local(found.files)["test"].to_list() == PAGES


def test_data_that_cannot_be_downloaded_is_said_with_a_way_out(model, tokenizer, tmp_path, monkeypatch):
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(SourceError, match="data of piqa cannot be loaded") as raised:
        run_tasks(model, tokenizer, ["piqa"])
    assert "local data" in raised.value.hint


def test_a_served_folder_is_handed_to_lm_evals_vllm_model(model, tokenizer, plain, monkeypatch, tmp_path):
    """vLLM is stood in for by the model in process, so that only the hand-over is seen."""
    import sys
    import types

    from lm_eval.models.huggingface import HFLM

    from outlierq.evaluate import tasks

    handed = []

    def stand_in(**arguments):
        handed.append(arguments)
        return HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", max_length=512)

    module = types.ModuleType("lm_eval.models.vllm_causallms")
    module.VLLM = stand_in
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(tasks, "find_spec", lambda name: name == "vllm")
    served = run(Served(tmp_path / "w4"), None, plain, "arc_easy", max_length=512)
    assert handed == [
        {"pretrained": str(tmp_path / "w4"), "batch_size": 4, "max_model_len": 512, "trust_remote_code": False}
    ]
    assert served["conditions"]["backend"] == "vllm"
    assert served["rows"] == run(model, tokenizer, plain, "arc_easy", max_length=512)["rows"]


def test_lm_eval_is_told_the_version_of_a_build_of_vllm_with_another_name(monkeypatch):
    from importlib.metadata import PackageNotFoundError, version

    from outlierq.evaluate import tasks

    monkeypatch.setattr(tasks, "packages_distributions", lambda: {"vllm": ["import-linter"]})
    with tasks._known_as_vllm():
        assert version("vllm") == f"{version('import-linter')}+linter"
    with pytest.raises(PackageNotFoundError):
        version("vllm")


def test_a_served_folder_is_refused_without_vllm(plain, tmp_path):
    with pytest.raises(OutlierqError, match="vllm is not installed"):
        run(Served(tmp_path), None, plain, "arc_easy")
