"""What every client is asked, how it is asked, and what the same checkpoint says when its weights are dequantized.

A job is JSON: `folder` (checkpoint), `prompt` (token ids), `new_tokens` (continue greedily by so many), `windows`
(lists of token ids to score), `options` (keywords for the client). A client answers in JSON: `client` (name and
version), `tokens` (the continuation), `losses` (per window the negative log-likelihood in nats of tokens 1, 2, ...),
and how its linears are called where it says so. Each client runs in an environment and a process of its own.
llama.cpp also answers to `texts` with `ids`: what its own tokenizer makes of each, and to `logits` (lists of token ids)
with `logits`; the option `exact` keeps its cache in float32.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

PROMPT = "The capital of France is"
NEW_TOKENS = 24
WINDOWS, WINDOW_LENGTH = 20, 512
SCRIPTS = Path(__file__).parent
REPOSITORY = SCRIPTS.parents[1]

# Client -> (its environment below the clients' folder, None for our own; the script that runs inside).
CLIENTS = {
    "transformers": (None, "run_transformers.py"),
    "bitsandbytes": ("bitsandbytes", "run_transformers.py"),
    "gptqmodel": ("gptqmodel", "run_transformers.py"),
    "vllm": ("vllm", "run_vllm.py"),
    "llama.cpp": ("llama-cpp", "run_llama_cpp.py"),
}


@dataclass(frozen=True)
class Answer:
    """What a client said. losses: [windows, window length - 1] nats. linears: class names and how many of each."""

    client: str
    tokens: list[int]
    losses: np.ndarray
    linears: dict[str, int] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """Of all scored tokens."""
        return math.exp(self.losses.mean())


def home() -> Path:
    """Where the clients' environments are; `OUTLIERQ_CLIENTS` says otherwise."""
    return Path(os.environ.get("OUTLIERQ_CLIENTS", REPOSITORY / ".clients")).absolute()


def python_of(client: str) -> Path:
    """The interpreter that has the client."""
    environment, _ = CLIENTS[client]
    return Path(sys.executable) if environment is None else home() / environment / "bin" / "python"


class Refused(Exception):
    """A client stopped without an answer; the message is the end of what it printed."""


def ask(
    client: str,
    folder: Path,
    work: Path,
    *,
    count: int = WINDOWS,
    environment: Mapping[str, str] = MappingProxyType({}),
    **options: Any,
) -> Answer:
    """Let a client load a checkpoint, continue the prompt and score the first `count` windows, or raise `Refused`.

    environment: variables for the client's process.
    """
    prompt, windows = questions()
    asked = {"folder": str(folder.absolute()), "prompt": prompt, "new_tokens": NEW_TOKENS, "windows": windows[:count]}
    answer = run_job(client, {**asked, "options": options}, work, environment)
    return Answer(answer["client"], answer["tokens"], np.array(answer["losses"]), answer.get("linears", {}))


def run_job(
    client: str, asked: dict[str, Any], work: Path, variables: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    """The answer of a client to a job, or `Refused`."""
    python, script = python_of(client), SCRIPTS / CLIENTS[client][1]
    assert python.exists(), f"{client} is not installed in {home()}: run scripts/install_clients.sh"
    assert Path(asked["folder"]).exists(), f"there is no checkpoint {asked['folder']}"
    job, out = work / "job.json", work / "answer.json"
    job.write_text(json.dumps(asked))
    out.unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", **variables}
    log = work / "log.txt"
    with log.open("w") as said:
        done = subprocess.run([python, script, job, out], stdout=said, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-100:])
        name = Path(asked["folder"]).name
        raise Refused(f"{client} stopped with code {done.returncode} on {name}:\n{last}")
    return json.loads(out.read_text())


@cache
def questions() -> tuple[list[int], list[list[int]]]:
    """The prompt and the windows as token ids of SmolLM2. The text is what every Python carries, its held-out part."""
    from outlierq.calibrate.text.embedded import embedded_text
    from outlierq.evaluate.divergence import text_windows

    tokenizer = smollm2_tokenizer()
    windows = text_windows(tokenizer, embedded_text("evaluation", "embedded"), WINDOW_LENGTH, WINDOWS)
    return tokenizer(PROMPT, add_special_tokens=False)["input_ids"], windows.tolist()


@cache
def smollm2_tokenizer() -> Any:
    """The tokenizer in the metadata of the model that the demo uses."""
    from outlierq.load import load_tokenizer, open_checkpoint
    from outlierq.pipeline.demo import default_model

    return load_tokenizer(open_checkpoint(default_model()))


class Dequantized:
    """A checkpoint with its weights decoded by outlierq; inputs and cache are rounded where it says so.

    count: it scores so many of the windows.
    """

    def __init__(self, folder: Path, dtype: str = "float32", count: int = WINDOWS):
        import torch

        from outlierq.load import load_model, open_checkpoint

        torch.set_num_threads(1)
        file = folder / "model.gguf"
        self._folder, self._count = folder, count
        self._model = load_model(open_checkpoint(str(file if file.exists() else folder)), dtype=dtype).eval()

    @cached_property
    def losses(self) -> np.ndarray:
        """As `Answer.losses`."""
        import torch

        rows = []
        with torch.inference_mode():
            for window in questions()[1][: self._count]:
                ids = torch.tensor([window])
                logits = self._model(ids).logits[0, :-1].float()
                rows.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
        return torch.stack(rows).double().numpy()

    @cached_property
    def in_bfloat16(self) -> Dequantized:
        """The same weights in the arithmetic of the clients."""
        return Dequantized(self._folder, "bfloat16", self._count)

    @cached_property
    def arithmetic(self) -> float:
        """What bfloat16 alone changes: the mean |difference| of a token's loss, nats."""
        return float(np.abs(self.in_bfloat16.losses - self.losses).mean())

    def regrets(self, tokens: list[int]) -> np.ndarray:
        """How many nats each token of a continuation lies below the most likely one, given those before it."""
        import torch

        prompt, _ = questions()
        with torch.inference_mode():
            logits = self._model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        return (logits.amax(dim=1) - chosen).numpy()


@dataclass(frozen=True)
class Agreement:
    """A client beside the dequantized model.

    ratio: of perplexities. typical: mean |difference| of a token's loss, nats. large: the difference that 1 % of the
    tokens exceed. regret: the largest of the continuation, nats. same_tokens: of the continuation, before the first
    that the dequantized model would not have chosen.
    """

    perplexity: float
    reference: float
    ratio: float
    typical: float
    large: float
    regret: float
    same_tokens: int


def agreement(answer: Answer, model: Dequantized) -> Agreement:
    """Compare an answer with the dequantized model. A token that it chooses in either arithmetic is its own."""
    expected = model.losses[: len(answer.losses)]
    difference = np.abs(answer.losses - expected)
    reference = math.exp(expected.mean())
    regrets = np.minimum(model.regrets(answer.tokens), model.in_bfloat16.regrets(answer.tokens))
    differing = np.flatnonzero(regrets > 0)
    return Agreement(
        perplexity=answer.perplexity,
        reference=reference,
        ratio=answer.perplexity / reference,
        typical=float(difference.mean()),
        large=float(np.quantile(difference, 0.99)),
        regret=float(regrets.max()),
        same_tokens=int(differing[0]) if len(differing) else len(regrets),
    )
