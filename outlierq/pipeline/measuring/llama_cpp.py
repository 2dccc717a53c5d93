"""Measuring a GGUF file with llama.cpp itself, through llama-cpp-python, as its own `llama-perplexity` counts.

The text is one stream of tokens of the file's tokenizer, cut into windows; each begins with the begin-of-text token
where the file asks for one, in place of its first token. Of every window the second half is scored, so that each token
has at least half a window before it. The reference is another GGUF file, which llama.cpp runs, too, or a Hugging Face
model on the same token ids, which transformers runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, closing
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from outlierq.core.errors import ArgumentError, OutlierqError, SourceError
from outlierq.core.report import Evaluation
from outlierq.pipeline.asked.events import Event
from outlierq.pipeline.asked.request import Source, is_gguf
from outlierq.pipeline.asked.resources import USUAL, Resources
from outlierq.pipeline.measuring.measure import RESULTS_VERSION, Measurement, versions
from outlierq.pipeline.measuring.models import evaluation_text, load_for_evaluation

if TYPE_CHECKING:
    import torch

PACKAGE = "llama-cpp-python"
INSTALL = f"pip install {PACKAGE}"


def measure_with_llama_cpp(
    source: Source, reference: Source | None, measurement: Measurement, resources: Resources = USUAL
) -> Evaluation:
    """Perplexity of a GGUF file, and KL divergence and top-1 agreement with a reference.

    OutlierqError with the line that installs it where llama-cpp-python is missing.
    """
    from outlierq.evaluate.divergence import measure_scores

    if find_spec("llama_cpp") is None:
        raise OutlierqError(f"{PACKAGE} is not installed, through which llama.cpp runs", hint=INSTALL)
    if measurement.tasks:
        raise ArgumentError("llama.cpp answers no tasks here; leave --tasks out", argument="tasks")
    path = file_of(source)
    content, text_name = evaluation_text(measurement.text)
    length = measurement.window_length
    with ExitStack() as stack:
        model = stack.enter_context(closing(_Model(path, length)))
        beside = None if reference is None else stack.enter_context(closing(_opened(reference, measurement)))
        windows = _windows(model, content, measurement)
        scored = _scored(model, beside, windows, length // 2, resources)
        figures = measure_scores(scored, length)
    return Evaluation(
        {
            "results_version": RESULTS_VERSION,
            "model": source.name,
            "reference": None if reference is None else reference.name,
            "text": text_name,
            "text_sha256": hashlib.sha256(content.encode()).hexdigest(),
            "dtype": "float32",
            "device": "cpu",
            "runtime": "llama.cpp",
            "conditions": {
                "backend": "llama.cpp",
                "windows": len(windows),
                "window_length": length,
                "scored": "the second half of each window, as llama-perplexity counts",
            },
            "versions": versions() | {PACKAGE: model.version},
            "divergence": figures.to_dict(),
            "from_cache": [],
        }
    )


def file_of(source: Source) -> Path:
    """The GGUF file that a source is, or the only one in its folder. SourceError where there is none."""
    path = Path(source.name).expanduser()
    files = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    if len(files) != 1 or not is_gguf(files[0]):
        raise SourceError(f"{source.name} is no GGUF file, and llama.cpp runs nothing else", hint="name a .gguf file")
    return files[0]


class _Model:
    """A GGUF file in llama.cpp. SourceError where llama.cpp does not load it."""

    def __init__(self, path: Path, length: int):
        import llama_cpp
        import torch

        self.version = str(llama_cpp.__version__)
        self._path, threads = path, torch.get_num_threads()
        try:
            self._model = llama_cpp.Llama(
                str(path), n_ctx=length, n_batch=length, n_threads=threads, logits_all=True, verbose=False
            )
        except ValueError as error:
            raise SourceError(f"llama.cpp does not load {path.name}: {error}") from error

    def tokens(self, text: str) -> list[int]:
        """Ids of a text, with a begin of text where the file asks for one."""
        return [int(number) for number in self._model.tokenize(text.encode(), add_bos=True, special=False)]

    @property
    def begin(self) -> int | None:
        """The begin-of-text token, where the file asks for one."""
        first = self.tokens("a")[:1]
        return first[0] if first == [self._model.token_bos()] else None

    def scores(self, ids: list[int]) -> torch.Tensor:
        """Logits [length, vocabulary]."""
        import torch

        self._model.reset()
        self._model.eval(ids)
        return torch.from_numpy(self._model.scores[: len(ids)].copy())

    def close(self) -> None:
        """Give its memory back."""
        self._model.close()


class _Transformers:
    """A Hugging Face model as the reference."""

    def __init__(self, source: Source, dtype: str):
        self._model = load_for_evaluation(source.open(), dtype=dtype).eval()

    def scores(self, ids: list[int]) -> torch.Tensor:
        """Logits [length, vocabulary]."""
        import torch

        with torch.inference_mode():
            logits: torch.Tensor = self._model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        return logits

    def close(self) -> None:
        """Nothing: it goes with the object."""


def _opened(reference: Source, measurement: Measurement) -> _Model | _Transformers:
    """What computes the reference's logits."""
    path = Path(reference.name).expanduser()
    if is_gguf(path):
        return _Model(path, measurement.window_length)
    return _Transformers(reference, measurement.dtype)


def _windows(model: _Model, text: str, measurement: Measurement) -> list[list[int]]:
    """The windows of the text."""
    stream, length, begin = model.tokens(text), measurement.window_length, model.begin
    count = len(stream) // length if measurement.windows is None else measurement.windows
    if count < 1 or count * length > len(stream):
        raise OutlierqError(
            f"the text has {len(stream)} tokens; {max(count, 1)} windows of {length} need {max(count, 1) * length}",
            hint="use a longer text, shorter windows, or fewer of them",
        )
    windows = [stream[start : start + length] for start in range(0, count * length, length)]
    return windows if begin is None else [[begin, *window[1:]] for window in windows]


def _scored(
    model: _Model, reference: _Model | _Transformers | None, windows: list[list[int]], first: int, resources: Resources
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]]:
    """(logits, the reference's or None, true tokens) of the scored positions of each window."""
    import torch

    for number, window in enumerate(windows):
        resources.listen(Event("evaluate", number, len(windows), "llama.cpp"))
        beside = None if reference is None else reference.scores(window)[first:-1].float()
        yield model.scores(window)[first:-1], beside, torch.tensor(window[first + 1 :])
