"""The statistics folder: `stats.json`, a safetensors file a block, and one of final logits; a killed run can go on.

Until `finish`, the list of blocks is in `unfinished.json`; its last act is to give that file its final name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from outlierq import __version__
from outlierq.calibrate.stored.stats_list import check_list, input_stats, value_of
from outlierq.core.errors import OutputError, StatsError
from outlierq.core.machine.own_files import PART, foreign, remove_files, sync_names, write_atomically
from outlierq.core.machine.printable import whole_characters
from outlierq.core.machine.untrusted import checked, json_value
from outlierq.core.machine.utf8_path import utf8_path
from outlierq.core.measured.block_stats import BlockStats
from outlierq.core.measured.logits import LogitSample
from outlierq.core.measured.sensitivity import Sensitivity
from outlierq.core.model import Fold, InputGroup, LinearSite
from outlierq.core.stats import InputStats

# 2: histograms, top tokens, block statistics and logits. 3: the tokenizer, and digests of the weights that were read.
FORMAT_VERSION = 3
FINISHED = "stats.json"
UNFINISHED = "unfinished.json"
LOGITS = "logits.safetensors"
SENSITIVITY = "sensitivity.safetensors"
# Every other name that a run gives a file here.
OWN_NAME = re.compile(r"(block|hidden-states)-\d+\.safetensors|(logits|sensitivity)\.safetensors|own-text\.json")


@dataclass(frozen=True)
class StatsIdentity:
    """What the statistics belong to; equal identities give equal statistics.

    model_fingerprint: of the checkpoint. token_fingerprint, token_description: of the token set. settings: plain JSON
    values of everything else that matters (needs, skipped tokens, dtype, seed, ...). mode: "static" or "sequential".
    tokenizer: a digest of it.
    """

    model_fingerprint: str
    token_fingerprint: str
    token_description: str
    settings: dict[str, Any]
    mode: str = "static"
    tokenizer: str = ""

    def to_json(self) -> dict[str, Any]:
        """Values as they come back from JSON, so that identities can be compared."""
        values: dict[str, Any] = json.loads(json.dumps(whole_characters(asdict(self))))
        return values


class StatsWriter:
    """Writes statistics block by block; blocks that an earlier run with the same identity wrote are kept.

    Tensors have the shapes of `InputStats`, `BlockStats` and `LogitSample`. OutputError when the folder holds something
    else, or the statistics of another model, text or setting. read: digests of the weights that the written blocks were
    made of, as `Checkpoint.bytes_read`. stamps: of the model's files now; former_stamps: as they were when the list was
    written last: None for new statistics, nothing for finished ones, which do not know the files. calibration: the
    settings, for the reports of runs that use them.
    """

    def __init__(
        self,
        folder: str | Path,
        identity: StatsIdentity,
        stamps: Mapping[str, list[int]] = MappingProxyType({}),
        calibration: Mapping[str, Any] = MappingProxyType({}),
    ):
        self.folder, self.identity, self.stamps = Path(folder), identity, dict(stamps)
        self.calibration = dict(calibration)
        self.read: dict[str, str] = {}
        self.former_stamps: dict[str, list[int]] | None = None
        self.blocks: dict[int, dict[str, Any]] = {}
        self.logits: dict[str, Any] | None = None
        self.sensitivity: dict[str, Any] | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make the folder {self.folder}: {error.strerror or error}") from error
        self._resume()

    @property
    def done(self) -> frozenset[int]:
        """Indices of the blocks that are written and verified."""
        return frozenset(self.blocks)

    def write(
        self,
        index: int,
        groups: Sequence[InputGroup],
        stats: Mapping[str, InputStats],
        block_stats: BlockStats | None = None,
        notes: Sequence[str] = (),
        read: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Write one block. stats: by group name; a group may have none (a site that is never called).

        notes: what was unusual about it. read: digests of all weights that were read so far. Tensors are named
        "group/field"; those of the block itself "/field".
        """
        tensors = {
            f"{name}/{field}": value
            for name, group_stats in stats.items()
            for field, value in group_stats.tensors().items()
        }
        if block_stats:
            tensors |= {f"/{field}": value for field, value in block_stats.tensors().items()}
        file = self._write_tensors(f"block-{index:05d}.safetensors", tensors)
        self.blocks[index] = {
            "index": index,
            **file,
            "groups": [_group_to_json(group, stats) for group in groups],
            "output_names": block_stats.output_names if block_stats else (),
            "notes": list(notes),
            "read": self._new(read),
        }
        self._write_list()

    def write_logits(self, sample: LogitSample, read: Mapping[str, str] = MappingProxyType({})) -> None:
        """Write the final logits. read: as above."""
        self.logits = {**self._write_tensors(LOGITS, sample.tensors()), "read": self._new(read)}
        self._write_list()

    def write_sensitivity(self, value: Sensitivity, read: Mapping[str, str] = MappingProxyType({})) -> None:
        """Write what an error of each linear's output costs. read: as above."""
        self.sensitivity = {**self._write_tensors(SENSITIVITY, value.tensors()), "read": self._new(read)}
        self._write_list()

    def _new(self, read: Mapping[str, str]) -> dict[str, str]:
        """Those digests that no block has yet."""
        new = {name: digest for name, digest in read.items() if name not in self.read}
        self.read |= new
        return new

    def _write_tensors(self, name: str, tensors: Mapping[str, Any]) -> dict[str, str]:
        """Write a file; its name and hash for the list."""
        from safetensors.torch import save

        content = save({key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()})
        _write(self.folder / name, content)
        return {"file": name, "sha256": hashlib.sha256(content).hexdigest()}

    def finish(self) -> None:
        """Declare the statistics complete."""
        self._remove_half_written()
        if (self.folder / UNFINISHED).exists() or not (self.folder / FINISHED).exists():
            self.stamps = {}  # equal statistics are equal bytes, wherever the model lies
            self._write_list()
            os.replace(self.folder / UNFINISHED, self.folder / FINISHED)
            sync_names(self.folder)

    def _remove_half_written(self) -> None:
        """Remove what a killed run left half written of its files; a foreign file of a similar name stays."""
        parts = [path for path in self.folder.iterdir() if path.name.endswith(PART)]
        for path in parts:
            name = path.name.removesuffix(PART)
            ours = OWN_NAME.fullmatch(name) or name in (FINISHED, UNFINISHED)
            if ours and path.is_file() and not path.is_symlink():
                path.unlink()

    def _write_list(self) -> None:
        """Write the list of blocks as unfinished."""
        values = {
            "format_version": FORMAT_VERSION,
            "outlierq": __version__,
            **self.identity.to_json(),
            "stamps": self.stamps,
            "calibration": self.calibration,
            "logits": self.logits,
            **({"sensitivity": self.sensitivity} if self.sensitivity else {}),
            "blocks": [self.blocks[index] for index in sorted(self.blocks)],
        }
        _write(self.folder / UNFINISHED, json.dumps(values, indent=1).encode())

    def _resume(self) -> None:
        """Take over the verified blocks of an earlier run, or refuse the folder."""
        list_name = next((name for name in (UNFINISHED, FINISHED) if (self.folder / name).exists()), None)
        if list_name is None:
            others = foreign(self.folder, (UNFINISHED,))
            if others:
                raise OutputError(
                    f"{self.folder} holds {len(others)} other files ({others[0]}, ...) and no statistics",
                    hint="give a new or empty folder",
                )
            self._write_list()  # from now on it shows whose folder this is
            return
        values = _read_list(self.folder / list_name, OutputError)
        if list_name == UNFINISHED and not values.get("blocks"):
            self._write_list()  # nothing was done yet, so nothing is lost by starting over
            return
        for key, ours in self.identity.to_json().items():
            held = values.get(key)
            if held != ours:
                raise OutputError(
                    f"{self.folder} holds statistics with another {key}: {_brief(held)}, not {_brief(ours)}",
                    hint="give another folder, or delete this one",
                )
        check_list(values, str(self.folder / list_name), OutputError)
        self.former_stamps = values["stamps"]
        for block in values["blocks"]:
            if self._is_intact(block):
                self.blocks[block["index"]] = block
                self.read |= block["read"]
        if values["logits"] and self._is_intact(values["logits"]):
            self.logits = values["logits"]
            self.read |= self.logits["read"]
        if values.get("sensitivity") and self._is_intact(values["sensitivity"]):
            self.sensitivity = values["sensitivity"]
            self.read |= self.sensitivity["read"]

    def _is_intact(self, entry: Mapping[str, Any]) -> bool:
        """Whether the file of an entry is there as it was written."""
        path = self.folder / entry["file"]
        return path.is_file() and _sha256(path) == str(entry["sha256"])


class StatsReader:
    """Reads a finished statistics folder; StatsError when it is missing, unfinished or damaged.

    Tensors have the shapes of `InputStats`, `BlockStats` and `LogitSample`.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / FINISHED).is_file():
            raise self._missing()
        values = _read_list(self.folder / FINISHED, StatsError)
        names = StatsIdentity.__dataclass_fields__
        absent = [name for name in (*names, "blocks", "logits") if name not in values]
        if absent:
            raise StatsError(f"{self.folder / FINISHED} lacks {', '.join(absent)}", hint="calibrate again")
        check_list(values, str(self.folder / FINISHED), StatsError)
        self.identity = StatsIdentity(**{name: values[name] for name in names})
        self.calibration: dict[str, Any] = values["calibration"]
        self._blocks = {block["index"]: block for block in values["blocks"]}
        self._logits, self._sensitivity = values["logits"], values.get("sensitivity")
        self._verified: set[str] = set()

    @property
    def digest(self) -> str:
        """Sha256 hex of the list of all files with their digests."""
        return _sha256(self.folder / FINISHED)

    @property
    def indices(self) -> tuple[int, ...]:
        """Indices of the blocks there are."""
        return tuple(sorted(self._blocks))

    @property
    def made_of(self) -> dict[str, str]:
        """Digests of the weights that the statistics were made of, as `Checkpoint.bytes_read`."""
        parts = [*self._blocks.values(), *filter(None, (self._logits, self._sensitivity))]
        return {name: digest for part in parts for name, digest in part["read"].items()}

    def check(self, model_fingerprint: str, tokenizer: str | None = None) -> None:
        """StatsError unless the statistics are of the model with this fingerprint, and of the tokens of its tokenizer.

        The fingerprint knows a sample of the weights; who reads all of them compares them with `made_of`.
        tokenizer: its digest, None where it does not matter.
        """
        for what, made, now in (
            ("model", self.identity.model_fingerprint, model_fingerprint),
            ("tokenizer", self.identity.tokenizer, self.identity.tokenizer if tokenizer is None else tokenizer),
        ):
            if made != now:
                raise StatsError(
                    f"{self.folder} holds statistics of another {what}: {made[:12]}..., this one is {now[:12]}...",
                    hint="run `outlierq calibrate` on this model",
                )

    def block(self, index: int) -> tuple[list[InputGroup], dict[str, InputStats]]:
        """Groups and statistics of one block, the latter by group name."""
        block = self._block(index)
        tensors: dict[str, dict[str, Any]] = {}
        for key, value in self._read(block, lambda key: not key.startswith("/")).items():
            name, _, field = key.rpartition("/")
            tensors.setdefault(name, {})[field] = value
        groups = [_group_from_json(values) for values in block["groups"]]
        listed = [each for values in block["groups"] for each in (values, *values.get("parts", ()))]
        stats = {
            values["name"]: input_stats(values, tensors[values["name"]])
            for values in listed
            if values["name"] in tensors
        }
        return groups, stats

    def block_stats(self, index: int) -> BlockStats | None:
        """Statistics of the block itself; None when none were kept."""
        block = self._block(index)
        tensors = self._read(block, lambda key: key.startswith("/"))
        if not tensors:
            return None
        named = {key.removeprefix("/"): value for key, value in tensors.items()}
        return value_of(BlockStats, named, output_names=tuple(block["output_names"]))

    def logits(self) -> LogitSample | None:
        """Final logits of the original model at a sample of positions; None when none were kept."""
        return value_of(LogitSample, self._read(self._logits, lambda key: True)) if self._logits else None

    def sensitivity(self) -> Sensitivity | None:
        """What an error of each linear's output costs; None when that was not asked for."""
        if not self._sensitivity:
            return None
        return Sensitivity.from_tensors(self._read(self._sensitivity, lambda key: True))

    @property
    def notes(self) -> tuple[str, ...]:
        """What was unusual during calibration, each sentence once."""
        return tuple(dict.fromkeys(text for index in self.indices for text in self._blocks[index]["notes"]))

    def _block(self, index: int) -> dict[str, Any]:
        """The entry of a block."""
        if index not in self._blocks:
            raise StatsError(f"{self.folder} holds no statistics of block {index}; it holds {len(self._blocks)} blocks")
        entry: dict[str, Any] = self._blocks[index]
        return entry

    def _read(self, entry: Mapping[str, Any], asked: Callable[[str], bool]) -> dict[str, Any]:
        """The wanted tensors of a file, which is verified when it is read first."""
        from safetensors import SafetensorError, safe_open

        path = self.folder / entry["file"]
        if entry["file"] not in self._verified:
            try:
                digest = _sha256(path)
            except OSError as error:
                raise StatsError(f"cannot read {path}: {error.strerror or error}", hint="calibrate again") from error
            if digest != entry["sha256"]:
                raise StatsError(
                    f"{path} is damaged: sha256 {digest[:12]}..., expected {entry['sha256'][:12]}...",
                    hint="calibrate again",
                )
            self._verified.add(entry["file"])
        try:
            with utf8_path(path) as place, safe_open(place, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys() if asked(key)}  # noqa: SIM118, not a dict
        except (SafetensorError, OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise StatsError(f"{path} cannot be read: {error}", hint="calibrate again") from error

    def _missing(self) -> StatsError:
        """Why there is no finished list of blocks."""
        if (self.folder / UNFINISHED).is_file():
            return StatsError(
                f"the statistics in {self.folder} are unfinished: {blocks_written(self.folder)} blocks are written",
                hint="run the same `outlierq calibrate` again; it goes on where it stopped",
            )
        return StatsError(
            f"{self.folder} holds no statistics ({FINISHED})", hint="write them with `outlierq calibrate`"
        )


def check_made_of(made_of: Mapping[str, str], read: Mapping[str, str]) -> None:
    """StatsError when statistics were made of other bytes than those that were read. Both: digests by tensor."""
    other = [name for name, digest in read.items() if made_of.get(name, digest) != digest]
    if other:
        raise StatsError(
            f"the statistics are of another model: {other[0]} has other bytes than when they were made",
            hint="run `outlierq calibrate` on this model, and then this command with --restart",
        )


def blocks_written(folder: Path) -> int:
    """How many blocks unfinished statistics hold."""
    values = _read_list(folder / UNFINISHED, StatsError)
    check_list(values, str(folder / UNFINISHED), StatsError)
    return len(values["blocks"])


def former_shards(folder: Path) -> int | None:
    """In how many shards the statistics in a folder, which may be unfinished, were made; None when there are none."""
    path = next((folder / name for name in (UNFINISHED, FINISHED) if (folder / name).exists()), None)
    if path is None:
        return None
    values = _read_list(path, OutputError)
    settings = values.get("settings")
    if path.name == UNFINISHED and not values.get("blocks"):
        return None
    shards = settings.get("shards", 1) if isinstance(settings, dict) else None
    if type(shards) is not int:
        raise OutputError(f"{path} does not say in how many shards it was made", hint="give another folder")
    return shards


def remove_statistics(folder: Path) -> None:
    """Remove statistics, finished or not, and their folder; what else lies there stays, and the folder with it.

    A folder without a list of ours is left as it is. OSError when something cannot be removed.
    """
    if any((folder / name).is_file() for name in (FINISHED, UNFINISHED)):
        names = sorted({path.name.removesuffix(PART) for path in folder.iterdir()})
        remove_files(folder, [*filter(OWN_NAME.fullmatch, names), FINISHED, UNFINISHED])
        if not any(folder.iterdir()):
            folder.rmdir()


def _read_list(path: Path, kind: type[StatsError] | type[OutputError]) -> dict[str, Any]:
    """The list of blocks; its layout must be ours."""
    try:
        values = json_value(
            path.read_bytes(), f"cannot read {path}: it", kind, hint="calibrate again into another folder"
        )
    except OSError as error:
        raise kind(f"cannot read {path}: {error}", hint="calibrate again into another folder") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION or not isinstance(values, dict):
        raise kind(
            f"{path} has format version {version}; this program reads {FORMAT_VERSION}",
            hint="calibrate again with this version of outlierq",
        )
    return values


def _brief(value: Any) -> str:
    """A value short enough for one line."""
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _write(path: Path, content: bytes) -> None:
    """The file is there with all its bytes or as it was, also after a power cut."""
    try:
        write_atomically(path, content)
    except OSError as error:
        raise OutputError(f"cannot write {path} ({len(content)} bytes): {error.strerror or error}") from error


def _sha256(path: Path) -> str:
    """Of a file's content, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _group_to_json(group: InputGroup, stats: Mapping[str, InputStats]) -> dict[str, Any]:
    """A group as plain values; the fold's channel map as runs [first producer channel, length]."""
    values = asdict(group) | {"parts": [_group_to_json(part, stats) for part in group.parts]}
    if group.fold:
        values["fold"]["index"] = _runs(group.fold.index)
    seen = stats.get(group.name)
    counts = {"tokens": seen.tokens, "sequences": seen.sequences} if seen else {}
    return {**values, **counts}


def _group_from_json(values: Mapping[str, Any]) -> InputGroup:
    """The group that `_group_to_json` wrote."""
    fold = values["fold"]
    if fold:
        index = tuple(i for first, length in fold["index"] for i in range(first, first + length))
        fold = checked(Fold, {**fold, "index": index}, "fold in the statistics", StatsError)
    sites = tuple(checked(LinearSite, site, "linear in the statistics", StatsError) for site in values["sites"])
    parts = tuple(_group_from_json(part) for part in values.get("parts", ()))
    return InputGroup(values["name"], sites, fold, values["fold_note"], values.get("routed", False), parts)


def _runs(index: Sequence[int]) -> list[list[int]]:
    """Runs of consecutive numbers: (4, 5, 6, 4) is [[4, 3], [4, 1]]."""
    runs: list[list[int]] = []
    for number in index:
        if runs and number == sum(runs[-1]):
            runs[-1][1] += 1
        else:
            runs.append([number, 1])
    return runs
