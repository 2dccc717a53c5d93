"""Several processes share a run: the bytes are those of one process, and a lost one is said once and costs little."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from outlierq.calibrate.collect import ALL_FIELDS, BLOCK_FIELDS
from outlierq.cli.main import run
from outlierq.core.errors import NumbersError, OutlierqError, OutputError, RecipeError
from outlierq.core.model import Fold, InputGroup, LinearSite
from outlierq.core.stats import InputStats
from outlierq.load import open_checkpoint, study
from outlierq.pipeline.block import stats_run as calibration
from outlierq.pipeline.block.data_free import output_beside
from outlierq.pipeline.block.fold import waves
from outlierq.pipeline.block.hidden_files import saved_hidden
from outlierq.pipeline.block.stats_run import Asked, StatsFromRun, in_shards, token_set
from outlierq.pipeline.planning import memory
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.planning.work import Savings
from outlierq.pipeline.processes import ranks
from outlierq.pipeline.processes.ranks import ALONE, Ranks, SeveralRanks, joined
from outlierq.pipeline.processes.sharding import Merging, dealt, shards_of
from outlierq.pipeline.quantize import quantize
from outlierq.recipe import load

SMALL = ("--set", "calibration.samples=8", "--set", "calibration.sequence_length=32")


def of(rank: int, size: int) -> Ranks:
    """One of several ranks that have nobody to talk to."""
    return SeveralRanks(rank, size, None)


@dataclass(frozen=True)
class Ended:
    """How the ranks of a run ended, and all that they said."""

    codes: list[int]
    out: str
    err: str


@pytest.fixture
def start(tmp_path, monkeypatch) -> Callable[..., Ended]:
    """`start(3, "quantize", ...)` runs a command in 3 processes, as torchrun does; `first` is called in each before."""
    monkeypatch.delenv("OUTLIERQ_DEBUG", raising=False)

    def call(size: int, *words: object, first: Callable[[int], object] = lambda rank: None) -> Ended:
        store = torch.distributed.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        group = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
        group["TORCHELASTIC_USE_AGENT_STORE"] = True

        def rank_of(rank: int) -> None:
            os.environ.update({name: str(value) for name, value in (group | {"RANK": rank}).items()})
            sys.argv = ["outlierq", *map(str, words)]
            with open(tmp_path / f"out-{rank}", "w") as out, open(tmp_path / f"err-{rank}", "w") as err:
                sys.stdout = sys.__stdout__ = out
                sys.stderr = sys.__stderr__ = err
                first(rank)
                run()

        forked = multiprocessing.get_context("fork")
        started = [forked.Process(target=rank_of, args=(rank,)) for rank in range(size)]
        for process in started:
            process.start()
        for process in started:
            process.join(100)
            assert process.exitcode is not None, "a rank does not end"
        said = ["".join((tmp_path / f"{name}-{rank}").read_text() for rank in range(size)) for name in ("out", "err")]
        return Ended([process.exitcode for process in started], *said)

    return call


@pytest.fixture(scope="module", autouse=True)
def warm(tiny_llama, tmp_path_factory) -> None:
    """What forked processes would else each import for themselves."""
    plan = make_plan(open_checkpoint(str(tiny_llama)), load("gptq-w4", [word for word in SMALL if "=" in word]))
    quantize(plan, tmp_path_factory.mktemp("warm") / "out")


def result(folder: Path, tools) -> dict[str, str]:
    """What a run wrote, without the report: that holds times."""
    return {name: value for name, value in tools.folder_hashes(folder).items() if name != "outlierq.json"}


@pytest.mark.parametrize(
    ("recipe", "size", "settings"),
    [
        ("gptq-w4", 2, ["calibration.shards=4"]),
        ("awq-gptq-w4", 3, ["calibration.shards=4"]),
        ("rtn-w4", 2, []),
        pytest.param("awq-w4", 2, ["calibration.shards=3", "calibration.mode=sequential"], marks=pytest.mark.slow),
        pytest.param("int8-split", 2, ["calibration.shards=2"], marks=pytest.mark.slow),
        pytest.param("kv-fp8", 2, ["calibration.shards=3"], marks=pytest.mark.slow),
        pytest.param("os-plus-w8a8", 3, ["calibration.shards=3"], marks=pytest.mark.slow),
        pytest.param("rotate-w4a8", 2, ["calibration.shards=2"], marks=pytest.mark.slow),
    ],
)
def test_any_number_of_processes_writes_the_same_bytes(recipe, size, settings, untied_llama, tmp_path, start, tools):
    words = [word for setting in settings for word in ("--set", setting)] + [*(SMALL if settings else ())]
    for count, out in ((1, "one"), (size, "several")):
        ended = start(count, "quantize", untied_llama, "-r", recipe, *words, "-o", tmp_path / out)
        assert ended.codes == [0] * count, ended.err
    assert result(tmp_path / "several", tools) == result(tmp_path / "one", tools)
    assert ended.out.count("written and verified") == 1 and ended.err.count("Plan") <= 1
    one, several = (json.loads((tmp_path / out / "outlierq.json").read_text()) for out in ("one", "several"))
    assert several["machine"]["processes"] == size and several["transforms"] == one["transforms"]
    rows, expected = ([row | {"seconds": 0} for row in report["rows"]] for report in (several, one))
    assert rows == expected and several["notes"] == one["notes"]


@pytest.mark.slow
def test_experts_and_their_routers_are_shared_out(tmp_path, start, tools):
    from test_moe import write_mixture

    model = write_mixture(tmp_path / "mixture", "Qwen3Moe", tools)
    words = ("quantize", model, "-r", "awq-gptq-w4", *SMALL, "--set", "calibration.shards=3", "-q", "-o")
    for count, out in ((1, "one"), (3, "several")):
        ended = start(count, *words, tmp_path / out)
        assert ended.codes == [0] * count, ended.err
    assert result(tmp_path / "several", tools) == result(tmp_path / "one", tools)
    one, several = (json.loads((tmp_path / out / "outlierq.json").read_text())["notes"] for out in ("one", "several"))
    assert one == several and any("experts got" in text for text in one)


def test_a_ceiling_holds_for_every_process_and_leaves_the_bytes_as_they_are(
    untied_llama, tmp_path, start, tools, monkeypatch
):
    """Here the savings that change nothing: hidden states in a file, and a pass for every input of a block."""
    words = ("quantize", untied_llama, "-r", "gptq-w4", *SMALL, "--set", "calibration.shards=3", "-q")
    refused = start(2, *words, "--max-memory", "300MiB", "-o", tmp_path / "several")
    assert refused.codes == [1, 1] and refused.err.count("MiB or more") == 1
    assert start(1, *words, "-o", tmp_path / "one").codes == [0]
    monkeypatch.setattr(memory, "choose", lambda work, ceiling: Savings(spill_bytes=0, stats_bytes=1))
    ended = start(2, *words, "--max-memory", "4GiB", "-o", tmp_path / "several")
    assert ended.codes == [0, 0], ended.err
    assert result(tmp_path / "several", tools) == result(tmp_path / "one", tools)
    notes = json.loads((tmp_path / "several" / "outlierq.json").read_text())["notes"]
    assert any("a block with more is run several times" in note for note in notes)


def test_statistics_of_several_processes_are_those_of_one(tiny_llama, tmp_path, start, tools):
    words = ("--samples", 7, "--sequence-length", 32, "--set", "calibration.shards=4")
    for count, out in ((1, "one"), (3, "several")):
        ended = start(count, "calibrate", tiny_llama, *words, "-o", tmp_path / out)
        assert ended.codes == [0] * count, ended.err
    assert tools.folder_hashes(tmp_path / "several") == tools.folder_hashes(tmp_path / "one")


def doom(rank: int, block: int, end: Callable[[], object]) -> Callable[[int], None]:
    """When this rank has calibrated this block, it meets its end."""

    def first(here: int) -> None:
        collect = StatsFromRun._collect

        def collected(self: StatsFromRun, index: int) -> object:
            found = collect(self, index)
            if index == block:
                end()
            return found

        if here == rank:
            StatsFromRun._collect = collected

    return first


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process_is_named_once_and_others_take_up_the_run(lost, untied_llama, tmp_path, start, tools):
    words = ("quantize", untied_llama, "-r", "gptq-w4", *SMALL, "-q", "-o")
    ended = start(3, *words, tmp_path / "out", first=doom(lost, 1, killed))
    assert ended.codes == [1 if rank != lost else -signal.SIGKILL for rank in range(3)]
    assert ended.err.count("error:") == 1 and "Traceback" not in ended.err
    assert f"rank {lost} of 3 was lost in model.layers.1" in ended.err
    assert "any number of ranks" in ended.err
    assert start(2, *words, tmp_path / "out").codes == [0, 0]
    assert start(1, *words, tmp_path / "whole", "--set", "calibration.shards=3").codes == [0]
    assert result(tmp_path / "out", tools) == result(tmp_path / "whole", tools)
    notes = json.loads((tmp_path / "out" / "outlierq.json").read_text())["notes"]
    assert any("ran in 3 shards; with calibration.shards=3" in text for text in notes)


def test_saved_hidden_states_are_taken_up_by_another_number_of_processes(
    untied_llama, tmp_path, start, tools, monkeypatch
):
    monkeypatch.setattr(calibration, "SAVE_EVERY_SECONDS", 0.0)
    words = ("quantize", untied_llama, "-r", "gptq-w4", *SMALL, "--set", "calibration.shards=3", "-q", "-o")
    start(3, *words, tmp_path / "out", first=doom(1, 2, killed))
    saved = saved_hidden(tmp_path / "out.partial")
    assert len(saved) == 3

    def not_again(self, module, index, *args, **options):
        assert index == 2, "a block ran again"
        return original(self, module, index, *args, **options)

    original = calibration.BlockRunner.run
    monkeypatch.setattr(calibration.BlockRunner, "run", not_again)
    assert start(2, *words, tmp_path / "out").codes == [0, 0]
    monkeypatch.undo()
    start(1, *words, tmp_path / "whole")
    assert result(tmp_path / "out", tools) == result(tmp_path / "whole", tools)


def test_a_process_lost_without_statistics_costs_no_finished_unit(untied_llama, tmp_path, start, tools):
    def first(rank: int) -> None:
        give = SeveralRanks.send

        def sent(self: SeveralRanks, value: object, to: int) -> None:
            killed() if getattr(value, "name", "") == "block-00002" else give(self, value, to)

        SeveralRanks.send = sent

    words = ("quantize", untied_llama, "-r", "rtn-w4", "-q", "-o")
    ended = start(2, *words, tmp_path / "out", first=first)
    assert ended.codes == [1, -signal.SIGKILL] and ended.err.count("rank 1 of 2 was lost") == 1
    assert start(3, *words, tmp_path / "out").codes == [0, 0, 0]
    assert start(1, *words, tmp_path / "whole").codes == [0]
    assert result(tmp_path / "out", tools) == result(tmp_path / "whole", tools)


@pytest.mark.slow
def test_a_process_that_falls_silent_ends_the_others(tiny_llama, tmp_path, start):
    def first(rank: int) -> None:
        ranks.SILENT_SECONDS = 3.0
        (tmp_path / f"pid-{rank}").write_text(str(os.getpid()))
        doom(1, 0, lambda: os.kill(os.getpid(), signal.SIGSTOP))(rank)

    # The silent one never ends by itself.
    threading.Timer(30.0, lambda: os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGKILL)).start()
    ended = start(2, "quantize", tiny_llama, *SMALL, "-q", "-o", tmp_path / "out", first=first)
    assert ended.codes[0] == 1 and ended.err.count("rank 1 of 2 has said nothing for 3 s") == 1


def test_an_error_of_one_process_is_said_once(tiny_llama, tmp_path, start):
    def fail() -> None:
        raise NumbersError("3 of 7 values are not finite")

    ended = start(3, "quantize", tiny_llama, *SMALL, "-q", "-o", tmp_path / "out", first=doom(2, 0, fail))
    assert ended.codes == [1, 1, 1]
    assert ended.err.count("error:") == 1 and "3 of 7 values are not finite" in ended.err


def test_an_error_of_all_processes_is_said_once(tiny_llama, tmp_path, start):
    ended = start(3, "quantize", tiny_llama, "-r", "gtpq-w4", "-o", tmp_path / "out")
    assert ended.codes == [1, 1, 1] and ended.err.count("did you mean 'gptq-w4'") == 1
    ended = start(2, "quantize", tiny_llama, "--no-such-option", "-o", tmp_path / "out")
    assert ended.codes == [2, 2] and ended.err.count("No such option") == 1


def test_a_terminated_run_is_said_once(tiny_llama, tmp_path, start):
    def stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    ended = start(2, "quantize", tiny_llama, *SMALL, "-q", "-o", tmp_path / "out", first=doom(1, 0, stop))
    assert ended.codes == [1, 1] and ended.err.count("stopped; run the same command again") == 1
    assert "lost" not in ended.err


def test_what_one_process_must_do_is_refused_for_several(tiny_llama, tmp_path, start):
    ended = start(2, "eval", tiny_llama)
    assert ended.codes == [1, 1] and ended.err.count("eval runs in one process, and 2 were started") == 1
    start(1, "quantize", tiny_llama, "-r", "rtn-w4", "-o", tmp_path / "packed")
    ended = start(2, "quantize", tmp_path / "packed", "--format", "gptq", "-o", tmp_path / "out")
    assert ended.codes == [1, 1] and ended.err.count("needs one process") == 1


def test_another_number_of_shards_does_not_go_on(untied_llama, tmp_path, start):
    words = ("quantize", untied_llama, "-r", "gptq-w4", *SMALL, "-q", "-o", tmp_path / "out")
    start(1, *words, "--set", "calibration.shards=2", first=doom(0, 1, killed))
    ended = start(2, *words, "--set", "calibration.shards=4")
    assert ended.codes == [1, 1] and "unfinished run with another shards" in ended.err


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
        ({"WORLD_SIZE": "2"}, "do not say where the others are"),
        ({"WORLD_SIZE": "2", "RANK": "first", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "where the others are"),
    ],
)
def test_a_wrong_environment_is_refused(environment, message, monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OutlierqError, match=message), joined():
        pass


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as one:
        assert one is ALONE and one.lead
        assert (one.first(lambda: 7), one.gather(8), one.share(9)) == (7, [8], [9])


def test_tensors_of_all_kinds_arrive_as_they_were_sent():
    grid = torch.arange(12.0).view(3, 4)
    sent = {
        "transposed": grid.T,
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "none": torch.empty(0, 3),
        "codes": grid.to(torch.int8),
        "float8": grid.to(torch.float8_e4m3fn),
        "half": (grid.bfloat16(), [grid > 3, None]),
        "stats": InputStats(5, 2, hessian=grid),
    }
    parcels: list[torch.Tensor] = []
    one, other = of(0, 2), of(1, 2)
    one._transfer(sent, lambda tensor, group: parcels.append(tensor.clone()))
    found = other._arrive(lambda tensor, group: tensor.copy_(parcels.pop(0)))
    assert not parcels and found.keys() == sent.keys()
    flat = [found["stats"].hessian, found["half"][0], found["half"][1][0], *(found[n] for n in list(sent)[:5])]
    meant = [grid, grid.bfloat16(), grid > 3, *(sent[name] for name in list(sent)[:5])]
    for mine, theirs in zip(flat, meant, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        assert mine.contiguous().view(-1).view(torch.uint8).equal(theirs.contiguous().view(-1).view(torch.uint8))
    assert found["half"][1][1] is None and found["stats"].tokens == 5


@pytest.mark.parametrize("shards", [1, 2, 3, 5, 8, 13])
def test_sums_are_made_in_one_order_however_shards_are_dealt(shards):
    torch.manual_seed(shards)
    parts = [
        InputStats(3 + n, 1, hessian=torch.randn(4, 4), sum_x=torch.randn(4).double() * 10.0**n) for n in range(shards)
    ]
    ids = torch.arange(2 * shards + 1)[:, None]
    found = []
    for size in (1, 2, 3, 4, 7):
        whole, seen = Merging(shards), []
        for rank in range(size):
            mine = Merging(shards)
            for shard in shards_of(ids, shards, of(rank, size)):
                mine.add(
                    (0, shard.index), {"group": parts[shard.index]} | {f"expert {shard.index}": parts[shard.index]}
                )
                seen += shard.ids[:, 0].tolist()
            for node, stats in mine.nodes.items():
                whole.add(node, dict(stats))
        assert seen == list(range(2 * shards + 1))
        (root,) = whole.nodes.values()
        found.append(root)
        assert all(root[f"expert {n}"] is parts[n] for n in range(shards))
    assert all(torch.equal(each["group"].hessian, found[0]["group"].hessian) for each in found)
    assert all(torch.equal(each["group"].sum_x, found[0]["group"].sum_x) for each in found)
    total = sum(part.hessian * part.tokens for part in parts) / sum(part.tokens for part in parts)
    assert torch.allclose(found[0]["group"].hessian, total, atol=1e-5)


def source_of(model: Path, work: Path, shards: int) -> StatsFromRun:
    small = ["calibration.samples=8", "calibration.sequence_length=32", "calibration.batch_size=2"]
    checkpoint, settings = open_checkpoint(str(model)), load("gptq-w4", [*small, f"calibration.shards={shards}"])
    studied = study(checkpoint)
    tokens = token_set(studied, settings.calibration)
    return StatsFromRun(studied, tokens, settings.calibration, work, asked=Asked(ALL_FIELDS | BLOCK_FIELDS))


def test_shards_have_the_statistics_of_the_whole_text(tiny_llama, tmp_path):
    whole, cut = source_of(tiny_llama, tmp_path, 1), source_of(tiny_llama, tmp_path, 4)
    sampled = {"rows", "log2_histogram"}  # other tokens are drawn; the batches, and so all else, are the same
    for index in (0, 1):
        (groups, expected), (same, found) = whole.block(index), cut.block(index)
        assert groups == same and found.keys() == expected.keys() and len(found) == 4
        for name, stats in expected.items():
            assert (found[name].tokens, found[name].sequences) == (stats.tokens, 8)
            assert stats.tokens == 256 or index == 0, "the first block sees tokens that the text does not hold"
            for field, value in stats.tensors().items():
                mine = getattr(found[name], field)
                assert mine.shape == value.shape and mine.dtype == value.dtype, field
                if field not in sampled:
                    assert torch.allclose(mine.double(), value.double(), rtol=1e-5, atol=1e-6), field
            rows = found[name].log2_histogram.sum(1)
            assert (rows == rows[0]).all() and abs(rows[0] - 256 // 3) <= 4
        one, several = whole.block_stats(index).tensors(), cut.block_stats(index).tensors()
        assert one.keys() == several.keys()
        for field in one.keys() - {"residual_median", "residual_kurtosis"}:
            assert torch.allclose(one[field].double(), several[field].double(), rtol=1e-5, atol=1e-6), field
        for field in ("residual_median", "residual_kurtosis"):
            assert torch.allclose(one[field], several[field], rtol=0.2), field
        for source in (whole, cut):
            source.finished(index, dict)
    one, several = whole.logits().tensors(), cut.logits().tensors()
    assert all(torch.equal(one[field], several[field]) for field in one)


def sites(*shapes: tuple[int, int], block: int = 0) -> tuple[LinearSite, ...]:
    return tuple(LinearSite(f"l{n}", f"l{n}.weight", None, out, inner, block) for n, (out, inner) in enumerate(shapes))


def test_the_dearest_group_has_a_rank_for_itself():
    q, o, up, down = sites((64, 64), (64, 64), (192, 64), (64, 256))
    groups = [InputGroup(site.module, (site,)) for site in (q, o, up, down)]
    assert dealt(groups, of(0, 2)) == dealt(groups, of(1, 2)) == {"l3": 0, "l2": 1, "l0": 1, "l1": 1}
    assert set(dealt(groups, ALONE).values()) == {0}


def test_the_experts_of_a_group_are_dealt_apart_from_it():
    shared, *experts = sites((64, 64), *[(96, 64)] * 4)
    parts = tuple(InputGroup(site.module, (site,), routed=True) for site in experts)
    owners = dealt([InputGroup("l0", (shared, *experts), parts=parts)], of(0, 2))
    assert sorted(owners[part.name] for part in parts) == [0, 0, 1, 1] and owners.keys() == {
        "l0",
        "l1",
        "l2",
        "l3",
        "l4",
    }


def test_a_choice_waits_for_what_it_reads_and_for_nothing_else():
    q, v, o, up, down = sites((64, 64), (64, 64), (64, 64), (96, 64), (64, 96))
    norm = {"norm": Fold("norm", "norm.weight", None, tuple(range(64)))}
    attention = InputGroup("l0", (q, v), norm["norm"])
    output = InputGroup("l2", (o,), Fold("linear", "l1.weight", None, tuple(range(64))))
    feed = InputGroup("l3", (up,), Fold("norm", "norm2.weight", None, tuple(range(64))))
    inner = InputGroup("l4", (down,), Fold("linear", "l3.weight", None, tuple(range(96))))
    bare = InputGroup("l5", (q,))
    assert waves([attention, output, feed, inner]) == [[attention, output, feed, inner]]
    # Turned round, the fold into v comes before the choice that reads v.
    assert waves([output, attention, bare]) == [[output, bare], [attention]]
    assert waves([output, attention, feed, inner]) == [[output, feed, inner], [attention]]
    assert waves([inner, output, feed, attention]) == [[inner, output], [feed, attention]]


def test_a_number_of_shards_is_found_or_refused():
    settings = load("gptq-w4").calibration
    assert in_shards(settings, 100, ALONE, None)[0].shards == 1 and in_shards(settings, 100, ALONE, None)[1] == ""
    assert in_shards(settings, 100, of(0, 4), None)[0].shards == 4
    assert in_shards(settings, 3, of(0, 4), None)[0].shards == 3
    assert in_shards(settings, 100, of(0, 4), 2)[0].shards == 2
    assert "2 of 4 processes had none" in in_shards(settings, 100, of(0, 4), 2)[1]
    wanted = settings.model_copy(update={"shards": 8})
    assert in_shards(wanted, 100, of(0, 4), None) == (wanted, "")
    with pytest.raises(RecipeError, match=r"calibration\.shards is 8, but there are only 6 windows"):
        in_shards(wanted, 6, ALONE, None)


def test_the_number_of_shards_is_no_part_of_the_recipe_that_a_run_is_known_by():
    assert load("gptq-w4", ["calibration.shards=4"]).fingerprint == load("gptq-w4").fingerprint
    assert load("gptq-w4", ["calibration.samples=4"]).fingerprint != load("gptq-w4").fingerprint


def test_a_machine_that_does_not_see_the_output_folder_says_so(tmp_path):
    with pytest.raises(OutputError, match=r"rank 1 of 2 does not see .*out.partial"):
        output_beside(None, tmp_path / "out.partial", of(1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("end", ["", "SIGKILL"])
def test_torchrun_starts_it(end, untied_llama, tmp_path, tools):
    words = ["quantize", str(untied_llama), "-r", "gptq-w4", *SMALL, "--set", "calibration.shards=4", "-q", "-o"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    doomed = [str(Path(__file__).with_name("doomed_rank.py")), "1", "1", end]
    if end:
        ended = subprocess.run([*launcher, "3", *doomed, *words, tmp_path / "out"], capture_output=True, text=True)
        assert ended.returncode == 1
        assert ended.stderr.count("error: rank 1 of 3 was lost in model.layers.1") == 1
    ended = subprocess.run(
        [*launcher, "4", "-m", "outlierq", *words, tmp_path / "out"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    subprocess.run([sys.executable, "-m", "outlierq", *words, tmp_path / "one"], check=True)
    assert result(tmp_path / "out", tools) == result(tmp_path / "one", tools)


@pytest.mark.slow
def test_two_machines_share_a_run(untied_llama, tmp_path, tools):
    words = ["quantize", str(untied_llama), "-r", "awq-gptq-w4", *SMALL, "--set", "calibration.shards=4", "-q", "-o"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = ["--nnodes", "2", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", port]
    launcher = [sys.executable, "-m", "torch.distributed.run", *group, "--node-rank"]
    machines = [
        subprocess.Popen([*launcher, str(number), "-m", "outlierq", *words, tmp_path / "out"]) for number in (0, 1)
    ]
    assert [machine.wait(200) for machine in machines] == [0, 0]
    subprocess.run([sys.executable, "-m", "outlierq", *words, tmp_path / "one"], check=True)
    assert result(tmp_path / "out", tools) == result(tmp_path / "one", tools)
