"""A ceiling on memory: what is done to stay below it leaves the result as it is, or says that it may not."""

from __future__ import annotations

import itertools
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from conftest import write_llama
from reference.statistics import correlated_inputs, random_weight, statistics_of
from safetensors.torch import load_file

from outlierq.calibrate.runner import BlockRunner, HiddenStates, Spill
from outlierq.calibrate.stored.spilled import SpilledStats, each_changed
from outlierq.core.errors import OutlierqError, OutputError
from outlierq.core.model import InputGroup, LinearSite
from outlierq.core.scheme import QuantScheme
from outlierq.core.stats import InputStats
from outlierq.load import load_model, open_checkpoint
from outlierq.load.model import skeleton
from outlierq.load.source.folder import FolderCheckpoint
from outlierq.ops.hadamard import Rotation
from outlierq.ops.search import scale_search, sweep
from outlierq.pipeline import quantize as quantizing
from outlierq.pipeline.asked.resources import Resources
from outlierq.pipeline.block.sources import stats_source
from outlierq.pipeline.planning import memory, phases
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.planning.memory import choose, in_passes, smallest_ceiling
from outlierq.pipeline.planning.phases import BASE_BYTES, method_bytes, peaks
from outlierq.pipeline.planning.work import NO_SAVINGS, Savings, work_of
from outlierq.pipeline.processes.ranks import Ranks
from outlierq.pipeline.quantize import quantize
from outlierq.quantize import stage
from outlierq.recipe import load
from outlierq.registry import COPIES, methods
from outlierq.transform.rotate import Change, Spin

SMALL = ["calibration.samples=6", "calibration.sequence_length=32", "calibration.batch_size=4"]
HARMLESS = Savings(spill_bytes=0, stats_bytes=1)
LAST_BITS = {"rows": Savings(most_weights=1 << 11), "batch": Savings(batch_size=1)}


def planned(source: Path, recipe: str = "gptq-w4", *settings: str):
    return make_plan(open_checkpoint(str(source)), load(recipe, [*SMALL, *settings]))


def compress(source: Path, out: Path, recipe: str = "gptq-w4", *settings: str, **options):
    return quantize(planned(source, recipe, *settings), out, **options)


@pytest.fixture
def forced(monkeypatch):
    """From now on every ceiling is met by these savings."""

    def force(savings: Savings) -> None:
        monkeypatch.setattr(memory, "choose", lambda work, ceiling: savings)

    return force


@pytest.fixture(scope="module")
def usual(tiny_llama, tmp_path_factory):
    """Folders of runs without a ceiling, by recipe and mode. Read-only."""
    made = {}

    def run(recipe: str, *settings: str) -> Path:
        key = (recipe, *settings)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("usual") / "out"
            compress(tiny_llama, made[key], recipe, *settings)
        return made[key]

    return run


def weights(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.glob("*.safetensors")))


@pytest.mark.parametrize(
    "recipe",
    [("gptq-w4",), ("gptq-w4", "calibration.mode=sequential"), ("awq-gptq-w4",), ("w8a8-static",)],
    ids=" ".join,
)
def test_spilling_and_several_passes_leave_every_byte_as_it_is(
    recipe, tiny_llama, tmp_path, usual, forced, monkeypatch
):
    expected = weights(usual(*recipe))
    hidden, runs = [], []
    make, run = BlockRunner._hidden_states, BlockRunner.run

    def watched_make(self, sequences, shape):
        hidden.append(make(self, sequences, shape))
        return hidden[-1]

    def watched_run(self, module, index, states, collect=None, **options):
        runs.extend([index] if collect else [])
        return run(self, module, index, states, collect, **options)

    monkeypatch.setattr(BlockRunner, "_hidden_states", watched_make)
    monkeypatch.setattr(BlockRunner, "run", watched_run)
    forced(HARMLESS)
    compress(tiny_llama, tmp_path / "out", *recipe, resources=Resources(max_memory=1))
    assert weights(tmp_path / "out") == expected
    assert hidden and all(states.spilled for states in hidden)
    groups = 4  # queries, keys and values; the output of attention; gate and up; down
    unseen = 0 if recipe == ("w8a8-static",) else groups  # extremes are of text alone
    assert runs == [0] * (groups + unseen) + [1] * groups


@pytest.mark.parametrize("saving", LAST_BITS)
def test_parts_of_stacks_and_of_batches_change_no_more_than_last_bits(
    saving, tiny_llama, tmp_path, usual, forced, monkeypatch
):
    before = json.loads((usual("gptq-w4") / "outlierq.json").read_text())
    sizes, sequences = watch_sizes(monkeypatch), watch_sequences(monkeypatch)
    forced(LAST_BITS[saving])
    report = compress(tiny_llama, tmp_path / "out", resources=Resources(max_memory=1))
    usual_errors = [row["output_error"] for row in before["rows"] if row["output_error"] is not None]
    errors = [row.output_error for row in report.rows if row.output_error is not None]
    assert len(errors) == len(usual_errors) > 0
    assert sum(errors) == pytest.approx(sum(usual_errors), rel=0.02)
    assert any("may change last bits" in note for note in report.notes)
    assert max(sizes) <= (LAST_BITS[saving].most_weights or 1 << 20)
    assert set(sequences) == ({1} if saving == "batch" else {4, 3, 2})


def watch_sizes(monkeypatch) -> list[int]:
    """Weights of every stack that a method is given from now on."""
    sizes, original = [], stage.quantize_group

    def watched(weights, schemes, stats, method, options, **more):
        def function(w, *args, **keywords):
            sizes.append(w.numel())
            return method.function(w, *args, **keywords)

        return original(weights, schemes, stats, replace(method, function=function), options, **more)

    monkeypatch.setattr(quantizing, "quantize_group", watched)
    return sizes


def watch_sequences(monkeypatch) -> list[int]:
    """Sequences of every batch that runs from now on."""
    sequences, original = [], BlockRunner.forward

    def watched(self, module, index, batch, hidden):
        sequences.append(len(hidden))
        return original(self, module, index, batch, hidden)

    monkeypatch.setattr(BlockRunner, "forward", watched)
    return sequences


def test_a_run_is_not_continued_with_other_last_bits(tiny_llama, tmp_path, forced, monkeypatch):
    out = tmp_path / "out"
    forced(LAST_BITS["batch"])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(quantizing._Run, "block", lambda self, block: (_ for _ in ()).throw(KeyboardInterrupt))
        compress(tiny_llama, out, resources=Resources(max_memory=1))
    with pytest.raises(OutputError, match="batch_size"):
        compress(tiny_llama, out)
    forced(replace(HARMLESS, batch_size=1))  # the harmless ones may change
    compress(tiny_llama, out, resources=Resources(max_memory=1))


def test_the_tables_are_not_read_whole_before_the_first_block(untied_llama, tmp_path, monkeypatch):
    whole, rows = [], []
    read_many, some = FolderCheckpoint.read_many, FolderCheckpoint.read_some_rows
    monkeypatch.setattr(
        FolderCheckpoint, "read_many", lambda self, names: whole.extend(names := list(names)) or read_many(self, names)
    )
    monkeypatch.setattr(
        FolderCheckpoint, "read_some_rows", lambda self, name, wanted: rows.append(name) or some(self, name, wanted)
    )
    source = stats_source(planned(untied_llama), tmp_path)
    source.start()
    assert set(rows) == {"model.embed_tokens.weight"}
    assert whole and not {"model.embed_tokens.weight", "lm_head.weight"} & set(whole)
    full = load_file_of(untied_llama, "model.embed_tokens.weight")
    assert torch.equal(source.shards[0].hidden.values, full[source.tokens.ids])
    assert source.model.model.embed_tokens.weight.shape == full.shape


def load_file_of(folder: Path, name: str) -> torch.Tensor:
    """A tensor of a checkpoint, by the safetensors library."""
    return next(found[name] for path in folder.glob("*.safetensors") if name in (found := load_file(path)))


def group(name: str, width: int) -> InputGroup:
    return InputGroup(name, (LinearSite(name, f"{name}.weight", None, 8, width, 0),))


def test_every_group_is_in_one_pass_and_no_pass_is_too_large():
    groups = [group(name, width) for name, width in (("a", 8), ("b", 8), ("c", 32), ("d", 4), ("e", 4))]
    most = 2 * 4 * 8**2
    passes = in_passes(groups, most)
    assert [each for some in passes for each in some] == groups
    sizes = [[4 * each.sites[0].in_features ** 2 for each in some] for some in passes]
    assert all(sum(some) <= most or len(some) == 1 for some in sizes)
    assert len(passes) == 3  # a and b; c, too large by itself; d and e
    assert in_passes(groups, None) == [groups]


def test_a_higher_ceiling_needs_no_more_savings_and_harmless_ones_come_first(tiny_llama):
    # Long text, so that every saving has something to save.
    work = work_of(planned(tiny_llama, "gptq-w4", "calibration.samples=4000", "calibration.sequence_length=512"))
    least, most = smallest_ceiling(work), max(peaks(work, NO_SAVINGS).values())
    assert least < most
    assert choose(work, most) == NO_SAVINGS
    assert choose(work, most - 1).identity == {} and choose(work, most - 1).spill_bytes == 0
    for ceiling in range(least, most, (most - least) // 20):
        assert max(peaks(work, choose(work, ceiling)).values()) <= ceiling


def test_a_ceiling_that_cannot_be_met_is_refused_with_the_least_that_can(tiny_llama):
    work = work_of(planned(tiny_llama))
    with pytest.raises(OutlierqError, match=r"6\d\d MiB") as refused:
        choose(work, 300 << 20)
    named = int(re.search(r"(\d+)MiB or more", str(refused.value))[1])
    choose(work, named << 20)
    with pytest.raises(OutlierqError):
        choose(work, (named - 1) << 20)


def test_what_does_not_fit_is_refused_by_every_command(tiny_llama, tmp_path, outlierq):
    assert outlierq("eval", tiny_llama, "--tasks", "wikitext", "--max-memory", "8GiB").code == 2
    measured = outlierq("eval", tiny_llama, "--max-memory", "100MiB")
    assert measured.code == 1 and "too little to measure" in measured.err
    gate = outlierq("quantize", tiny_llama, "--max-memory", "601MiB", "--max-kl", "1", "-o", tmp_path / "out")
    assert gate.code == 1 and "too little" in gate.err and not (tmp_path / "out").exists()
    collected = outlierq("calibrate", tiny_llama, "--max-memory", "601MiB", "-o", tmp_path / "stats")
    assert collected.code == 1 and "or more" in collected.err


def test_plan_says_what_a_ceiling_asks_for(tiny_llama, outlierq, small):
    refused = outlierq("plan", tiny_llama, *small, "--max-memory", "400MiB")
    assert refused.code == 1 and "or more" in refused.err
    accepted = outlierq("plan", tiny_llama, *small, "--max-memory", "4GiB")
    assert accepted.code == 0 and "memory stays below" in accepted.out
    assert outlierq("plan", tiny_llama, "--max-memory", "much").code == 2


def test_spilled_hidden_states_are_read_as_they_were_written_and_are_not_resident(tmp_path):
    size = (64, 128, 2048)  # 32 MiB in bfloat16
    hidden = HiddenStates(size, torch.bfloat16, 4, spill=Spill(tmp_path, 0))
    values = torch.randn(size[1:]).bfloat16()
    for batch in range(len(hidden)):
        hidden.write(batch, values.expand(4, -1, -1) * batch)
        hidden.done_with(batch)
    file = f"{tmp_path.name}/"  # others may still be mapped, of tests before
    assert mapped(file, "Size") == hidden.values.nbytes
    assert mapped(file, "Rss") < hidden.values.nbytes // 4
    assert all(torch.equal(hidden[batch][0], values * batch) for batch in range(len(hidden)))


def mapped(name: str, key: str) -> int:
    """Bytes of this process's mappings of files whose path holds `name`, removed ones too. key: as in smaps(5)."""
    mapping, found = "", 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            mapping = line
        elif name in mapping and line.startswith(f"{key}:"):
            found += int(line.split()[1]) << 10
    return found


def test_hidden_states_can_be_saved_and_taken_up_with_another_size_of_batches(tmp_path):
    hidden = HiddenStates((5, 3, 2), torch.float32, 2)
    hidden.values.copy_(torch.arange(30.0).view(5, 3, 2))
    hidden.save(tmp_path / "saved.safetensors", {"block": "1"})
    assert torch.equal(load_file(tmp_path / "saved.safetensors")["hidden"], hidden.values)
    other = HiddenStates((5, 3, 2), torch.float32, 3, spill=Spill(tmp_path, 0))
    other.load(tmp_path / "saved.safetensors")
    assert torch.equal(other.values, hidden.values)


def statistics(seed: int) -> InputStats:
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(seed))
    return InputStats(40, 2, hessian=rows.T @ rows / 40, sum_x=rows.double().sum(0), rows=rows[:3].bfloat16())


def test_spilled_statistics_come_back_as_they_were_and_as_they_were_changed(tmp_path):
    kept, spilled = {name: statistics(seed) for seed, name in enumerate("abc")}, SpilledStats(tmp_path)
    spilled.put(dict(kept))
    half, double = torch.full((6,), 2.0), torch.full((6,), 0.5)
    for stats in (kept, spilled):
        each_changed(stats, lambda each: each.scaled(half), ["a", "b"])
        each_changed(stats, lambda each: each.scaled(double), ["b"])
    assert sorted(spilled) == ["a", "b", "c"] and "d" not in spilled
    for name, expected in kept.items():
        found = spilled[name]
        assert (found.tokens, found.sequences) == (40, 2)
        assert found.tensors().keys() == expected.tensors().keys()
        assert all(torch.equal(found.tensors()[field], value) for field, value in expected.tensors().items())
    assert torch.equal(spilled["b"].hessian, statistics(1).hessian)


IN_PIECES = {
    "symmetric": QuantScheme(4, 32),
    "zero points": QuantScheme(4, 32, symmetric=False),
    "blocks of rows": QuantScheme(8, kind="float", block=(16, 16)),
    "unit of the weight": QuantScheme(4, 16, kind="float", scale_dtype="float8_e4m3fn", scales="two-level"),
    "units of groups": QuantScheme(4, 32, symmetric=False, scale_dtype="float16", scales="two-level"),
}


@pytest.mark.parametrize("name", IN_PIECES)
def test_scales_searched_and_rows_solved_some_at_a_time_are_those_of_all_at_once(name, monkeypatch):
    scheme, generator = IN_PIECES[name], torch.Generator().manual_seed(0)
    w, inputs = (torch.randn(rows, 256, generator=generator) for rows in (80, 300))
    stats, found = InputStats(300, 1, hessian=inputs.T @ inputs / len(inputs)), []
    solver = methods("quantize")["gptq"].function
    for pieces in (1 << 30, 1):
        monkeypatch.setattr(scale_search, "PIECE_WEIGHTS", pieces)
        monkeypatch.setattr(sweep, "PANEL_ROWS", pieces)
        found.append((scale_search.search_grid(w, scheme, stats.hessian), solver(w, stats, scheme)))
    for whole, pieced in zip(*found, strict=True):
        # A sum over other numbers of rows may differ in its last bit, and then a group may prefer its neighbour.
        close = torch.isclose(pieced.scale.float(), whole.scale.float(), rtol=1e-4)
        assert close.float().mean() > 0.95
        assert (pieced.zero_point is None) == (whole.zero_point is None)
        assert pieced.scale.shape == whole.scale.shape
    assert torch.allclose(found[0][1].dequantize(), found[1][1].dequantize(), atol=0.5)


def test_a_model_is_not_read_in_two_dtypes_at_once(untied_llama, monkeypatch):
    portions, read_many = [], FolderCheckpoint.read_many
    monkeypatch.setattr(
        FolderCheckpoint, "read_many", lambda self, names: portions.append([*names]) or read_many(self, portions[-1])
    )
    monkeypatch.setattr(skeleton, "PORTION_BYTES", 20_000)
    checkpoint = open_checkpoint(str(untied_llama))
    model = load_model(checkpoint, dtype="bfloat16")
    sizes = {name: info.nbytes for name, info in checkpoint.tensors.items()}
    assert len(portions) > 10 and all(sum(sizes[name] for name in some[:-1]) < 20_000 for some in portions)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, load_file_of(untied_llama, name).bfloat16())


def limited(ceiling: int, *words: object) -> tuple[subprocess.CompletedProcess, int]:
    """The command under a limit of the system on its private memory; how it ended, and its peak of resident bytes.

    RLIMIT_DATA counts what is allocated, touched or not, and no mapped files: stricter than resident memory for all
    that a run makes. A control group would be the other way; it needs rights that tests do not have.
    """
    done = subprocess.run(
        [sys.executable, "-c", RELAY, str(ceiling), sys.executable, "-m", "outlierq", *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    return done, int(done.stdout.rpartition("\n")[2] or 0)


# A process of its own, or the peak of the child would be at least that of its large parent.
RELAY = """
import os, resource, sys
ceiling, command = int(sys.argv[1]), sys.argv[2:]
child = os.fork()
if not child:
    resource.setrlimit(resource.RLIMIT_DATA, (ceiling, ceiling))
    os.execv(command[0], command)
_, status, usage = os.wait4(child, 0)
print(usage.ru_maxrss * 1024, end="")
sys.exit(os.waitstatus_to_exitcode(status))
"""


# What may differ between two runs on one machine though both make the same: pages of libraries, and of a huge page.
PAGES = 48 << 20


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_DATA") or sys.platform != "linux", reason="no limit to set")
def test_a_run_stays_below_its_ceiling_under_a_limit_of_the_system(tiny_llama, tmp_path):
    """The system ends a run that allocates more than its ceiling. How much of it is resident is held against a run of
    next to nothing: how many pages of libraries are, too, is the machine's choice."""
    wide = write_llama(tmp_path / "wide", hidden_size=512, intermediate_size=3072, num_hidden_layers=1)
    quick = ["--set", "quantize.refine_passes=1", "--set", "quantize.scale_search=minmax"]
    settings = [word for key in SMALL for word in ("--set", key)] + quick
    peaks_of, ceilings = [], []
    for source in (tiny_llama, wide):
        ceiling = (smallest_ceiling(work_of(planned(source))) >> 20) + 1
        out = tmp_path / f"{source.name}-out"
        done, peak = limited(
            ceiling << 20, "quantize", source, *settings, "--max-memory", f"{ceiling}MiB", "-o", out, "--quiet"
        )
        assert done.returncode == 0, done.stderr
        peaks_of.append(peak)
        ceilings.append(ceiling << 20)
    nothing, peak = peaks_of
    assert nothing > 200 << 20
    # Without a ceiling the same run makes 275 MiB.
    assert 20 << 20 < peak - nothing < ceilings[1] - BASE_BYTES + PAGES < 240 << 20


def most_allocated(work: Callable[[], object]) -> int:
    """The most bytes that torch's allocator held at once during `work`, beside what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


ROUNDED = [QuantScheme(4), QuantScheme(8, symmetric=False), QuantScheme(4, 64), QuantScheme(4, 32, symmetric=False)]


@pytest.mark.parametrize("chosen", methods("quantize").values(), ids=lambda chosen: chosen.name)
@pytest.mark.parametrize("scheme", ROUNDED, ids=str)
def test_a_quantizer_holds_no_more_copies_of_its_rows_than_it_declares_and_not_far_fewer(chosen, scheme):
    """The bound with which a ceiling is kept; one that is much too high would refuse runs that fit."""
    rows, width = 2048, 128  # a stack beside which a hessian is small
    w, stats = random_weight(rows, width), statistics_of(correlated_inputs(256, width), sequence_length=64)
    searches = get_args(chosen.options["scale_search"].annotation) if "scale_search" in chosen.options else ()
    variants = [{"scale_search": word} for word in searches] or [{}]
    held = w.nbytes + max(
        most_allocated(lambda given=given: chosen.function(w, stats, scheme, **given)) for given in variants
    )
    hessian = stats.hessian.nbytes
    weights = (w.numel(), w.numel())
    assert held <= method_bytes(chosen.copies, chosen.factors, weights, width, scheme.group_size, hessian)
    if chosen.copies != COPIES:
        assert held > method_bytes(chosen.copies - 2, False, weights, width, scheme.group_size, hessian)


def several(count: int) -> Ranks:
    ranks = Ranks()
    ranks.size = count
    return ranks


def test_sums_of_shards_that_wait_for_each_other_are_counted(tiny_llama):
    def collecting(shards: int, ranks: int = 1) -> int:
        work = work_of(planned(tiny_llama, "gptq-w4", f"calibration.shards={shards}"), Resources(ranks=several(ranks)))
        return peaks(work, NO_SAVINGS)["collect"]

    alone, halves, thirds, quarters = (collecting(shards) for shards in (1, 2, 3, 4))
    assert halves - alone == pytest.approx(quarters - thirds, abs=1 << 16) and halves > alone
    assert collecting(4, ranks=4) < quarters + phases.SEVERAL_BYTES
    assert collecting(2, ranks=2) > collecting(2)


def test_what_a_rotation_makes_in_float64_is_counted(tiny_llama):
    rotated, plain = (work_of(planned(tiny_llama, recipe)) for recipe in ("rotate-w8a8", "w8a8-dynamic"))
    assert set(rotated.making) >= {site.weight for site in rotated.structure.sites} and not plain.making
    shape = (512, 256)
    spin = Spin(Rotation.of(256, 0))
    both = Change("w", by_input=(spin,), by_output=(Spin(Rotation.of(512, 1)),))
    assert both.making_bytes(shape) >= 2 * 8 * 512 * 256
    assert Change("w", by_input=(spin,)).making_bytes((1 << 20, 256)) < 1 << 27
    assert peaks(rotated, NO_SAVINGS)["rewrite"] > BASE_BYTES and "rewrite" not in peaks(plain, NO_SAVINGS)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is one of Linux")
def test_a_rotated_run_ends_well_under_the_least_ceiling_that_plan_accepts(tmp_path):
    source = write_llama(tmp_path / "wide", hidden_size=512, intermediate_size=2048, num_hidden_layers=1)
    ceiling = (smallest_ceiling(work_of(planned(source, "rotate-w8a8"))) >> 20) + 1
    assert ceiling < 900
    words = [word for key in SMALL for word in ("--set", key)]
    done, _ = limited(
        ceiling << 20,
        "quantize", source, "-r", "rotate-w8a8", *words, "--max-memory", f"{ceiling}MiB", "-o", tmp_path / "out", "-q",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is one of Linux")
def test_a_model_of_eight_times_the_ceiling_is_quantized_under_a_limit_of_the_system(tmp_path, tools):
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    from random_llama import write_random_llama

    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    tools.write_tokenizer(tokenizer)
    shape = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": 260,
        "hidden_size": 640, "intermediate_size": 1792, "num_attention_heads": 10, "num_key_value_heads": 2,
        "num_hidden_layers": 720, "max_position_embeddings": 512, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    size = write_random_llama(tmp_path / "large", shape, tokenizer_from=tokenizer)
    # Few tokens and the plain method: it is memory that is tried here.
    quick = {
        "calibration.samples": 4, "calibration.sequence_length": 64, "calibration.batch_size": 1,
        "quantize.refine_passes": 0, "quantize.scale_search": "minmax",
    }  # fmt: skip
    settings = [word for key, value in quick.items() for word in ("--set", f"{key}={value}")]
    ceiling = 754
    assert size >= 8 * ceiling << 20
    done, peak = limited(
        ceiling << 20,
        "quantize", tmp_path / "large", *settings, "--max-memory", f"{ceiling}MiB", "-o", tmp_path / "out", "--quiet",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert peak < ceiling << 20
