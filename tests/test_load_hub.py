"""A Hub id opens one pinned commit from the cache, and every way in which the Hub says no has its own message."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import save_file

from outlierq.core.errors import SourceError
from outlierq.core.machine import hub as asking
from outlierq.load import open_checkpoint
from outlierq.load.hub import snapshot as hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache as huggingface_hub lays it out, holding acme/tiny, with the network switched off."""
    repository = tmp_path / "models--acme--tiny"
    for part in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (repository / part).mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs" / "config").write_text(json.dumps({"model_type": "llama"}))
    save_file({"a": torch.ones(3)}, repository / "blobs" / "weights")
    (repository / "blobs" / "tokenizer").write_text("{}")
    for name, blob in (("config.json", "config"), ("model.safetensors", "weights"), ("tokenizer.json", "tokenizer")):
        (repository / "snapshots" / COMMIT / name).symlink_to(f"../../blobs/{blob}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return repository


def test_a_cached_repository_opens_without_a_network_at_the_commit_its_branch_stood_for(cache):
    checkpoint = open_checkpoint("acme/tiny")
    assert checkpoint.revision == COMMIT
    assert (checkpoint.source, checkpoint.kind) == ("acme/tiny", "huggingface")
    assert torch.equal(checkpoint.read("a"), torch.ones(3))
    assert [file.name for file in checkpoint.files] == ["tokenizer.json"]
    assert checkpoint.files[0].read() == b"{}"


def test_a_commit_may_be_named(cache):
    assert open_checkpoint("acme/tiny", revision=COMMIT).revision == COMMIT


def test_a_snapshot_that_links_out_of_its_repository_is_refused(cache):
    (cache.parent / "outside").write_text("{}")
    (cache / "snapshots" / COMMIT / "vocab.json").symlink_to(cache.parent / "outside")
    with pytest.raises(SourceError, match=r"vocab\.json lies outside"):
        _ = open_checkpoint("acme/tiny").files


def test_a_repository_that_is_neither_cached_nor_reachable_says_how_to_go_on(cache):
    with pytest.raises(SourceError, match="acme/other is not in the cache and the Hub cannot be reached") as caught:
        open_checkpoint("acme/other")
    assert "local folder" in caught.value.hint
    assert "HF_HUB_OFFLINE" in caught.value.hint


def test_an_existing_folder_wins_over_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "acme").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="acme/tiny does not exist"):
        open_checkpoint("acme/tiny")


def hub_error(kind: type[Exception]) -> Exception:
    """A Hub error as the library raises it, with a response behind it where it needs one."""
    if not issubclass(kind, errors.HfHubHTTPError):
        return kind("no")
    error = kind.__new__(kind)
    Exception.__init__(error, "no")
    return error


@pytest.mark.parametrize(
    ("kind", "fault", "hint"),
    [
        (errors.GatedRepoError, "acme/tiny is gated", "hf auth login"),
        (errors.RepositoryNotFoundError, "neither a path here nor a repository", "HF_TOKEN"),
        (errors.RevisionNotFoundError, "acme/tiny has no revision v9", "branch"),
        (errors.LocalEntryNotFoundError, "cannot be reached", "HF_HUB_OFFLINE"),
        (errors.HFValidationError, "no valid Hub id", "owner/name"),
        (errors.HfHubHTTPError, "could not be fetched", "local folder"),
        (errors.HTTPError, "could not be fetched", "local folder"),
    ],
)
def test_each_refusal_of_the_hub_is_explained(monkeypatch, kind, fault, hint):
    def refuse(*args, **kwargs):
        raise hub_error(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(SourceError, match=fault) as caught:
        open_checkpoint("acme/tiny", revision="v9")
    assert hint in caught.value.hint


def test_only_safetensors_and_small_files_of_the_top_level_are_fetched():
    offered = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
        "LICENSE.txt",
        "chat_template.jinja",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "consolidated.safetensors",
        "original/params.json",
        "onnx/model.safetensors",
        "modeling_x.py",
        "model.gguf",
    ]
    kept = huggingface_hub.utils.filter_repo_objects(
        offered, allow_patterns=list(hub.FETCHED), ignore_patterns=list(hub.REPEATED)
    )
    assert list(kept) == offered[:6]


def test_code_is_fetched_only_when_it_is_trusted(monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: asked.append(k) or f"/cache/{COMMIT}")
    assert hub.snapshot("acme/tiny", None) == (Path("/cache") / COMMIT, COMMIT)
    hub.snapshot("acme/tiny", None, trust_remote_code=True)
    assert ["*.py" in call["allow_patterns"] for call in asked[::2]] == [False, True]
    assert all(call["allow_patterns"] == ["additional_chat_templates/*.jinja"] for call in asked[1::2])


def test_a_page_instead_of_the_hub_is_said(monkeypatch):
    """A network that one has to log in to answers every request with a page."""
    with (
        pytest.raises(SourceError, match="what answered for acme/tiny is not the Hub") as caught,
        hub.asking("acme/tiny"),
    ):
        json.loads("<html>Welcome to our hotel</html>")
    assert "log in to this network" in caught.value.hint


@pytest.mark.parametrize("headers", [{"retry-after": "86400"}, {"ratelimit": '"api";r=0;t=86400'}])
def test_a_hub_that_asks_to_wait_for_a_day_is_not_waited_for(headers):
    with hub.asking("acme/tiny"):
        hooks = huggingface_hub.get_session().event_hooks["response"]
    answer = SimpleNamespace(status_code=429, headers=headers)
    with pytest.raises(SourceError, match="takes no more requests from here for 86,400 seconds"):
        for hook in hooks:
            hook(answer)


@pytest.mark.parametrize(
    ("code", "headers"), [(429, {"retry-after": "60"}), (429, {}), (200, {"ratelimit": "t=86400"})]
)
def test_a_short_wait_is_waited_for(code, headers):
    asking._refuse_long_wait(SimpleNamespace(status_code=code, headers=headers))
