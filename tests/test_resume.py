"""A killed run, started again, gives the bytes of an uninterrupted one; nothing half-done lies under the final name."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from outlierq.calibrate.stored import stats_file
from outlierq.calibrate.stored.stats_file import StatsReader
from outlierq.core.errors import OutputError, StatsError
from outlierq.core.machine import own_files
from outlierq.core.report import REPORT_NAME
from outlierq.export.writer import ShardWriter
from outlierq.load import open_checkpoint
from outlierq.pipeline import quantize as run
from outlierq.pipeline.block import stats_run as calibration
from outlierq.pipeline.block.expert_stats import remove_expert_stats
from outlierq.pipeline.block.hidden_files import saved_hidden
from outlierq.pipeline.calibrate import calibrate
from outlierq.pipeline.ledger import folder, journal
from outlierq.pipeline.ledger.output import Output
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.quantize import quantize
from outlierq.recipe import load

KILLED = 77
SMALL = ["calibration.samples=6", "calibration.sequence_length=32"]
RECIPES = {
    "static": ("awq-gptq-w4", SMALL),
    "sequential": ("awq-gptq-w4", [*SMALL, "calibration.mode=sequential"]),
    "data-free": ("rtn-w4", ["export.max_shard_size=20KB"]),
}


def compress(source: Path, out: Path, recipe: str, settings: list[str], **options):
    return quantize(make_plan(open_checkpoint(str(source)), load(recipe, settings)), out, **options)


def collect(source: Path, out: Path, *settings: str, samples: int = 6):
    small = [f"calibration.samples={samples}", "calibration.sequence_length=32", *settings]
    return calibrate(open_checkpoint(str(source)), load("gptq-w4", small).calibration, out)


def after(calls: int, owner: object, name: str) -> None:
    """From now on the process dies at the end of the given call of a function, as if its plug was pulled."""
    original, left = getattr(owner, name), [calls]

    def counted(*args, **kwargs):
        result = original(*args, **kwargs)
        left[0] -= 1
        if left[0] == 0:
            os._exit(KILLED)
        return result

    setattr(owner, name, counted)


# Where to die: after the n-th call of a function. The first unit is what lies outside of the blocks, then block 0.
MOMENTS = {
    "before anything is written": (1, run, "Journal"),
    "while the first block is calibrated": (1, calibration, "prove_folds"),
    "in the middle of writing the first block": (30, ShardWriter, "write"),
    "after the first block is in the journal": (2, journal.Journal, "add"),
    "after the last block is in the journal": (3, journal.Journal, "add"),
    "during the final verification": (1, Output, "verify"),
    "after the report is written": (2, run, "write_small"),
}


def in_child(moment: str, work: Callable[..., object], *args: object) -> int:
    """Run `work` in a child process that dies at the moment; its exit code."""

    def body():
        after(*MOMENTS[moment])
        work(*args)

    child = multiprocessing.get_context("fork").Process(target=body)
    child.start()
    child.join()
    return child.exitcode


def result(folder: Path) -> tuple[dict[str, bytes], dict]:
    """Every file of a result, and the report without what time and place change."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = json.loads(files.pop("outlierq.json"))
    for name in ("seconds", "peak_bytes", "out"):
        del report[name]
    del report["record"]["signed"]  # of the times, too
    for row in report["rows"]:
        del row["seconds"]
    return files, report


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A forked child has no threads of OpenMP, and sums must be added in the same order everywhere."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def uninterrupted(tiny_llama, tmp_path_factory) -> dict[str, Path]:
    """The result of every recipe, run without a stop."""
    folders = {}
    for name, (recipe, settings) in RECIPES.items():
        folders[name] = tmp_path_factory.mktemp("uninterrupted") / name
        compress(tiny_llama, folders[name], recipe, settings)
    return folders


@pytest.fixture(scope="module")
def half_done(tiny_llama, tmp_path_factory) -> Path:
    """The work folder of a static run that was killed after its first block. Read-only."""
    out = tmp_path_factory.mktemp("half-done") / "out"
    recipe, settings = RECIPES["static"]
    assert in_child("after the first block is in the journal", compress, tiny_llama, out, recipe, settings) == KILLED
    return out.parent / "out.partial"


@pytest.fixture
def unfinished(half_done, tmp_path) -> Path:
    """A copy of it, to go on from; the final name is `tmp_path / "out"`."""
    return Path(shutil.copytree(half_done, tmp_path / "out.partial"))


@pytest.mark.parametrize(
    ("name", "moment"),
    [
        ("static", "before anything is written"),
        ("static", "while the first block is calibrated"),
        ("static", "in the middle of writing the first block"),
        ("static", "during the final verification"),
        ("sequential", "after the first block is in the journal"),
        ("sequential", "after the last block is in the journal"),
        ("data-free", "in the middle of writing the first block"),
        ("data-free", "after the first block is in the journal"),
        ("data-free", "after the report is written"),
    ],
)
def test_a_killed_run_started_again_gives_the_same_bytes(name, moment, tiny_llama, uninterrupted, tmp_path):
    recipe, settings = RECIPES[name]
    out = tmp_path / "out"
    assert in_child(moment, compress, tiny_llama, out, recipe, settings) == KILLED
    assert not out.exists() and (tmp_path / "out.partial").is_dir()
    compress(tiny_llama, out, recipe, settings)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert result(out) == result(uninterrupted[name])


@pytest.mark.parametrize("mode", ["static", "sequential"])
def test_saved_hidden_states_are_taken_up(mode, untied_llama, tmp_path, monkeypatch):
    settings = [*SMALL, f"calibration.mode={mode}"]
    monkeypatch.setattr(calibration, "SAVE_EVERY_SECONDS", 0.0)
    whole, out = tmp_path / "whole", tmp_path / "out"
    compress(untied_llama, whole, "gptq-w4", settings)
    moment = "after the last block is in the journal"
    assert in_child(moment, compress, untied_llama, out, "gptq-w4", settings) == KILLED
    assert saved_hidden(tmp_path / "out.partial")
    ran = []
    original = calibration.BlockRunner.run
    monkeypatch.setattr(
        calibration.BlockRunner,
        "run",
        lambda self, module, index, *a, **k: ran.append(index) or original(self, module, index, *a, **k),
    )
    compress(untied_llama, out, "gptq-w4", settings)
    assert 0 not in ran and 2 in ran
    assert result(out) == result(whole)


def test_a_half_precision_model_resumes_to_the_same_bytes(tools, tmp_path):
    """Blocks run in bfloat16 but are stored in float16: what the next block sees must be what was stored."""
    source = tools.write_llama(tmp_path / "model", dtype="float16")
    settings = [*SMALL, "calibration.mode=sequential", "quantize.ignore=['*v_proj']"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    compress(source, whole, "awq-w4", settings)
    moment = "after the first block is in the journal"
    assert in_child(moment, compress, source, out, "awq-w4", settings) == KILLED
    compress(source, out, "awq-w4", settings)
    assert result(out) == result(whole)


def test_another_recipe_source_or_text_in_the_same_place_is_refused(unfinished, tiny_llama, tools, tmp_path):
    recipe, settings = RECIPES["static"]
    out = tmp_path / "out"
    before = tools.folder_hashes(unfinished)
    before.pop(own_files.LOCK)  # left there by the run that was killed, removed by the next one that ends
    with pytest.raises(OutputError, match=r"unfinished run with another recipe and text \(2 units done\)") as caught:
        compress(tiny_llama, out, recipe, [*settings, "calibration.seed=1"])
    assert "--restart" in caught.value.hint
    with pytest.raises(OutputError, match="another recipe"):
        compress(tiny_llama, out, recipe, [*settings, "quantize.bits=3"])
    other = tools.write_llama(tmp_path / "other", seed=9)
    with pytest.raises(OutputError, match="another source"):
        compress(other, out, recipe, settings)
    assert tools.folder_hashes(unfinished) == before
    assert not out.exists()


def test_a_text_file_that_changed_in_between_is_noticed(tiny_llama, tmp_path):
    text, out = tmp_path / "notes.txt", tmp_path / "out"
    text.write_text("The sea is calm tonight. " * 100)
    settings = [*SMALL, f"calibration.text={text}"]
    moment = "after the first block is in the journal"
    assert in_child(moment, compress, tiny_llama, out, "gptq-w4", settings) == KILLED
    text.write_text("The tide is full, the moon lies fair. " * 100)
    with pytest.raises(OutputError, match="unfinished run with another text"):
        compress(tiny_llama, out, "gptq-w4", settings)


def test_restart_throws_the_unfinished_run_away(unfinished, tiny_llama, uninterrupted, tmp_path):
    out = tmp_path / "out"
    recipe, settings = RECIPES["data-free"]
    compress(tiny_llama, out, recipe, settings, restart=True)
    assert result(out) == result(uninterrupted["data-free"])


def test_a_restart_that_was_cut_off_while_it_cleared_the_folder_can_be_made_again(tmp_path, monkeypatch):
    work, removed = tmp_path / "out.partial", []

    class Cut(Exception):
        """The end of the process."""

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.exists():
            if removed:
                raise Cut
            removed.append(path.name)
        original(path, missing_ok)

    original = Path.unlink
    work.mkdir()
    names = ("config.json", "model.safetensors", REPORT_NAME, "tokenizer.json")
    for name in names:
        (work / name).write_text("{}")
    journal.Journal(work, {}, files=names)
    monkeypatch.setattr(Path, "unlink", unlink)
    for _ in names:
        removed.clear()
        with pytest.raises(Cut), folder.working(tmp_path / "out", restart=True):
            pass
        assert (work / journal.JOURNAL).is_file()
    removed.clear()
    with folder.working(tmp_path / "out", restart=True):
        assert [path.name for path in work.iterdir()] == [own_files.LOCK]
        removed.clear()


def test_a_run_that_failed_before_its_first_unit_stands_in_nobodys_way(tiny_llama, uninterrupted, tmp_path):
    out = tmp_path / "out"
    assert in_child("before anything is written", compress, tiny_llama, out, "rtn-w8", []) == KILLED
    recipe, settings = RECIPES["data-free"]
    compress(tiny_llama, out, recipe, settings)
    assert result(out) == result(uninterrupted["data-free"])


def test_a_failure_before_any_work_leaves_no_folder(tiny_llama, tmp_path):
    with pytest.raises(StatsError, match="holds no statistics"):
        compress(tiny_llama, tmp_path / "out", "gptq-w4", [], stats=tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_another_process_in_the_same_place_is_refused(unfinished, tiny_llama, tmp_path):
    recipe, settings = RECIPES["static"]
    with open(unfinished / own_files.LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another outlierq works in"):
            compress(tiny_llama, tmp_path / "out", recipe, settings, restart=True)
    assert (unfinished / journal.JOURNAL).is_file()


def test_a_folder_that_is_no_run_of_ours_is_left_alone(tiny_llama, tools, tmp_path):
    for name in ("out.partial", "out"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "thesis.tex").write_text("mine")
        with pytest.raises(OutputError, match=r"is in the way: it holds thesis.tex|out exists already"):
            compress(tiny_llama, tmp_path / "out", "rtn-w4", [], restart=True)
        assert tools.folder_hashes(folder).keys() == {"thesis.tex"}
        shutil.rmtree(folder)


@pytest.mark.parametrize("restart", [False, True])
def test_a_finished_result_with_the_name_of_a_work_folder_is_left_alone(restart, tiny_llama, uninterrupted, tmp_path):
    work = Path(shutil.copytree(uninterrupted["data-free"], tmp_path / "out.partial"))
    (work / "my-notes.txt").write_text("precious")
    before = sorted(path.name for path in work.iterdir())
    with pytest.raises(OutputError, match="is in the way: it holds LICENSE and"):
        compress(tiny_llama, tmp_path / "out", "rtn-w4", [], restart=restart)
    assert sorted(path.name for path in work.iterdir()) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("kind", ["file", "folder", "link", "link in place of ours"])
def test_what_somebody_put_into_the_work_folder_stops_the_run(kind, restart, unfinished, tiny_llama, tools, tmp_path):
    (tmp_path / "precious").write_text("years of work")
    mine = unfinished / ("config.json" if kind == "link in place of ours" else "mine")
    if kind == "file":
        mine.write_text("years of work")
    elif kind == "folder":
        mine.mkdir()
    else:
        mine.symlink_to(tmp_path / "precious")
    before = tools.folder_hashes(tmp_path)
    with pytest.raises(OutputError, match=f"is in the way: it holds {mine.name}, which this program did not put there"):
        compress(tiny_llama, tmp_path / "out", *RECIPES["static"], restart=restart)
    assert tools.folder_hashes(tmp_path) == before and mine.exists()


@pytest.mark.parametrize("kind", ["link", "dangling link", "here"])
def test_a_place_where_no_folder_can_be_put_is_refused_before_work(kind, tiny_llama, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    out = Path(".") if kind == "here" else tmp_path / "out"
    if kind == "here":
        monkeypatch.chdir(tmp_path / "empty")
    else:
        out.symlink_to(tmp_path / ("empty" if kind == "link" else "nowhere"))
    with pytest.raises(OutputError, match=r"is a link to|is the folder you are in"):
        compress(tiny_llama, out, "rtn-w4", [])
    assert not list(tmp_path.glob("*.partial")) and not list((tmp_path / "empty").iterdir())


def test_expert_statistics_are_removed_without_what_is_not_theirs(tiny_llama, tmp_path):
    collect(tiny_llama, tmp_path / "out.experts")
    remove_expert_stats(tmp_path / "out")
    assert not (tmp_path / "out.experts").exists()
    collect(tiny_llama, tmp_path / "out.experts")
    (tmp_path / "out.experts" / "thesis.tex").write_text("mine")
    for _ in range(2):
        remove_expert_stats(tmp_path / "out")
        assert [path.name for path in (tmp_path / "out.experts").iterdir()] == ["thesis.tex"]


def test_an_empty_output_folder_is_used(tiny_llama, uninterrupted, tmp_path):
    recipe, settings = RECIPES["data-free"]
    (tmp_path / "out").mkdir()
    compress(tiny_llama, tmp_path / "out", recipe, settings)
    assert result(tmp_path / "out") == result(uninterrupted["data-free"])


def test_changed_bytes_of_a_finished_unit_are_found(unfinished, tiny_llama, tmp_path):
    recipe, settings = RECIPES["static"]
    shard = unfinished / "model.safetensors"
    raw = bytearray(shard.read_bytes())
    plan = make_plan(open_checkpoint(str(tiny_llama)), load(recipe, settings))
    raw[plan.layout.places["model.layers.0.mlp.up_proj.weight_packed"].offset + 5] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(OutputError, match="the bytes of block-00000 on disk are not those that were written"):
        compress(tiny_llama, tmp_path / "out", recipe, settings)
    assert not (tmp_path / "out").exists()


def test_a_damaged_journal_is_named_and_restart_helps(unfinished, tiny_llama, tmp_path):
    recipe, settings = RECIPES["static"]
    lines = (unfinished / journal.JOURNAL).read_bytes().splitlines(keepends=True)
    (unfinished / journal.JOURNAL).write_bytes(lines[0] + b"garbage\n" + lines[1])
    with pytest.raises(OutputError, match="is damaged") as caught:
        compress(tiny_llama, tmp_path / "out", recipe, settings)
    assert "--restart" in caught.value.hint


def test_a_journal_line_that_was_cut_short_is_done_again(unfinished, tiny_llama, uninterrupted, tmp_path):
    recipe, settings = RECIPES["static"]
    raw = (unfinished / journal.JOURNAL).read_bytes()
    (unfinished / journal.JOURNAL).write_bytes(raw[:-20])
    compress(tiny_llama, tmp_path / "out", recipe, settings)
    assert result(tmp_path / "out") == result(uninterrupted["static"])


def test_files_named_like_ours_in_the_source_do_not_meet_them(llama_copy, uninterrupted, tmp_path):
    """Nor are they carried over: they are no part of a model."""
    for name in (journal.JOURNAL, own_files.LOCK, "journal.jsonl"):
        (llama_copy / name).write_text("of somebody")
    compress(llama_copy, tmp_path / "out", *RECIPES["data-free"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in uninterrupted["data-free"].iterdir()
    )


MOMENTS_OF_CALIBRATION = {
    "calibrating the first block": (1, calibration, "prove_folds"),
    "writing the first block": (2, stats_file, "_write"),
    "listing the first block": (3, stats_file, "_write"),
    "listing the last block": (5, stats_file, "_write"),
}
MOMENTS |= MOMENTS_OF_CALIBRATION


@pytest.fixture(scope="module")
def statistics(tiny_llama, tmp_path_factory) -> Path:
    """Calibrated without a stop."""
    folder = tmp_path_factory.mktemp("statistics") / "stats"
    collect(tiny_llama, folder)
    return folder


@pytest.mark.parametrize("moment", MOMENTS_OF_CALIBRATION)
def test_a_killed_calibration_started_again_gives_the_same_bytes(moment, tiny_llama, statistics, tools, tmp_path):
    out = tmp_path / "stats"
    assert in_child(moment, collect, tiny_llama, out) == KILLED
    with pytest.raises(StatsError, match=r"unfinished|holds no statistics"):
        StatsReader(out)
    collect(tiny_llama, out)
    assert tools.folder_hashes(out) == tools.folder_hashes(statistics)


def test_a_damaged_block_of_an_unfinished_calibration_is_made_again(untied_llama, tools, tmp_path, monkeypatch):
    """Also when the saved hidden states are past it already."""
    monkeypatch.setattr(calibration, "SAVE_EVERY_SECONDS", 0.0)
    whole, out = tmp_path / "whole", tmp_path / "stats"
    collect(untied_llama, whole)
    assert in_child("listing the last block", collect, untied_llama, out) == KILLED
    (out / "block-00000.safetensors").write_bytes(b"damaged")
    collect(untied_llama, out)
    assert tools.folder_hashes(out) == tools.folder_hashes(whole)


def test_a_calibration_of_another_text_or_model_in_the_same_place_is_refused(
    tiny_llama, untied_llama, statistics, tools
):
    before = tools.folder_hashes(statistics)
    with pytest.raises(OutputError, match="statistics with another token_fingerprint"):
        collect(tiny_llama, statistics, "calibration.seed=1")
    with pytest.raises(OutputError, match="statistics with another model_fingerprint"):
        collect(untied_llama, statistics)
    assert tools.folder_hashes(statistics) == before


def test_a_calibration_into_a_folder_in_use_or_with_other_files_is_refused(tiny_llama, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match="holds 1 other files"):
        collect(tiny_llama, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    busy = tmp_path / "busy"
    busy.mkdir()
    with open(busy / own_files.LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another outlierq works in"):
            collect(tiny_llama, busy)


def spoil(model: Path, tensor: str, start: int = 4096) -> bytes:
    """Zero a tensor's bytes behind the first ones, as a broken download leaves them; gives what the file held."""
    sound = (model / "model.safetensors").read_bytes()
    header = json.loads(sound[8 : 8 + int.from_bytes(sound[:8], "little")])
    first, last = (8 + int.from_bytes(sound[:8], "little") + offset for offset in header[tensor]["data_offsets"])
    (model / "model.safetensors").write_bytes(sound[: first + start] + bytes(last - first - start) + sound[last:])
    return sound


@pytest.mark.parametrize("name", ["static", "sequential", "data-free"])
@pytest.mark.parametrize("where", ["model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight"])
def test_a_run_does_not_go_on_with_blocks_of_other_bytes(name, where, llama_copy, tmp_path):
    """The fingerprint reads the first 4 KiB of a tensor; what a finished unit was made of is known whole."""
    recipe, settings = RECIPES[name]
    sound, out = spoil(llama_copy, where), tmp_path / "out"
    moment = "after the first block is in the journal"
    assert in_child(moment, compress, llama_copy, out, recipe, settings) == KILLED
    (llama_copy / "model.safetensors").write_bytes(sound)
    with pytest.raises(OutputError, match=rf"unfinished run \(2 units done\) of other weights: {where}"):
        compress(llama_copy, out, recipe, settings)
    compress(llama_copy, out, recipe, settings, restart=True)


def test_a_run_goes_on_with_a_copy_of_the_files(unfinished, llama_copy, uninterrupted, tmp_path):
    os.utime(llama_copy / "model.safetensors")
    compress(llama_copy, tmp_path / "out", *RECIPES["static"])
    assert result(tmp_path / "out")[0] == result(uninterrupted["static"])[0]


def test_statistics_do_not_go_on_with_blocks_of_other_bytes(llama_copy, tmp_path):
    sound, out = spoil(llama_copy, "model.layers.0.mlp.down_proj.weight"), tmp_path / "stats"
    assert in_child("listing the first block", collect, llama_copy, out) == KILLED
    (llama_copy / "model.safetensors").write_bytes(sound)
    with pytest.raises(OutputError, match=r"statistics of other weights: model\.layers\.0"):
        collect(llama_copy, out)


@pytest.mark.parametrize("where", ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"])
def test_statistics_of_a_sibling_are_refused(where, llama_copy, tmp_path):
    """Every tensor begins with the same bytes, as in a mixture of which only later experts were trained on."""
    collect(llama_copy, tmp_path / "stats")
    spoil(llama_copy, where)
    with pytest.raises(StatsError, match=f"statistics are of another model: {where} has other bytes"):
        compress(llama_copy, tmp_path / "out", "gptq-w4", SMALL, stats=tmp_path / "stats")
    with pytest.raises(StatsError, match="statistics are of another model"):
        compress(llama_copy, tmp_path / "out", "gptq-w4", SMALL, stats=tmp_path / "stats")


def test_statistics_of_another_tokenizer_are_refused(llama_copy, tmp_path):
    collect(llama_copy, tmp_path / "stats")
    path = llama_copy / "tokenizer.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"truncation": None}, indent=4))
    compress(llama_copy, tmp_path / "out", "gptq-w4", SMALL, stats=tmp_path / "stats")
    vocabulary = values["model"]["vocab"]
    values["model"]["vocab"] = dict(zip(vocabulary, reversed(vocabulary.values()), strict=True))
    path.write_text(json.dumps(values))
    with pytest.raises(StatsError, match="statistics of another tokenizer"):
        compress(llama_copy, tmp_path / "other", "gptq-w4", SMALL, stats=tmp_path / "stats")


def test_the_report_states_the_calibration_that_the_statistics_were_made_with(tiny_llama, tmp_path):
    collect(tiny_llama, tmp_path / "stats")
    settings = ["calibration.samples=99", "calibration.sequence_length=512"]
    report = compress(tiny_llama, tmp_path / "out", "gptq-w4", settings, stats=tmp_path / "stats")
    stated = report.settings["calibration"]
    assert (stated["samples"], stated["sequence_length"]) == (6, 32)
