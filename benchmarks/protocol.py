"""What all runs share: the calibration tokens, and how a compressed model is compared with its original.

Both texts are tokenized as one stream, without special tokens, and cut into windows that do not overlap.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

SEQUENCE_LENGTH = 512
CALIBRATION_SAMPLES = 128
CALIBRATION_TEXT = "wiki.train-excerpt.raw"
TEST_TEXT = "wiki.test.raw"


@dataclass(frozen=True)
class Quality:
    """How far a model is from its original on the test windows; KL and NLL in nats per predicted token."""

    kl: float
    perplexity: float
    reference_perplexity: float
    top1_agreement: float
    windows: int
    predicted_tokens: int


def text_windows(model: Path, text: Path, count: int = 0, length: int = SEQUENCE_LENGTH) -> Tensor:
    """The first `count` windows (0: all) of `text` as `model` tokenizes it: [windows, length] token ids."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False).input_ids
    available = len(ids) // length
    if count > available:
        raise ValueError(f"{text.name} has {available} windows of {length} tokens, {count} were asked for")
    count = count or available
    return torch.tensor(ids[: count * length]).view(count, length)


def test_windows(model: Path, data_dir: Path, count: int) -> Tensor:
    """The windows that models are evaluated on."""
    return text_windows(model, data_dir / TEST_TEXT, count)


def write_calibration(model: Path, data_dir: Path, tokens: Path) -> None:
    """Write the calibration windows of every run as a JSON list of lists, which the peers' scripts read."""
    windows = text_windows(model, data_dir / CALIBRATION_TEXT, CALIBRATION_SAMPLES)
    tokens.write_text(json.dumps(windows.tolist()) + "\n")


def describe_calibration(tokens: Path) -> dict:
    """What the results say of the calibration. tokens: the file of the calibration windows."""
    return {
        "calibration": f"{CALIBRATION_SAMPLES} x {SEQUENCE_LENGTH} tokens of {CALIBRATION_TEXT}",
        "calibration_tokens_sha256": hashlib.sha256(tokens.read_bytes()).hexdigest(),
    }


@torch.no_grad()
def log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    """Log probabilities of each next token: [windows, SEQUENCE_LENGTH - 1, vocabulary]."""
    return torch.log_softmax(model(ids, use_cache=False).logits[:, :-1], dim=-1)


@torch.no_grad()
def compare(reference: nn.Module, candidate: nn.Module, windows: Tensor, batch: int = 2) -> Quality:
    """Run both models over the same windows, side by side, so that no logits are kept.

    KL is KL(reference || candidate), the mean over all predicted tokens.
    """
    kl = nll = reference_nll = agreement = 0.0
    for ids in windows.split(batch):
        expected, actual = log_probabilities(reference, ids), log_probabilities(candidate, ids)
        targets = ids[:, 1:, None]
        nll -= actual.gather(-1, targets).double().sum().item()
        reference_nll -= expected.gather(-1, targets).double().sum().item()
        agreement += (expected.argmax(-1) == actual.argmax(-1)).sum().item()
        kl += nn.functional.kl_div(actual, expected, log_target=True, reduction="sum").item()
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    return Quality(
        kl=kl / tokens,
        perplexity=math.exp(nll / tokens),
        reference_perplexity=math.exp(reference_nll / tokens),
        top1_agreement=agreement / tokens,
        windows=windows.shape[0],
        predicted_tokens=tokens,
    )
