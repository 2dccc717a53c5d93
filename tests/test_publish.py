"""Publishing against a Hub on loopback: what arrives, what is refused, and what happens when the line breaks."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from hub_stand_in import READ_TOKEN, TOKEN

from outlierq.core.errors import PublishError
from outlierq.core.report import Report
from outlierq.pipeline.publish import without_paths

REPO = "alice/tiny-w4"
BASE = ("--base-model", "maker/tiny")
CARD = """---
license: apache-2.0
language: [en]
tags: [chat, legal, gguf, 8-bit, "region:us"]
---
# A tiny model
"""


@pytest.fixture(scope="module")
def compressed(tmp_path_factory, tools) -> Path:
    """A tiny model at 4 bits in several shards, measured by a gate that it passed. Read-only."""
    from outlierq.load import open_checkpoint
    from outlierq.pipeline.measuring.measure import Measurement, judge, measure, record, with_command
    from outlierq.pipeline.planning.decide import make_plan
    from outlierq.pipeline.quantize import quantize
    from outlierq.recipe import load

    work = tmp_path_factory.mktemp("publish")
    source = tools.write_llama(work / "the-source")
    (source / "README.md").write_text(CARD)
    settings = ["export.max_shard_size=60KB", "gate.max_kl=5", "gate.windows=2", "gate.window_length=32"]
    recipe = load("rtn-w4", settings)
    original = open_checkpoint(str(source))
    quantize(make_plan(original, recipe), work / "w4")
    wanted = Measurement.of_gate(recipe.gate, data_dir=None)
    found = measure(open_checkpoint(str(work / "w4")), original, wanted)
    record(work / "w4", evaluation=with_command(judge(found, recipe.gate.limits), f"outlierq quantize {source}"))
    return work / "w4"


@pytest.fixture
def folder(compressed, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(compressed, tmp_path / "w4"))


def card_of(hub) -> tuple[dict, str]:
    """Metadata and text of the published card."""
    _, head, text = hub.content(REPO)["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(head), text


class TestUpload:
    """A sound checkpoint arrives, whole and with its card."""

    def test_every_file_arrives_as_it_is_in_a_private_repository(self, outlierq, hub, compressed):
        answer = outlierq("publish", compressed, REPO, *BASE)
        assert answer.code == 0, answer.err
        assert f"published and compared: {hub.url}/{REPO} (private)" in answer.out
        assert hub.repositories[REPO].private and len(hub.repositories[REPO].commits) == 2
        arrived = hub.content(REPO)
        assert sum(name.endswith(".safetensors") for name in arrived) > 1
        for path in compressed.iterdir():
            if path.name not in ("README.md", "outlierq.json"):
                assert arrived[path.name] == path.read_bytes(), path.name
        assert arrived.keys() == {path.name for path in compressed.iterdir()}

    def test_the_download_is_a_checkpoint_that_gives_the_same_weights(self, outlierq, hub, compressed, tmp_path):
        import torch
        from huggingface_hub import snapshot_download

        from outlierq.load import load_model, open_checkpoint

        assert outlierq("publish", compressed, REPO, *BASE, "-q").code == 0
        got = snapshot_download(REPO, endpoint=hub.url, token=TOKEN, local_dir=tmp_path / "got")
        here, there = (load_model(open_checkpoint(str(place)), dtype="float32") for place in (compressed, got))
        weights = dict(there.named_parameters())
        assert weights and all(torch.equal(p, weights[name]) for name, p in here.named_parameters())

    def test_public_is_said(self, outlierq, hub, compressed):
        assert outlierq("publish", compressed, REPO, *BASE, "--public", "-q").code == 0
        assert not hub.repositories[REPO].private

    def test_a_dry_run_shows_files_and_card_and_asks_nobody(self, outlierq, hub, compressed, monkeypatch):
        monkeypatch.delenv("HF_TOKEN")
        answer = outlierq("publish", compressed, REPO, *BASE, "--dry-run")
        assert answer.code == 0 and hub.log == []
        assert "model.safetensors.index.json" in answer.out and "base_model: maker/tiny" in answer.out
        values = json.loads(outlierq("publish", compressed, REPO, *BASE, "--dry-run", "--json").out)
        assert {file["name"] for file in values["files"]} == {path.name for path in compressed.iterdir()}

    def test_what_is_no_part_of_the_model_stays_behind(self, outlierq, hub, folder):
        rubbish = ("adapter.bin", "deploy.py", "hf_token.txt", "id_rsa", "my_notes.log", "weights.bak", "x.part")
        for name in rubbish:
            (folder / name).write_text("x")
        (folder.parent / "hostname").write_text("private")
        (folder / "leak.txt").symlink_to(folder.parent / "hostname")
        values = json.loads(outlierq("publish", folder, REPO, *BASE, "--dry-run", "--json", "-q").out)
        assert values["left_out"] == sorted([*rubbish, "leak.txt"])
        assert outlierq("publish", folder, REPO, *BASE, "-q").code == 0
        assert not {*rubbish, "leak.txt"} & hub.content(REPO).keys()

    def test_all_chat_templates_arrive(self, outlierq, hub, tools, tmp_path):
        templates = tools.write_llama(tmp_path / "source") / "additional_chat_templates"
        templates.mkdir()
        (templates / "tool_use.jinja").write_text("tools")
        assert outlierq("quantize", tmp_path / "source", "-r", "rtn-w4", "-o", tmp_path / "out", "-q").code == 0
        assert outlierq("publish", tmp_path / "out", REPO, *BASE, "-q").code == 0
        assert hub.content(REPO)["additional_chat_templates/tool_use.jinja"] == b"tools"

    def test_a_link_out_of_the_folder_is_not_followed(self, outlierq, hub, folder):
        (folder.parent / "hostname").write_text("private")
        (folder / "NOTICE").symlink_to(folder.parent / "hostname")
        answer = outlierq("publish", folder, REPO, *BASE, "-q")
        assert answer.code == 1 and "NOTICE lies outside" in answer.err and REPO not in hub.repositories

    def test_hidden_files_and_folders_stay_behind(self, outlierq, hub, folder):
        (folder / ".secret").write_text("x")
        (folder / "logs").mkdir()
        (folder / "logs" / "run.txt").write_text("x")
        assert outlierq("publish", folder, REPO, *BASE, "-q").code == 0
        assert not any("secret" in name or "run.txt" in name for name in hub.content(REPO))
        values = json.loads(outlierq("publish", folder, REPO, *BASE, "--dry-run", "--json", "-q").out)
        assert values["left_out"] == [".secret", "logs"]


class TestCard:
    """What the card says."""

    def test_metadata_names_the_original_who_compressed_it_and_the_licence(self, outlierq, hub, compressed):
        outlierq("publish", compressed, REPO, *BASE, "-q")
        head, _ = card_of(hub)
        assert head["base_model"] == "maker/tiny" and head["base_model_relation"] == "quantized"
        assert head["quantized_by"] == "alice" and head["license"] == "apache-2.0" and head["language"] == ["en"]
        assert head["tags"] == ["chat", "legal", "outlierq", "compressed-tensors", "4-bit"], "those of the file go"

    def test_the_text_holds_recipe_figures_conditions_limits_and_how_to_run_it(self, outlierq, hub, compressed):
        outlierq("publish", compressed, REPO, *BASE, "-q")
        _, text = card_of(hub)
        measured = Report.from_dict(json.loads((compressed / "outlierq.json").read_text())).evaluation
        recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
        assert recipe["quantize"]["method"] == "rtn" and recipe["gate"]["max_kl"] == 5
        assert f"{measured['divergence']['kl_per_token']:.4g} ±" in text
        assert "62 predicted tokens in 2 windows of 32" in text and "float32 on cpu" in text
        assert re.search(r"\| KL divergence per token \(nats\) \| [\d.e-]+ \| ≤ 5 \|", text)
        assert f'from_pretrained("{REPO}")' in text and f"vllm serve {REPO}" in text

    def test_the_recipe_of_the_card_and_that_of_the_hub_run_as_they_stand(self, outlierq, hub, compressed, tmp_path):
        import torch
        from safetensors.torch import load_file

        assert outlierq("publish", compressed, REPO, *BASE, "-q").code == 0
        _, text = card_of(hub)
        assert f"`outlierq quantize maker/tiny -r hf:{REPO} -o out`" in text
        (tmp_path / "card.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
        shown = outlierq("recipes", "show", REPO)
        assert shown.code == 0 and shown.out.split("\n", 1)[1] == (tmp_path / "card.yaml").read_text()
        source = compressed.parent / "the-source"
        for number, recipe in enumerate((tmp_path / "card.yaml", f"hf:{REPO}", compressed)):
            done = outlierq("quantize", source, "-r", recipe, "-o", tmp_path / str(number), "-q")
            assert done.code == 0, done.err
            for file in compressed.glob("*.safetensors"):
                ours, theirs = load_file(tmp_path / str(number) / file.name), load_file(file)
                assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)

    def test_the_measurement_of_the_card_can_be_repeated_by_anybody(self, outlierq, hub, compressed):
        assert outlierq("publish", compressed, REPO, *BASE, "-q").code == 0
        repeat = f"outlierq eval {REPO} --reference maker/tiny --text mix --windows 2 --window-length 32"
        assert f"Repeat it with `{repeat}`." in card_of(hub)[1]

    def test_what_both_models_say_and_what_they_need_in_memory_stands_in_the_card(
        self, outlierq, hub, folder, compressed
    ):
        words = ("--windows", 1, "--window-length", 16, "--device", "cpu", "--generate", "--record", "-q")
        answer = outlierq("eval", folder, "--reference", compressed.parent / "the-source", *words)
        assert answer.code == 0 and "prompt  Write one sentence" in answer.out
        studied = outlierq("study", "cache", folder, "--only", "int8", "--record", *words[:6], "-q")
        assert studied.code == 0, studied.err
        assert outlierq("publish", folder, REPO, *BASE, "-q").code == 0
        _, text = card_of(hub)
        samples = json.loads((folder / "outlierq.json").read_text())["evaluation"]["samples"]
        assert len(samples) == 3 and all(row["before"] is not None and row["prompt"] in text for row in samples)
        assert "--generate`" in text
        assert re.search(r"\| int8 \| [\d.]+ \| [\d.e-]+ \| vllm serve --kv-cache-dtype int8", text), text
        assert "What follows: vllm serve" in text
        assert re.search(r"weights in memory.*\| +\| [\d.]+ kB", text) and "for 8,192 positions" in text

    def test_a_format_that_vllm_does_not_load_is_not_offered_to_it(self, compressed):
        from outlierq.report.model_card import model_card

        report = Report.from_dict(json.loads((compressed / "outlierq.json").read_text()))
        card = model_card(report, REPO, None, {}, clients=["transformers 5.23: loads", "vLLM 0.32: does not load it"])
        assert "from_pretrained" in card and "vllm serve" not in card

    def test_what_is_not_ours_means_nothing_in_it(self, compressed):
        from dataclasses import replace

        from markdown_it import MarkdownIt

        from outlierq.report.model_card import model_card

        hostile = "```\n# Heading\n<img src=x onerror=alert(1)> [a](javascript:b) ![c](d) | `e` \x1b[31m\u202e ~~~\n- f"
        report = Report.from_dict(json.loads((compressed / "outlierq.json").read_text()))
        settings = {**report.settings, "description": hostile, "calibration": {"text": hostile}}
        evaluation = {**report.evaluation, "text": hostile, "command": f"outlierq {hostile}", "device": hostile}
        row = {"name": hostile, "bits": 4.0, "kl": 0.1, "flag": hostile}
        report = replace(report, cache={"tokens": 1, "text": hostile, "advice": hostile, "rows": [row]})
        report = replace(report, settings=settings, evaluation=evaluation, recipe=hostile, notes=(hostile,) * 2)
        gate = [{"name": hostile, "value": 1.0, "relation": "<=", "limit": 2.0}]
        card = model_card(report, REPO, None, {"license_name": hostile}, gate=gate, clients=[hostile])
        head, fence, body = card.removeprefix("---\n").partition("\n---\n")
        assert fence and yaml.safe_load(head) == {
            "license_name": hostile.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
        }
        assert "\x1b" not in card and "\u202e" not in card
        blocks = re.split(r"^````yaml\n(.*?)^````$", body, flags=re.DOTALL | re.MULTILINE)
        assert len(blocks) == 3 and yaml.safe_load(blocks[1])["quantize"]["method"] == "rtn"
        page = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(body)
        assert "&lt;img" in page and not re.search("<img|<script|href=.javascript|<s>|<h1>Heading", page)
        assert page.count("<h1>") == 1 and page.count("<h2>") == body.count("\n## ")

    @pytest.mark.parametrize("name", ["a/b](javascript:alert(1))[x", "a/b\n# x", "owner", "a/b/c", "../b", ""])
    def test_an_original_that_is_no_hub_id_is_refused(self, outlierq, compressed, name):
        answer = outlierq("publish", compressed, REPO, "--base-model", name, "--dry-run")
        assert answer.code == 1 and "is no Hub id" in answer.err and "owner/name" in answer.err

    def test_no_path_of_this_machine_is_published(self, outlierq, hub, compressed):
        local = (compressed / "outlierq.json").read_text()
        assert str(compressed.parent) in local
        outlierq("publish", compressed, REPO, *BASE, "-q")
        for name in ("README.md", "outlierq.json"):
            assert str(compressed.parent) not in hub.content(REPO)[name].decode(), name
        assert Report.from_dict(json.loads(hub.content(REPO)["outlierq.json"])).model == "maker/tiny"
        assert "the-source" not in card_of(hub)[1], "nobody has that folder"

    @pytest.mark.parametrize(
        ("text", "cleaned"),
        [
            ("/home/me/models/x", "x"),
            ("tokens of /home/me/chats.jsonl, 4", "tokens of chats.jsonl, 4"),
            ("--text ~/notes/a.txt", "--text a.txt"),
            (r"C:\Users\me\model", "model"),
            (r"\\server\share\x", "x"),
            ("/srv/acme secret/chats.txt: 6 x 32", "chats.txt: 6 x 32"),
            ("of /data/secret folder/stats, 3 blocks", "of stats, 3 blocks"),
            ("file:///home/alice/x.txt", "x.txt"),
            ("text:/home/alice/m/x", "text:x"),
            ("alice@host:/home/alice/x", "x"),
            ("../../acme-secret/x", "x"),
            ("./run/secret/x", "x"),
            ("~alice/x", "x"),
            ("see /srv/x/y.txt is / was", "see y.txt is / was"),
            (r"re:.*\.mlp\.gate", r"re:.*\.mlp\.gate"),
            ("https://huggingface.co/a/b", "https://huggingface.co/a/b"),
            ("maker/model", "maker/model"),
            ("3 MB/s and/or x", "3 MB/s and/or x"),
        ],
    )
    def test_paths_are_told_from_other_words(self, text, cleaned):
        assert without_paths({"key": [text]}) == {"key": [cleaned]}

    def test_pictures_of_outliers_are_shown_when_there_is_a_report(self, outlierq, hub, folder):
        from outlier_reports import outlier_report

        report = outlier_report(blocks=3, hidden=64, intermediate=96)
        (folder / "outliers.json").write_text(json.dumps(report.to_dict()))
        (folder / "outliers.html").write_text(f"of {folder}")
        assert outlierq("publish", folder, REPO, *BASE, "-q").code == 0
        assert str(folder).encode() not in hub.content(REPO)["outliers.html"]
        pictures = [name for name in hub.content(REPO) if name.endswith(".png")]
        assert pictures and all(f"]({name})" in card_of(hub)[1] for name in pictures)
        assert all(hub.content(REPO)[name].startswith(b"\x89PNG") for name in pictures)

    def test_a_source_without_a_hub_id_has_to_be_named(self, outlierq, hub, compressed):
        answer = outlierq("publish", compressed, REPO)
        assert answer.code == 1 and "--base-model" in answer.err and not hub.repositories
        assert outlierq("publish", compressed, REPO, "--base-model", "none", "-q").code == 0
        assert "base_model" not in card_of(hub)[0]

    def test_a_checkpoint_without_a_licence_is_refused_until_one_is_named(self, outlierq, hub, folder):
        (folder / "README.md").write_text("# no metadata\n")
        assert outlierq("publish", folder, REPO, *BASE, "-q").code == 0
        assert card_of(hub)[0]["license_link"] == "LICENSE"
        (folder / "LICENSE").unlink()
        answer = outlierq("publish", folder, "alice/other", *BASE)
        assert answer.code == 1 and "--license" in answer.err
        assert outlierq("publish", folder, "alice/other", *BASE, "--license", "mit", "-q").code == 0

    def test_a_licence_the_hub_does_not_know_is_an_error_of_the_card(self, outlierq, hub, compressed):
        answer = outlierq("publish", compressed, REPO, *BASE, "--license", "no-such-licence")
        assert answer.code == 1 and "license" in answer.err and "Traceback" not in answer.err
        assert hub.objects == {}


class TestRefusal:
    """What may not leave the house."""

    def test_a_failed_gate_exits_with_3_and_sends_nothing(self, outlierq, hub, compressed):
        answer = outlierq("publish", compressed, REPO, *BASE, "--max-kl", "0.0000001")
        assert answer.code == 3 and "FAILED  KL divergence" in answer.err and hub.log == []

    def test_a_gate_that_failed_earlier_still_counts(self, outlierq, hub, folder):
        report = json.loads((folder / "outlierq.json").read_text())
        report["evaluation"]["gate"][0]["limit"] = 0.0
        (folder / "outlierq.json").write_text(json.dumps(report))
        assert outlierq("publish", folder, REPO, *BASE).code == 3

    def test_a_gate_of_the_recipe_holds_whatever_was_recorded_later(self, outlierq, hub, folder):
        report = json.loads((folder / "outlierq.json").read_text())
        report["evaluation"]["gate"] = []
        report["settings"]["gate"]["max_kl"] = 0.0
        report["record"] = None  # else its signature would tell
        (folder / "outlierq.json").write_text(json.dumps(report))
        assert outlierq("publish", folder, REPO, *BASE).code == 3

    def test_a_gate_that_was_never_measured_is_no_passed_gate(self, outlierq, hub, folder):
        report = json.loads((folder / "outlierq.json").read_text())
        report["evaluation"] = None
        (folder / "outlierq.json").write_text(json.dumps(report))
        answer = outlierq("publish", folder, REPO, *BASE)
        assert answer.code == 1 and "nothing was measured" in answer.err and "--record" in answer.err

    def test_a_limit_on_what_was_not_measured_is_refused(self, outlierq, hub, compressed):
        answer = outlierq("publish", compressed, REPO, *BASE, "--min-task", "mmlu:-1")
        assert answer.code == 1 and "`mmlu` of the model, which was not run" in answer.err

    def test_results_of_other_bytes_do_not_count(self, outlierq, hub, folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 20000.0}))
        answer = outlierq("publish", folder, REPO, *BASE)
        assert answer.code == 1 and "config.json: was changed since the run" in answer.err and hub.log == []
        report = json.loads((folder / "outlierq.json").read_text())
        (folder / "outlierq.json").write_text(json.dumps(report | {"record": None}))
        answer = outlierq("publish", folder, REPO, *BASE)
        assert answer.code == 1 and "measured on other bytes" in answer.err and hub.log == []

    def test_a_damaged_checkpoint_is_refused(self, outlierq, hub, folder):
        from safetensors.torch import load_file, save_file

        shard = sorted(folder.glob("*.safetensors"))[-1]
        tensors = load_file(shard)
        broken = next(name for name, value in tensors.items() if value.is_floating_point())
        tensors[broken].view(-1)[0] = float("nan")
        save_file(tensors, shard, metadata={"format": "pt"})
        answer = outlierq("publish", folder, REPO, *BASE)
        assert answer.code == 1 and broken in answer.err and hub.log == []

    def test_a_truncated_shard_is_refused(self, outlierq, hub, folder):
        shard = sorted(folder.glob("*.safetensors"))[0]
        shard.write_bytes(shard.read_bytes()[:-64])
        answer = outlierq("publish", folder, REPO, *BASE)
        assert answer.code == 1 and shard.name in answer.err and hub.log == []

    def test_a_folder_of_somebody_else_is_refused(self, outlierq, hub, tiny_llama):
        answer = outlierq("publish", tiny_llama, REPO, *BASE)
        assert answer.code == 1 and "no result of `outlierq quantize`" in answer.err

    def test_a_name_without_an_owner_is_refused(self, outlierq, hub, compressed):
        answer = outlierq("publish", compressed, "tiny", *BASE)
        assert answer.code == 1 and "owner/name" in answer.err and hub.log == []


class TestHub:
    """Tokens, existing repositories, and a line that breaks."""

    @pytest.mark.parametrize(
        ("token", "said"), [("hf_wrong", "does not know this token"), (READ_TOKEN, "may not write to alice/tiny-w4")]
    )
    def test_a_wrong_token_is_said_and_nothing_is_sent(self, outlierq, hub, compressed, monkeypatch, token, said):
        monkeypatch.setenv("HF_TOKEN", token)
        answer = outlierq("publish", compressed, REPO, *BASE)
        assert answer.code == 1 and said in answer.err and "Traceback" not in answer.err
        assert hub.repositories == {} and hub.objects == {}
        assert token not in answer.out + answer.err

    def test_no_token_is_said(self, outlierq, hub, compressed, monkeypatch, tmp_path):
        from huggingface_hub import constants

        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        answer = outlierq("publish", compressed, REPO, *BASE)
        assert answer.code == 1 and "no token for the Hub" in answer.err and "hf auth login" in answer.err

    @pytest.mark.parametrize("answer_of_hub", [500, 0], ids=["errors", "hangs up"])
    def test_an_upload_that_broke_off_goes_on_where_it_was(self, outlierq, hub, compressed, answer_of_hub):
        sent: list[str] = []

        def one_object_only(method: str, path: str) -> int | None:
            if method == "PUT":
                sent.append(path)
                return None if path == sent[0] else answer_of_hub
            return None

        hub.breaks = one_object_only
        answer = outlierq("publish", compressed, REPO, *BASE)
        assert answer.code == 1 and "broke off" in answer.err and "run the same command again" in answer.err
        assert len(hub.objects) == 1 and len(hub.repositories[REPO].commits) == 1, "nothing half was committed"
        hub.breaks = None
        hub.log.clear()
        assert outlierq("publish", compressed, REPO, *BASE, "-q").code == 0
        assert sent[0] not in hub.requests("PUT", "/lfs-store/"), "what had arrived was sent again"
        arrived = hub.content(REPO)
        for path in compressed.glob("*.safetensors"):
            assert arrived[path.name] == path.read_bytes()

    def test_a_second_publication_of_the_same_sends_and_commits_nothing(self, outlierq, hub, compressed):
        assert outlierq("publish", compressed, REPO, *BASE, "-q").code == 0
        commits = list(hub.repositories[REPO].commits)
        hub.log.clear()
        assert outlierq("publish", compressed, REPO, *BASE, "-q").code == 0
        assert hub.requests("PUT", "") == [] and hub.repositories[REPO].commits == commits

    def test_an_existing_repository_with_other_files_is_left_alone_until_it_is_asked_for(
        self, outlierq, hub, compressed
    ):
        assert outlierq("publish", compressed, REPO, *BASE, "-q").code == 0
        held = hub.repositories[REPO]
        held.small["config.json"] = b"{}"
        held.small["model-00009-of-00009.safetensors"] = b"stale"
        held.small["demo.txt"] = b"mine"
        answer = outlierq("publish", compressed, REPO, *BASE)
        assert answer.code == 1 and "--update" in answer.err
        assert "config.json, demo.txt, model-00009-of-00009.safetensors" in answer.err
        assert hub.content(REPO)["config.json"] == b"{}"
        assert outlierq("publish", compressed, REPO, *BASE, "--update", "-q").code == 0
        now = hub.content(REPO)
        assert now["config.json"] == (compressed / "config.json").read_bytes() and now["demo.txt"] == b"mine"
        assert "model-00009-of-00009.safetensors" not in now, "a stale shard would be loaded with the new ones"

    def test_a_private_checkpoint_does_not_go_into_a_public_repository(self, outlierq, hub, compressed):
        outlierq("publish", compressed, REPO, *BASE, "--public", "-q")
        answer = outlierq("publish", compressed, REPO, *BASE)
        assert answer.code == 1 and "exists and is public" in answer.err and "--public" in answer.err
        assert outlierq("publish", compressed, REPO, *BASE, "--public", "-q").code == 0

    def test_a_hub_that_stored_other_bytes_is_found_out(self, outlierq, hub, compressed, monkeypatch):
        from outlierq.pipeline import publish

        genuine = publish._held

        def wrong(api, repository):
            held = genuine(api, repository)
            return held and {name: (size, "0" * len(digest)) for name, (size, digest) in held.items()}

        monkeypatch.setattr(publish, "_held", wrong)
        answer = outlierq("publish", compressed, REPO, *BASE)
        assert answer.code == 1 and "does not hold what was sent" in answer.err

    def test_nothing_is_written_into_the_folder(self, outlierq, hub, compressed, tools):
        before = tools.folder_hashes(compressed)
        outlierq("publish", compressed, REPO, *BASE, "-q")
        assert tools.folder_hashes(compressed) == before


def test_metadata_that_is_no_yaml_is_said(tmp_path):
    from outlierq.report.model_card import source_metadata

    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(PublishError, match="not valid YAML"):
        source_metadata(tmp_path)
