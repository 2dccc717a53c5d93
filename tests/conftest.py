"""Shared fixtures: tiny random Llama folders with a tokenizer (read-only), and the command line as a function."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

# Tiny tensors are slower with several threads; child processes inherit this. The suite itself runs in two processes.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # the few tests with more threads do not take the other process's time

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Few and short windows: enough for a hessian of 64 channels, and quick.
SMALL_CALIBRATION = ("--set", "calibration.samples=6", "--set", "calibration.sequence_length=32")


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of 256 bytes and three special tokens, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )
    wrapped.save_pretrained(folder)


def write_llama(folder: Path, *, dtype: str = "bfloat16", seed: int = 0, shards: str | None = None, **config) -> Path:
    """A random Llama of 2 blocks with 64 channels, as transformers saves it, and files that are only carried along.

    Norm gains are random, so that folding into them is not trivial.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {
        "vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.05,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **config}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, do_sample=True, temperature=0.7)
    model.to(getattr(torch, dtype)).save_pretrained(folder, **({"max_shard_size": shards} if shards else {}))
    write_tokenizer(folder)
    (folder / "LICENSE").write_text("Do as you like.\n")
    (folder / "README.md").write_text("# A tiny model\n")
    return folder


def folder_hashes(folder: Path) -> dict[str, str]:
    """sha256 hex of every file below the folder, by relative name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@contextlib.contextmanager
def unchanged(folder: Path) -> Iterator[Path]:
    """The folder; afterwards it must hold what it held before."""
    before = folder_hashes(folder)
    yield folder
    assert folder_hashes(folder) == before, "a test wrote into a shared folder"


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Every run of a test sees the same random numbers: a failure can be repeated."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def result_cache(tmp_path_factory) -> Path:
    """Measurements are kept for this test run only."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["OUTLIERQ_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def kept_memory() -> None:
    """This process keeps what is freed: to give back pages of a heap that thousands of tests have used takes longer
    than a tiny model. What a run needs is held in processes of its own."""
    from outlierq.core.machine import heap

    os.register_at_fork(after_in_child=gc.freeze)  # nor does a child walk through all that its parent holds
    heap.return_freed_memory.__code__ = (lambda: None).__code__
    heap.return_memory_at_once.__code__ = (lambda least=0: None).__code__


@pytest.fixture(scope="session", autouse=True)
def embedded_tokens() -> None:
    """Each tokenizer cuts the Python language reference into tokens once: a tiny calibration hardly takes as long."""
    from outlierq.calibrate.text import windows as text
    from outlierq.calibrate.text.embedded import EMBEDDED

    made, original = {}, text._token_stream

    def stream(tokenizer, source, chat_template, left_out, begin):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or chat_template or source.path != EMBEDDED:
            return original(tokenizer, source, chat_template, left_out, begin)
        key = (backend.to_str(), source.split)
        if key not in made:
            made[key] = list(original(tokenizer, source, chat_template, left_out, begin))
        return iter(made[key])

    text._token_stream = stream


@pytest.fixture(scope="session", autouse=True)
def evaluated_windows() -> None:
    """Nor does it cut the text that models are measured on more than once."""
    from outlierq.evaluate import divergence

    made, original = {}, divergence.text_windows

    def text_windows(tokenizer, text, *asked, **named):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or len(text) < 100_000:
            return original(tokenizer, text, *asked, **named)
        key = (backend.to_str(), text, repr((asked, named)))
        if key not in made:
            made[key] = original(tokenizer, text, *asked, **named)
        return made[key].clone()

    divergence.text_windows = text_windows


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Iterator[Path]:
    """Tied embeddings, bfloat16, one weight file. Read-only."""
    with unchanged(write_llama(tmp_path_factory.mktemp("models") / "tiny-llama")) as folder:
        yield folder


@pytest.fixture(scope="session")
def untied_llama(tmp_path_factory) -> Iterator[Path]:
    """A head of its own, float32, biases, 3 blocks, several weight files. Read-only."""
    folder = tmp_path_factory.mktemp("models") / "untied-llama"
    options = {"tie_word_embeddings": False, "attention_bias": True, "num_hidden_layers": 3}
    with unchanged(write_llama(folder, dtype="float32", seed=1, shards="200KB", **options)):
        yield folder


@pytest.fixture
def llama_copy(tiny_llama, tmp_path) -> Path:
    """A copy of the tiny model that a test may damage."""
    import shutil

    return Path(shutil.copytree(tiny_llama, tmp_path / "damaged-llama"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A running Hub on loopback, a token for it, an empty cache, and no waiting between attempts to reach it."""
    import time

    from hub_stand_in import TOKEN, serving
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    impatient = SimpleNamespace(**{**vars(time), "sleep": lambda _seconds: None})
    with serving() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(_http, "time", impatient)
        monkeypatch.setattr(file_download, "time", impatient)
        yield running


@dataclass(frozen=True)
class Answer:
    """What a command said: exit code, stdout and stderr."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def built_command() -> None:
    """Typer makes the whole tree of commands anew each time one is called: longer than most commands take here."""
    import typer.main

    typer.main.get_command = functools.lru_cache(typer.main.get_command)


@pytest.fixture
def outlierq(built_command, capsys, monkeypatch) -> Callable[..., Answer]:
    """The command line in this process: `outlierq("plan", folder)` gives an `Answer`."""
    from outlierq.cli.main import _run as run  # `run` leaves the process
    from outlierq.cli.streams import Streams

    monkeypatch.delenv("OUTLIERQ_DEBUG", raising=False)

    def call(*words: object) -> Answer:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["outlierq", *map(str, words)])
        code = 0
        streams = Streams()
        try:
            run()
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            streams.restore()
        said = capsys.readouterr()
        return Answer(code, said.out, said.err)

    return call


@pytest.fixture
def small() -> tuple[str, ...]:
    """Options for a quick calibration."""
    return SMALL_CALIBRATION


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    """`write_llama` and `folder_hashes`, for tests that need models or comparisons of their own."""
    return SimpleNamespace(write_llama=write_llama, folder_hashes=folder_hashes, write_tokenizer=write_tokenizer)
