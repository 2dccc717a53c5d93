"""Where lm-eval's tasks are defined, and how they read local files instead of the Hub.

lm-eval parses 14,000 task files before it runs one (10 to 25 s). Here their names are found by a text search (1 s),
and only the folders of the wanted tasks are parsed. For local data, an overlay file per task includes the genuine
definition and replaces its data set; prompts, metrics and groups stay lm-eval's own.
Not chosen: a folder shaped like the Hub as working directory (works, but depends on the working directory), and
prefilled caches (rely on internals of `datasets`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from os.path import commonpath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import OutlierqError, SourceError, nearest
from outlierq.core.machine.installed import needs_extra
from outlierq.core.machine.untrusted import json_value

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from lm_eval.tasks import TaskManager

NAME = re.compile(r"^\"?(?:task|group|tag)\"?:[ \t]+[\"']?([^\"'\[{!#\n]+?)[\"']?[ \t]*$", re.MULTILINE)
TAGS = re.compile(r"^\"?tag\"?:[ \t]*(\[[^\]]*\]|\n(?:[ \t]*-[ \t]*[^\n]+\n?)+)", re.MULTILINE)

# A plain folder that may stand for a data set of the Hub.
PLAIN_FOLDERS = {
    "EleutherAI/wikitext_document_level": "wikitext2-raw",
    "cais/mmlu": "mmlu",
    "allenai/ai2_arc": "arc",
}
# Configurations that are the only one of their data set in use, so that files need no folder named after them.
SOLE_CONFIGURATIONS = frozenset({None, "default", "main", "plain_text", "wikitext-2-raw-v1"})
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


@dataclass(frozen=True)
class LocalData:
    """Files of one task's data set. files: split -> paths. subject: only rows with this `subject` count."""

    files: dict[str, list[str]]
    subject: str | None = None


def task_manager(names: Sequence[str], overlay: Path | None = None) -> TaskManager:
    """lm-eval's task manager over the folders that define `names` and everything their groups refer to.

    overlay: folder of task files that replace genuine ones. OutlierqError names an unknown task and its neighbour.
    """
    needs_extra("lm_eval")
    from lm_eval.tasks import TaskManager

    known = task_folders()
    unknown = [name for name in names if name not in known]
    if unknown:
        near = nearest(unknown[0], list(known))
        hint = f"did you mean `{near}`?" if near else "`lm_eval ls tasks` lists all names"
        raise OutlierqError(f"lm-eval knows no task `{unknown[0]}`", hint=hint)
    needed = list(names)
    while True:  # groups may refer to tasks in other folders
        roots = _roots(known[name] for name in needed)
        include = [*roots, *([overlay] if overlay else [])]
        manager = TaskManager(include_defaults=False, include_path=include)
        needed = [name for name in _reachable(manager, names) if name in known]
        if _roots(known[name] for name in needed) == roots:
            return manager


@lru_cache(maxsize=1)
def task_folders() -> dict[str, set[Path]]:
    """Name of every task, group and tag of lm-eval -> the folders whose files mention it as theirs.

    Agrees with lm-eval's own index but for `mgsm_direct`, one member of which inherits the tag from another folder.
    """
    import lm_eval

    folders: dict[str, set[Path]] = {}
    for path in (Path(lm_eval.__file__).parent / "tasks").rglob("*"):
        if path.suffix not in (".yaml", "") or not path.is_file():  # files to include often have no suffix
            continue
        text = path.read_text(encoding="utf-8")
        names = NAME.findall(text)
        for block in TAGS.findall(text):
            names += [word.strip(" \t\"'-") for word in re.split(r"[\n,\[\]]", block)]
        for name in filter(None, names):
            folders.setdefault(name, set()).add(path.parent)
    return folders


def leaf_tasks(manager: TaskManager, names: Iterable[str]) -> list[str]:
    """The single tasks behind names of tasks, groups and tags, sorted."""
    return sorted({name for name in _reachable(manager, names) if _is_task(manager, name)})


def write_overlay(manager: TaskManager, names: Sequence[str], data_dir: Path, out: Path, shots: int | None) -> None:
    """One file per single task that reads local data; SourceError lists the tasks without any.

    shots: examples in each prompt as asked for, None to follow each task.
    """
    missing: dict[str, str] = {}
    for name in _reachable(manager, names):
        entry = manager.task_index.get(name)
        if entry is not None and entry.kind.name in ("GROUP", "TAG"):
            _refuse_changed_data(name, entry.cfg)
            continue
        config = {} if entry is None else entry.cfg or {}
        data = find_local(data_dir, config.get("dataset_path"), config.get("dataset_name"))
        if data is None or "class" in config:  # a task written in Python fetches its data itself
            missing[name] = "/".join(filter(None, (config.get("dataset_path"), config.get("dataset_name"))))
            continue
        changes = _overlay(name, config, data, shots)
        (out / f"{name}.yaml").write_text(_overlay_text(entry.yaml_path, name, changes), encoding="utf-8")
    if missing:
        shown = ", ".join(f"{name} ({where or 'its own data'})" for name, where in sorted(missing.items())[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise SourceError(
            f"{data_dir} has no data for {len(missing)} tasks: {shown}{more}",
            hint="put each data set into a folder named like its Hub id, or leave the data folder out to download it",
        )


def find_local(data_dir: Path, dataset: str | None, configuration: str | None) -> LocalData | None:
    """Files that stand for a data set of the Hub, or None.

    Looked for: DATA/<hub id>/<configuration>/, DATA/<hub id>/ and the same under the plain folder name, each with
    files "<split>.jsonl" or "<split>-00000-of-00001.parquet" (also .json, .csv). Files of all configurations together
    are taken when their rows carry the configuration as `subject` (MMLU).
    """
    if dataset is None:
        return None
    for folder in (data_dir / dataset, *([data_dir / PLAIN_FOLDERS[dataset]] if dataset in PLAIN_FOLDERS else [])):
        if configuration and (files := _split_files(folder / configuration)):
            return LocalData(files)
        files = _split_files(folder) or _split_files(folder / "data")
        if files and configuration in SOLE_CONFIGURATIONS:
            return LocalData(files)
        if files and any(row.get("subject") == configuration for path in files.get("test", []) for row in _rows(path)):
            return LocalData(files, subject=configuration)
    return None


def load_local(local_files: Mapping[str, Sequence[str]], subject: str | None = None, **_metadata: Any) -> DatasetDict:
    """What an overlay names as its data set; lm-eval calls it. _metadata: the task's own, which lm-eval adds."""
    from datasets import Dataset, DatasetDict

    splits: dict[str, Dataset] = {}
    for split, paths in local_files.items():
        rows = [row for path in paths for row in _rows(path) if subject is None or row.get("subject") == subject]
        splits[split] = Dataset.from_list(rows)
    return DatasetDict(splits)


def _refuse_changed_data(group: str, config: Mapping[str, Any] | None) -> None:
    """A group that gives its members other data than their own files name cannot be served from local files."""
    keys = {*SPLITS, "dataset_path", "dataset_name", "dataset_kwargs", "custom_dataset"}
    members = (config or {}).get("task")
    changing = [config or {}, *(m for m in members if isinstance(m, Mapping))] if isinstance(members, list) else []
    if any(keys & change.keys() for change in changing):
        raise SourceError(
            f"group `{group}` replaces the data of its members, so local files cannot stand for it",
            hint="name the members one by one, or leave the data folder out to download the data",
        )


def _overlay(name: str, config: Mapping[str, Any], data: LocalData, shots: int | None) -> dict[str, Any]:
    """The keys of a task that change: its data, and null for every split that has no file and is not needed."""
    evaluated = config.get("test_split") or config.get("validation_split")
    fixed = config.get("num_fewshot")
    shots = fixed if shots is None or fixed == 0 else shots  # lm-eval leaves a task's own 0 alone
    few = config.get("fewshot_config") or {}
    examples = few.get("split") or config.get("fewshot_split")
    examples = examples or config.get("training_split") or config.get("validation_split")
    needed: set[str | None] = {evaluated, examples} if shots and "samples" not in few else {evaluated}
    for split in sorted(name for name in needed if name is not None and name not in data.files):
        raise SourceError(
            f"task `{name}` needs the split `{split}`; the files hold {', '.join(sorted(data.files))}",
            hint=f"add {split}.jsonl beside them" + (", or use 0 examples (num_fewshot)" if split != evaluated else ""),
        )
    changes: dict[str, Any] = {key: None for key in SPLITS if config.get(key) and config[key] not in data.files}
    if few.get("split") and few["split"] not in data.files:
        changes["fewshot_config"] = {"sampler": "default"}
    return {**changes, "dataset_kwargs": {"local_files": data.files, "subject": data.subject}}


def _overlay_text(genuine: Path, name: str, changes: Mapping[str, Any]) -> str:
    """A task file: the genuine definition with `changes`."""
    import yaml

    function = f"custom_dataset: !function {__name__}.{load_local.__name__}\n"
    return f"{yaml.safe_dump({'include': str(genuine), 'task': name, **changes}, sort_keys=False)}{function}"


def _split_files(folder: Path) -> dict[str, list[str]]:
    """Split -> its files in this folder (not below it)."""
    files: dict[str, list[str]] = {}
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.suffix in (".jsonl", ".json", ".parquet", ".csv") and path.is_file():
                files.setdefault(re.sub(r"-\d+-of-\d+$", "", path.stem), []).append(str(path.resolve()))
    return files


def _rows(path: str) -> list[dict[str, Any]]:
    """Rows of one data file; a file is parsed once however many tasks read it."""
    stat = Path(path).stat()
    return _parse(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4)
def _parse(path: str, _modified: int, _size: int) -> list[dict[str, Any]]:
    """Rows of a file of this age and size."""
    try:
        if path.endswith((".parquet", ".csv")):
            return _table_rows(path)
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read: {error}") from error
    if path.endswith(".json"):
        rows: Any = json_value(text, path, SourceError)
    else:
        lines = (line for line in enumerate(text.split("\n"), start=1) if line[1].strip())
        rows = [json_value(line, f"line {number} of {path}", SourceError) for number, line in lines]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise SourceError(f"{path} is not a list of rows", hint="each row is a JSON object")
    return rows


def _table_rows(path: str) -> list[dict[str, Any]]:
    """Rows of a Parquet or CSV file."""
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    try:
        if path.endswith(".csv"):
            table = pyarrow.csv.read_csv(path)
        else:
            with open(path, "rb") as file:
                table = pyarrow.parquet.ParquetFile(file).read()
        rows: list[dict[str, Any]] = table.to_pylist()
    except (pyarrow.ArrowException, ValueError, ArithmeticError) as error:
        raise SourceError(f"{path} is no table that can be read: {error}") from error
    return rows


def _roots(places: Iterable[set[Path]]) -> list[Path]:
    """Folders to parse, none inside another.

    A name with several folders (a tag) needs their common parent: lm-eval forgets the members of a tag in one root
    when the next root has the same tag.
    """
    covering = {Path(commonpath(folders)) for folders in places}
    return sorted(path for path in covering if not covering.intersection(path.parents))


def _reachable(manager: TaskManager, names: Iterable[str]) -> Iterator[str]:
    """`names` and all their members, each once."""
    seen: set[str] = set()
    queue = list(names)
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        yield name
        entry = manager.task_index.get(name)
        if entry is not None:
            queue += _members(entry)


def _members(entry: Any) -> list[str]:
    """Names directly under a group or tag; nothing under a single task."""
    kind = entry.kind.name
    if kind == "TAG":
        return sorted(entry.tags)
    return list(_member_names((entry.cfg or {}).get("task"))) if kind == "GROUP" else []


def _member_names(members: Any) -> Iterator[str]:
    """Names in a group's `task:` list, where an item may be a name, a task with changes, or a group within."""
    if isinstance(members, str):
        yield members
    elif isinstance(members, Mapping):
        if "group" in members:
            yield members["group"]
        yield from _member_names(members.get("task"))
    else:
        for member in members or ():
            yield from _member_names(member)


def _is_task(manager: TaskManager, name: str) -> bool:
    """Whether a name is a single task."""
    entry = manager.task_index.get(name)
    return entry is not None and entry.kind.name in ("TASK", "PY_TASK")
