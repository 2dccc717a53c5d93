"""A Hugging Face folder as a `Checkpoint`: config.json, safetensors in one file or in indexed shards, small files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from outlierq.core.dtypes import DTYPES
from outlierq.core.errors import SourceError
from outlierq.core.machine.untrusted import LARGEST_JSON, brief, json_object
from outlierq.core.model import CarriedFile, Checkpoint, TensorInfo
from outlierq.load.source.carried import PLACES, carried_names, left_behind, without_places
from outlierq.load.source.fingerprint import fingerprint
from outlierq.load.source.shards import (
    AGAIN,
    StoredTensor,
    lookup,
    open_plain,
    read_header,
    read_rows,
    read_some_rows,
    read_stored,
    sample,
    stored_digest,
)
from outlierq.load.source.unchanged import stamps_of

if TYPE_CHECKING:
    import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Pickle runs code when it is opened, so these are never read.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

LARGEST_CONFIG = 10_000_000  # bytes; real ones have a few thousand

FLOATS = ("float32", "float16", "bfloat16")

# Every tensor of the weight file with this name.
HeaderReader = Callable[[str], dict[str, StoredTensor]]


class FolderCheckpoint(Checkpoint):
    """A folder in Hugging Face layout.

    path: the folder. revision: commit of the Hub snapshot, None for a local folder. All headers are read and checked
    here; weights are read by `read` and `read_many`.
    """

    kind, reads_rows = "huggingface", True

    def __init__(self, path: Path, *, source: str | None = None, revision: str | None = None):
        self.path, self.revision = path, revision
        self.source = source or str(path)
        self._config_bytes = _config_bytes(path)
        self.config: dict[str, Any] = json_object(self._config_bytes, "config.json", SourceError, hint=AGAIN)
        _check_quantization(self.config)
        self._stored = _stored_tensors(path, self._names(), self._header)
        self.stamps = stamps_of(self.weight_files)
        self.bytes_read: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {name: stored.info for name, stored in self._stored.items()}
        self.dtype = _dtype(self.config, self.tensors.values())

    @cached_property
    def files(self) -> tuple[CarriedFile, ...]:
        """What belongs to the model beside its weights and config.json: see `outlierq.load.source.carried`."""
        return tuple(_carried_file(self.path, name) for name in carried_names(self.path))

    @cached_property
    def left_behind(self) -> tuple[str, ...]:
        """What else lies in the folder, hidden files left out; folders with a slash."""
        ours = {path.name for path in self.weight_files} | {SINGLE, INDEX, "config.json"}
        return left_behind(self.path, ours)

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 hex, see `outlierq.load.source.fingerprint`."""
        return fingerprint([self._config_bytes], self.tensors, self._sample)

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors files, in the order of the tensors."""
        return list(dict.fromkeys(stored.path for stored in self._stored.values()))

    def read(self, name: str) -> torch.Tensor:
        """The tensor as stored, in the shape of its header, in fresh memory on the CPU."""
        return self.read_many([name])[name]

    def read_many(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Several tensors, each in the shape of its header; each shard is opened once."""
        return dict(read_stored(self._stored, names, self._open, self.bytes_read))

    def read_rows(self, name: str, count: int) -> Iterator[torch.Tensor]:
        """The tensor `count` rows at a time, [count, ...] each; a piece is valid until the next is asked for."""
        return read_rows(lookup(self._stored, name), count, self._open, self.bytes_read)

    def read_some_rows(self, name: str, rows: Iterable[int]) -> torch.Tensor:
        """Some rows of the tensor, [len(rows), ...], in the given order."""
        if name not in self.bytes_read:  # a sample of rows would not tell two tensors apart
            self.bytes_read[name] = self.digest(name)
        return read_some_rows(lookup(self._stored, name), rows, self._open)

    def digest(self, name: str) -> str:
        """XXH3-128 of the tensor's bytes as they are now, as hex."""
        stored = lookup(self._stored, name)
        return stored_digest(name, stored.path, stored.start, stored.info.nbytes, self._open)

    def _names(self) -> Collection[str]:
        """The files that there are."""
        return sorted(entry.name for entry in self.path.iterdir())

    def _header(self, name: str) -> dict[str, StoredTensor]:
        """Every tensor of one weight file."""
        return read_header(_regular(self.path, name))

    def _open(self, path: Path) -> BinaryIO:
        """A weight file, to read tensors from."""
        return open_plain(path)

    def _sample(self, names: list[str], length: int) -> Iterator[tuple[str, bytes]]:
        in_order = sorted(
            (lookup(self._stored, name) for name in names), key=lambda stored: (stored.path, stored.start)
        )
        return sample(
            ((stored.info.name, stored.path, stored.start, stored.info.nbytes) for stored in in_order), length
        )


def inside(folder: Path, name: str) -> Path:
    """The real path of a file of the folder; SourceError when a path or a symlink leads out of it.

    In a Hub cache the files of a snapshot are links to the blobs of the same repository; those are let through.
    """
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    try:
        real = (folder / name).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a name with a NUL or too long, a link in a circle
        raise SourceError(f"{name!r} is no file name in the checkpoint folder: {error}") from error
    if Path(name).is_absolute() or not any(real.is_relative_to(home) for home in allowed):
        raise SourceError(
            f"{name} lies outside of the checkpoint folder: it leads to {real}",
            hint="copy the file into the folder; links and paths that leave it are not followed",
        )
    return real


def _check_quantization(config: dict[str, Any]) -> None:
    """SourceError when what the config says of a compression is no set of settings."""
    said = config.get("quantization_config")
    if said is not None and not isinstance(said, dict):
        raise SourceError(
            f"quantization_config in config.json is {brief(said)}, not an object with settings",
            hint="remove it when the weights are plain, or get the checkpoint's own config.json",
        )


def _config_bytes(folder: Path) -> bytes:
    """The bytes of config.json; SourceError when there is none."""
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        raise SourceError(
            f"{folder} has no config.json",
            hint="this is an adapter: merge it into its base model first" if adapter else _folder_hint(folder),
        )
    return small_bytes(folder, "config.json", LARGEST_CONFIG)


def small_bytes(folder: Path, name: str, largest: int) -> bytes:
    """The bytes of a file that should not be large."""
    path = inside(folder, name)
    try:
        size = path.stat().st_size
        if size > largest:
            raise SourceError(f"{name} has {size} bytes; more than {largest} are not read")
        return path.read_bytes()
    except OSError as error:
        raise SourceError(f"{name} cannot be read: {error.strerror or error}") from error


def _folder_hint(folder: Path) -> str:
    """What to try when the folder is not a checkpoint."""
    gguf = sorted(entry.name for entry in folder.iterdir() if entry.suffix == ".gguf")
    if gguf:
        return f"name the GGUF file itself: {folder / gguf[0]}"
    nested = sorted(entry.parent.name for entry in folder.glob("*/config.json"))
    if nested:
        return f"did you mean {folder / nested[0]}?"
    return "give a folder that holds config.json and *.safetensors, a .gguf file, or a Hub id owner/name"


def _carried_file(folder: Path, name: str) -> CarriedFile:
    """A file of the folder; one with settings without the paths of the machine that wrote it."""
    path = inside(folder, name)
    if name.endswith("config.json"):
        content = small_bytes(folder, name, LARGEST_CONFIG)
        if any(place.encode() in content for place in PLACES):
            values = without_places(json_object(content, name, SourceError, hint=AGAIN))
            return CarriedFile(name, content=(json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())
    return CarriedFile(name, path=str(path))


def _stored_tensors(folder: Path, names: Collection[str], header: HeaderReader) -> dict[str, StoredTensor]:
    """Every tensor of the folder. One file wins over an index, as in transformers. names: the files that there are."""
    if SINGLE in names:
        return header(SINGLE)
    if INDEX in names:
        return _indexed(folder, names, header)
    lone = sorted(name for name in names if name.endswith(".safetensors"))
    if len(lone) == 1 and not lone[0].startswith("adapter"):
        return header(lone[0])
    if lone:
        raise SourceError(
            f"{folder} holds {len(lone)} safetensors files ({', '.join(lone[:3])}) but no {INDEX} to say which belong",
            hint="restore the index, or merge an adapter into its base model",
        )
    raise _no_weights(folder, names)


def _regular(folder: Path, name: str) -> Path:
    """The path of a file of the folder; a pipe would be waited for without end."""
    path = inside(folder, name)
    if not path.is_file():
        raise SourceError(f"{name} in {folder} is not a file")
    return path


def _no_weights(folder: Path, names: Collection[str]) -> SourceError:
    """The refusal of a folder without safetensors."""
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickles:
        return pickle_refusal(pickles[0])
    return SourceError(f"{folder} has a config.json but no weights ({SINGLE} or {INDEX})", hint=_folder_hint(folder))


def pickle_refusal(name: str) -> SourceError:
    """The refusal of a pickled checkpoint."""
    return SourceError(
        f"{name} is a pickle: opening it can run any code, so it is not read",
        hint="convert it to safetensors: load it with transformers in a place you trust and call save_pretrained",
    )


def _indexed(folder: Path, names: Collection[str], header: HeaderReader) -> dict[str, StoredTensor]:
    """The tensors of all shards, with the index held against what the shards say themselves."""
    weight_map = _weight_map(folder)
    stored: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        path = inside(folder, shard)
        if shard not in names and not path.is_file():
            raise SourceError(f"{INDEX} names {shard}, which is not in {folder}", hint="download the missing shard")
        for name, tensor in header(shard).items():
            if name in stored:
                raise SourceError(f"tensor {name} is in two shards: {stored[name].path.name} and {shard}")
            if weight_map.get(name) != shard:
                said = weight_map.get(name)
                told = f"the index puts it into {said}" if said else "the index does not name it"
                raise SourceError(f"tensor {name} is in {shard}, but {told}", hint="rebuild or download the index")
            stored[name] = tensor
    lost = sorted(weight_map.keys() - stored.keys())
    if lost:
        raise SourceError(
            f"{INDEX} puts {lost[0]} into {weight_map[lost[0]]}, which does not hold it ({len(lost)} such tensors)",
            hint="rebuild or download the index",
        )
    return stored


def _weight_map(folder: Path) -> dict[str, str]:
    """The index's map from tensor name to shard name."""
    _regular(folder, INDEX)
    index = json_object(small_bytes(folder, INDEX, LARGEST_JSON), INDEX, SourceError, hint=AGAIN)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{INDEX} has no weight_map", hint=AGAIN)
    strange = [name for name, shard in weight_map.items() if not isinstance(shard, str)]
    if strange:
        raise SourceError(f"{INDEX} gives no file name for {strange[0]}", hint=AGAIN)
    wrong = sorted(shard for shard in set(weight_map.values()) if not shard.endswith(".safetensors"))
    if wrong:
        raise pickle_refusal(wrong[0]) if wrong[0].endswith(PICKLES) else SourceError(f"{INDEX} names {wrong[0]}")
    return weight_map


def _dtype(config: dict[str, Any], tensors: Iterable[TensorInfo]) -> str:
    """The dtype of use: what the config says, else the one most matrix bytes are stored in, else bfloat16."""
    for place in (config, config.get("text_config")):
        if isinstance(place, dict):
            said = str(place.get("dtype") or place.get("torch_dtype") or "").removeprefix("torch.")
            if said in FLOATS:
                return said
    stored: Counter[str] = Counter()
    for info in tensors:
        name = DTYPES[info.dtype][0]
        if name in FLOATS:
            stored[name] += info.nbytes
    return stored.most_common(1)[0][0] if stored else "bfloat16"
