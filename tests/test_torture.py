"""A few kills and faults of scripts/torture.py, and that its disk and its checks would notice what is wrong."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import torture
from power_cut import CUT, Disk, cut_power, failing, kill

from outlierq.export.writer import ShardWriter
from outlierq.load import open_checkpoint
from outlierq.pipeline.ledger.journal import Journal
from outlierq.pipeline.planning.decide import make_plan
from outlierq.recipe import load

OLD, NEW = b"o" * 4000, b"n" * 4000


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What all trials share."""
    with torture.bench(tmp_path_factory.mktemp("torture").resolve()) as made:
        yield made


def after_a_cut(root: Path, work: Callable[[Path], object], at: int, seed: int) -> Path:
    """The folder as it is when the power was cut at an operation of `work`; `root` itself when it came to its end."""
    child = os.fork()
    if child == 0:
        Disk(root, at, cut_power, seed).install()
        work(root)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, CUT)
    return root.with_name(root.name + ".cut") if code == CUT else root


def replaced(root: Path, *, synced: bool) -> None:
    """Give a file a new content the usual way, under another name first; then make a folder."""
    handle = os.open(root / "new", os.O_WRONLY | os.O_CREAT)
    os.pwrite(handle, NEW, 0)
    if synced:
        os.fsync(handle)
    os.close(handle)
    os.replace(root / "new", root / "file")
    os.mkdir(root / "done")


def overwritten(root: Path) -> None:
    """Write over the file in its place, and make a folder."""
    handle = os.open(root / "file", os.O_WRONLY)
    os.pwrite(handle, NEW, 0)
    os.mkdir(root / "done")


@pytest.fixture
def cuts(tmp_path):
    """What the file holds after cuts at some operations of `work`: a function."""

    def found(work: Callable[[Path], object], operations: tuple[int, ...]) -> set[bytes]:
        contents = set()
        for trial in range(20):
            root = tmp_path / str(trial)
            root.mkdir()
            (root / "file").write_bytes(OLD)
            contents.add((after_a_cut(root, work, operations[trial % len(operations)], trial) / "file").read_bytes())
        return contents

    return found


def test_after_a_cut_a_file_that_was_synced_and_renamed_is_old_or_new(cuts):
    assert cuts(lambda root: replaced(root, synced=True), (1, 2, 3, 4, 5)) == {OLD, NEW}


def test_after_a_cut_a_file_that_was_renamed_without_a_sync_may_be_empty(cuts):
    assert b"" in cuts(lambda root: replaced(root, synced=False), (4,))


def test_after_a_cut_a_file_that_was_written_in_its_place_is_old_new_or_a_mixture(cuts):
    contents = cuts(overwritten, (3,))
    assert {OLD, NEW} < contents and all(len(content) == len(OLD) for content in contents)


def test_a_disk_that_fails_does_so_at_the_operation_that_was_chosen(tmp_path):
    def outcome(at: int, lasting: bool) -> int:
        child = os.fork()
        if child == 0:
            disk = Disk(tmp_path, at, failing(errno.EIO, lasting=lasting)).install()
            failed = 0
            for name in "abc":
                try:
                    os.mkdir(tmp_path / f"{at}{lasting}{name}")
                except OSError:
                    failed += 1
            os._exit(10 * disk.count + failed)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert outcome(2, lasting=False) == 31 and outcome(2, lasting=True) == 32 and outcome(9, lasting=True) == 30


def test_kills_end_in_the_same_bytes(made):
    """Each job once, so that every way to go on is taken."""
    for number, job in enumerate(("data-free", "static", "calibrate", "gated", "publish")):
        torture.killed_and_continued(made, job, 1 + number % 2, Random(f"test {job}"))


@pytest.mark.parametrize(
    ("job", "fault"),
    [
        ("static", "disk too small"),
        ("data-free", "disk read-only"),
        ("calibrate", "disk reports an error once"),
        ("sequential", "source changes"),
        ("data-free", "source cannot be read"),
        ("static", "SIGTERM"),
        ("data-free", "SIGINT"),
        ("publish", "hub breaks"),
    ],
)
def test_a_fault_ends_with_an_explanation_and_the_run_goes_on_later(made, job, fault):
    met = torture.ends_cleanly(made, job, fault, Random(f"{job} {fault}"))
    assert met or fault not in ("disk too small", "disk read-only")


def test_time_spent_before_a_stop_is_in_the_report(made):
    root = torture.fresh_disk(made)
    at = int(0.7 * made.operations["static"])
    ended = torture.run(made, "static", root, disk=Disk(root, at, lambda *_: signal.raise_signal(signal.SIGTERM)))
    assert ended.code == 1 and "run the same command again to continue" in ended.said
    _, spent = torture._progress(root)
    assert spent > 0
    torture.run(made, "static", root)
    whole = torture.seconds_in_report(root)
    assert whole > spent


def test_a_run_that_does_not_sync_its_weights_is_caught(made, monkeypatch):
    monkeypatch.setattr(ShardWriter, "sync", lambda self: None)
    last = made.operations["data-free"]
    with pytest.raises(torture.WrongEndError, match="it did not continue"):
        for at in range(last - 1, last // 2, -1):
            root = torture.fresh_disk(made)
            torture.run(made, "data-free", root, disk=Disk(root, at, cut_power, at))
            if root.with_name("disk.cut").exists():
                torture.shutil.rmtree(root)
                root.with_name("disk.cut").rename(root)
                torture.finished(made, "data-free", root)


def test_a_source_that_is_written_to_is_caught(made):
    root = torture.fresh_disk(made)
    torture.run(made, "data-free", root, lambda: (made.source / ".note").write_text("x"))
    with pytest.raises(torture.WrongEndError, match="the source was changed"):
        torture.compare(made, "data-free", root)
    torture.repair(made)


def test_a_killed_process_leaves_what_it_wrote(tmp_path):
    child = os.fork()
    if child == 0:
        Disk(tmp_path, 2, kill).install()
        (tmp_path / "file").write_bytes(NEW)
        os.mkdir(tmp_path / "folder")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert (tmp_path / "file").read_bytes() == NEW


def test_a_run_that_was_stopped_before_its_gate_was_measured_goes_on_there(made):
    for at in range(made.operations["gated"] - 1, 0, -1):  # the last steps put away what is no longer needed
        root = torture.fresh_disk(made)
        torture.run(made, "gated", root, disk=Disk(root, at, kill))
        if made.result("gated", root) != made.expected["gated"]:
            break
    assert made.result("gated", root) is not None
    torture.finished(made, "gated", root)
    torture.compare(made, "gated", root)


def test_inspect_says_how_far_a_stopped_run_and_a_stopped_calibration_came(made, outlierq):
    for job, said in (("static", "units done"), ("calibrate", "blocks done")):
        root = torture.fresh_disk(made)
        torture.run(made, job, root, disk=Disk(root, int(0.8 * made.operations[job]), kill))
        answer = outlierq("inspect", root / "out")
        assert answer.code == 0 and said in answer.out and "unfinished" in answer.out


def test_shards_that_another_recipe_left_get_the_size_that_is_planned(made, tmp_path):
    for recipe in ("rtn-w8", "rtn-w4"):
        layout = make_plan(open_checkpoint(str(made.source)), load(recipe)).layout
        ShardWriter(tmp_path, layout).close()
        assert {path.name: path.stat().st_size for path in tmp_path.iterdir()} == layout.sizes


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."), "not enough memory"),
        (MemoryError(), "not enough memory"),
        (OSError(errno.EIO, "Input/output error", "weights"), "weights: Input/output error"),
    ],
)
def test_what_the_machine_cannot_do_is_no_traceback(error, said, outlierq, tiny_llama, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr("outlierq.pipeline.compress.make_plan", fails)
    answer = outlierq("quantize", tiny_llama, "-o", tmp_path / "out")
    assert answer.code == 1 and said in answer.err and "run the same command again" in answer.err


def test_a_fault_of_ours_keeps_its_traceback(outlierq, tiny_llama, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("outlierq.pipeline.compress.make_plan", fails)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        outlierq("quantize", tiny_llama, "-o", tmp_path / "out")


BY_A_GATE = {"unwritable caches": 12}  # by `eval` in processes of its own takes ten seconds


@pytest.mark.parametrize(
    ("kind", "seed"),
    [
        *((kind, BY_A_GATE.get(kind, f"test {kind}")) for kind in torture.AROUND),
        pytest.param("unwritable caches", "test unwritable caches", marks=pytest.mark.slow),
    ],
)
def test_what_lies_or_fails_around_a_run_ends_well(made, kind, seed):
    ended = torture.trial_around(made, kind, Random(seed))
    assert ended and (seed not in BY_A_GATE.values() or ended.endswith("gate"))


def test_a_run_that_removes_foreign_files_is_caught(made, monkeypatch):
    from outlierq.pipeline.ledger import folder

    monkeypatch.setattr(folder, "_refuse_foreign", lambda work: None)
    monkeypatch.setattr(folder, "_clear", lambda work, but: [p.unlink() for p in work.iterdir() if p.name not in but])
    with pytest.raises(torture.WrongEndError, match="LOST"):
        for seed in range(20):
            torture.trial_around(made, "foreign files", Random(seed))


def test_a_run_that_goes_on_with_other_weights_is_caught(made, monkeypatch):
    monkeypatch.setattr(Journal, "check_source", lambda journal, checkpoint: None)
    with pytest.raises(torture.WrongEndError, match="continued to a mixture"):
        for seed in range(30):
            torture.trial_around(made, "exchanged source", Random(seed))
