"""The whole model in memory, with its weights decoded, and its tokenizer: what a measurement runs."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING

from outlierq.core.errors import SourceError
from outlierq.core.machine.untrusted import brief, json_object
from outlierq.core.machine.utf8_path import utf8_path
from outlierq.load.decode import unpacked
from outlierq.load.gguf.tokenizer import gguf_tokenizer
from outlierq.load.model.foreign import USUAL, tokenizer_faults
from outlierq.load.model.names import checkpoint_names
from outlierq.load.model.skeleton import build_skeleton, load_tensors_into
from outlierq.load.record import check_recorded

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    from outlierq.core.model import Checkpoint

PROCESSOR_TEMPLATE = "chat_template.json"
PIECE_READERS = {"sentencepiece": "sentencepiece", "protobuf": "google"}  # package -> what is imported of it


def load_model(checkpoint: Checkpoint, *, dtype: str = "float32", device: str = "cpu") -> torch.nn.Module:
    """The model with every parameter from the checkpoint, in eval mode.

    Compressed weights are decoded; inputs of linears and the KV cache are rounded in every forward where the checkpoint
    says so, so that the model computes what a server does. dtype: torch dtype name of the floating-point parameters.
    SourceError for compression formats that cannot be decoded, and for files that are not those that a run of ours
    wrote which the checkpoint came from.
    """
    check_recorded(checkpoint)
    plain = unpacked(checkpoint)
    skeleton = build_skeleton(plain)
    names = checkpoint_names(plain, skeleton)
    load_tensors_into(skeleton, plain, names, dtype=dtype, device=device)
    plain.install(skeleton, names)
    return skeleton


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer of the checkpoint's folder, or the one in the metadata of its GGUF file.

    SourceError when there is none that can be used.
    """
    if checkpoint.kind == "gguf":
        return gguf_tokenizer(checkpoint.path, checkpoint.source)
    from transformers import AutoTokenizer

    _need_reader_of_pieces(checkpoint)
    with tokenizer_faults(checkpoint.source), utf8_path(checkpoint.path) as path:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=checkpoint.trust_remote_code)
    if not tokenizer.chat_template:
        tokenizer.chat_template = _template_of_processor(checkpoint)
    return tokenizer


def _template_of_processor(checkpoint: Checkpoint) -> str | None:
    """The chat template that older models that see keep for their processor alone; None where there is none."""
    path = checkpoint.path / PROCESSOR_TEMPLATE
    if not path.is_file():
        return None
    with tokenizer_faults(checkpoint.source):
        template = json_object(path.read_bytes(), PROCESSOR_TEMPLATE, SourceError).get("chat_template")
    return template if isinstance(template, str) else None


def load_processor(checkpoint: Checkpoint) -> ProcessorMixin:
    """What makes a model's inputs of text and images, from the checkpoint's folder. SourceError when it has none."""
    from transformers import AutoProcessor, ProcessorMixin

    try:
        with utf8_path(checkpoint.path) as path:
            processor = AutoProcessor.from_pretrained(path, trust_remote_code=checkpoint.trust_remote_code)
    except USUAL as error:
        raise SourceError(
            f"the processor of {checkpoint.source} cannot be loaded: {brief(error, 300)}",
            hint="the source must hold preprocessor_config.json or processor_config.json; many need "
            "pip install 'outlierq[vision]'",
        ) from error
    if not isinstance(processor, ProcessorMixin):
        raise SourceError(
            f"{checkpoint.source} holds no processor for images, only a tokenizer",
            hint="put the preprocessor_config.json of the same model beside its weights",
        )
    return processor


def _need_reader_of_pieces(checkpoint: Checkpoint) -> None:
    """SourceError where only SentencePiece could read the tokenizer, and is not installed; transformers names tiktoken
    instead, which cannot read it either."""
    pieces = checkpoint.path / "tokenizer.model"
    if (checkpoint.path / "tokenizer.json").is_file() or not pieces.is_file():
        return
    with pieces.open("rb") as file:
        is_message = file.read(1) == b"\n"  # tag of the first piece; tiktoken's files are lines of text
    if not is_message:
        return
    missing = [name for name, module in PIECE_READERS.items() if find_spec(module) is None]
    if missing:
        raise SourceError(
            f"{checkpoint.source} has its tokenizer as tokenizer.model alone, and {' and '.join(missing)} "
            f"{'are' if len(missing) > 1 else 'is'} not installed, which transformers needs to read it",
            hint=f"pip install {' '.join(missing)}, or put the tokenizer.json of the same model beside it",
        )
    try:
        import sentencepiece.sentencepiece_model_pb2  # noqa: F401, code that asks for the protobuf it was made with
    except Exception as error:  # protobuf raises several kinds, not all of them its own
        versions = ", ".join(f"{name} {version(name)}" for name in PIECE_READERS)
        raise SourceError(
            f"{checkpoint.source} has its tokenizer as tokenizer.model alone, which {versions} do not read together: "
            f"{brief(error, 200)}",
            hint="pip install --upgrade protobuf, or put the tokenizer.json of the same model beside it",
        ) from error
