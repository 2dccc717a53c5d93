"""`eval --backend llama.cpp`: which tokens are scored, and what is said where llama.cpp is not there.

llama.cpp is stood in for by a module whose logits are known; the real one is asked in tests/clients.
"""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from test_gguf_frame import write

import outlierq
from outlierq.core.errors import ArgumentError, OutlierqError, SourceError

WORDS = 50
STAND_IN = f'''
import numpy as np
__version__ = "0.0"

class Llama:
    """Its tokens are the words of a text; the logits of a position depend on the token there, and on the file."""

    def __init__(self, path, **options):
        self.seed, self.options = len(path), options
        if "broken" in path:
            raise ValueError("Failed to load model")

    def tokenize(self, text, add_bos, special):
        return [1] * add_bos + [3 + int(word) for word in text.split() if word.isdigit()]

    def token_bos(self):
        return 1

    def reset(self):
        self.scores = None

    def eval(self, ids):
        table = np.random.default_rng(self.seed).standard_normal(({WORDS} + 3, {WORDS} + 3)).astype(np.float32)
        self.scores = table[np.array(ids)]

    def close(self):
        pass
'''


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "llama_cpp.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    importlib.invalidate_caches()
    yield
    sys.modules.pop("llama_cpp", None)


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(str(number * 7 % WORDS) for number in range(100)))
    return path


def log_softmax(scores: np.ndarray) -> np.ndarray:
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def table(file: Path) -> np.ndarray:
    return np.random.default_rng(len(str(file))).standard_normal((WORDS + 3, WORDS + 3)).astype(np.float32)


def test_the_second_half_of_each_window_is_scored_behind_a_begin_of_text(stand_in, text, tmp_path):
    one, other = write(tmp_path / "a.gguf"), write(tmp_path / "ab.gguf")
    found = outlierq.evaluate(
        str(one), str(other), backend="llama.cpp", text=str(text), windows=3, window_length=16, cached=False
    )
    stream = [1] + [3 + number * 7 % WORDS for number in range(100)]
    windows = [[1, *stream[start + 1 : start + 16]] for start in (0, 16, 32)]
    nll, kl, same = [], [], []
    for window in windows:
        for place in range(8, 15):
            mine, theirs = (log_softmax(table(file)[window[place]].astype("f8")) for file in (one, other))
            nll.append(-mine[window[place + 1]])
            kl.append((np.exp(theirs) * (theirs - mine)).sum())
            same.append(mine.argmax() == theirs.argmax())
    assert found["divergence"]["tokens"] == len(nll) == 21
    assert math.isclose(found.perplexity, math.exp(np.mean(nll)), rel_tol=1e-5)
    assert math.isclose(found.kl, np.mean(kl), rel_tol=1e-4) and found.top1 == np.mean(same)
    assert "second half" in found["conditions"]["scored"] and found["versions"]["llama-cpp-python"] == "0.0"


def test_without_llama_cpp_the_line_that_installs_it_is_said(tmp_path):
    with pytest.raises(OutlierqError, match="llama-cpp-python is not installed") as caught:
        outlierq.evaluate(str(write(tmp_path / "a.gguf")), backend="llama.cpp")
    assert "pip install llama-cpp-python" in str(caught.value.hint)


def test_what_llama_cpp_cannot_run_is_said(stand_in, text, tmp_path, tiny_llama):
    with pytest.raises(SourceError, match="is no GGUF file"):
        outlierq.evaluate(str(tiny_llama), backend="llama.cpp")
    with pytest.raises(SourceError, match=r"does not load broken\.gguf"):
        outlierq.evaluate(str(write(tmp_path / "broken.gguf")), backend="llama.cpp", text=str(text))
    with pytest.raises(OutlierqError, match="5 windows of 512 need 2560"):
        outlierq.evaluate(str(write(tmp_path / "a.gguf")), backend="llama.cpp", text=str(text), windows=5)
    with pytest.raises(ArgumentError, match="own kernels"):
        outlierq.evaluate(str(tmp_path / "a.gguf"), backend="llama.cpp", runtime="packed")
