"""`--help` and `outlierq help`: nothing is cut at any width, every example can be copied, is understood and runs."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from outlierq.cli.help import GROUPS, broken
from outlierq.cli.main import app
from outlierq.cli.topics import TOPICS

WIDTHS = (40, 80, 120)


def all_commands() -> Iterator[tuple[tuple[str, ...], typer.core.TyperCommand]]:
    """Every command with its words, groups of commands included."""
    overview = typer.main.get_command(app)
    yield (), overview
    for name, command in overview.commands.items():
        yield (name,), command
        for inner, below in getattr(command, "commands", {}).items():
            yield (name, inner), below


COMMANDS = dict(all_commands())
TEXT_OF_TOPICS = Path(__file__).parents[1] / "outlierq" / "data" / "help"


def examples_of(text: str) -> list[str]:
    """The commands in a help or a topic, as a shell reads them."""
    joined = re.sub(r" \\\n\s+", " ", text)
    return [line.strip() for line in joined.split("\n") if re.match(r"  outlierq ", line)]


def words_of(example: str) -> list[str]:
    """The words of the first program."""
    words = shlex.split(example)
    end = next((at for at, word in enumerate(words) if word in ("|", ">")), len(words))
    return words[1:end]


BY_COMMAND = {
    words: examples_of("\n".join(f"  {line.strip()}" for line in (command.epilog or "").split("\n")))
    for words, command in COMMANDS.items()
}
EXAMPLES = list(dict.fromkeys(example for examples in BY_COMMAND.values() for example in examples))
OF_TOPICS = [
    example for name in TOPICS for example in examples_of((TEXT_OF_TOPICS / f"{name}.txt").read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_nothing_is_cut_and_every_example_is_there_whole(outlierq, words, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    answer = outlierq(*words, "--help")
    assert answer.code == 0 and "…" not in answer.out
    long = [line for line in answer.out.split("\n") if len(line) > width]
    assert all(len(line.split()) == 1 or (line.endswith(" \\") and len(line.split()) <= 3) for line in long), long
    shown = re.findall(r"(?<!\S)--[a-z][\w-]*", answer.out)
    options = {name for param in COMMANDS[words].params for name in param.opts if name.startswith("--")}
    assert options <= set(shown)
    assert examples_of(answer.out) == BY_COMMAND[words]


def test_options_stand_in_groups_where_they_are_many():
    for words, command in COMMANDS.items():
        named = {name for param in command.params for name in param.opts}
        if len(command.params) > 12:
            groups = [title for title, names in GROUPS.items() if named & {*names}]
            rest = [param for param in command.params if not {*param.opts} & {n for g in GROUPS.values() for n in g}]
            assert len(groups) >= 3 and len(rest) <= 10, (words, groups)


def test_an_option_whose_name_means_something_else_there_stands_elsewhere(outlierq):
    said = outlierq("report", "--help").out
    assert "Calibration" not in said and said.index("--samples") < said.index("Machine")
    assert "Calibration" in outlierq("calibrate", "--help").out


def test_a_long_command_is_broken_where_a_shell_reads_on():
    command = "outlierq study write ./m 'sparsegpt 2:4' --stats stats -o pruned --bits 4"
    lines = broken(command, 40)
    assert len(lines) > 1 and all(line.endswith(" \\") for line in lines[:-1])
    printing = "\n".join(lines).replace("outlierq", "printf '%s\\n'", 1)
    said = subprocess.run(["sh", "-c", printing], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == shlex.split(command)[1:]


@pytest.mark.parametrize("example", [*EXAMPLES, *OF_TOPICS])
def test_every_example_is_understood(example):
    words = words_of(example)
    overview = typer.main.get_command(app)
    context = overview.make_context("outlierq", ["help"], resilient_parsing=True)
    command = overview
    while hasattr(command, "commands") and words:
        command = command.commands[words.pop(0)]
    made = command.make_context("x", words, parent=context)
    assert made.params


@pytest.fixture(scope="module")
def world(tmp_path_factory, tools) -> Path:
    """A folder in which what the examples name is there, as tiny things."""
    import outlierq

    place = tmp_path_factory.mktemp("world")
    tools.write_llama(place / "model", hidden_size=128, intermediate_size=128)
    for name in ("SmolLM2-135M", "Llama-3.1-8B", "original", "meta-llama/Llama-3.1-8B"):
        shutil.copytree(place / "model", place / name)
    outlierq.quantize(place / "model", "rtn-w4", out=place / "out", device="cpu")
    for name in ("compressed", "SmolLM2-135M-W4", "w4", "b", "made-by-another-program"):
        shutil.copytree(place / "out", place / name)
    small = {"samples": 8, "sequence_length": 64, "sensitivity": True, "device": "cpu"}
    outlierq.calibrate(place / "model", out=place / "stats", **small)
    for name in ("mine.yaml", "my-recipe.yaml"):
        (place / name).write_text(outlierq.recipe_text("gptq-w4"))
    return place


QUICK = ("plan", "recommend", "recipes", "compare", "diff", "verify", "inspect", "detect", "frontier", "fit", "help")


def runs(example: str) -> bool:
    """Whether an example needs nothing but a tiny model."""
    written = " -o " in example or "--out" in example or "--png" in example
    return words_of(example)[0] in QUICK and not written and "OWNER" not in example and ".gguf" not in example


@pytest.mark.parametrize("example", [example for example in [*EXAMPLES, *OF_TOPICS] if runs(example)])
def test_every_example_that_only_reads_runs(world, outlierq, example, monkeypatch):
    monkeypatch.chdir(world)
    answer = outlierq(*words_of(example))
    assert answer.code == 0, answer.err
    assert answer.out


class TestTopics:
    """`outlierq help`."""

    @pytest.mark.parametrize("topic", TOPICS)
    @pytest.mark.parametrize("width", WIDTHS)
    def test_a_topic_is_a_page_that_fits(self, outlierq, topic, width, monkeypatch):
        monkeypatch.setenv("COLUMNS", str(width))
        answer = outlierq("help", topic)
        assert answer.code == 0 and answer.err == "" and len(answer.out) > 800
        lines = answer.out.split("\n")
        assert all(len(line) <= width or len(line.split()) <= 3 for line in lines)

    def test_the_recipes_are_all_listed_the_formats_and_limits_explained(self, outlierq):
        from outlierq.recipe import shipped
        from outlierq.registry import formats

        recipes, all_formats, gates = (outlierq("help", topic).out for topic in ("recipes", "formats", "gates"))
        assert all(f"{name}: " in recipes for name in shipped())
        assert all(re.search(rf"\b{name}\b[^\n]*: ", all_formats) for name in formats())
        assert all(option in gates for option in GROUPS["Quality gate"])

    def test_a_command_has_its_help_there_and_nothing_named_is_an_overview(self, outlierq):
        assert outlierq("help", "plan").out.strip() == outlierq("plan", "--help").out.strip()
        assert "recipes, formats, gates" in outlierq("help").out

    @pytest.mark.parametrize(("asked", "offered"), [("recipe", "recipes"), ("gate", "gates"), ("quantise", "quantize")])
    def test_an_unknown_topic_offers_the_nearest(self, outlierq, asked, offered):
        answer = outlierq("help", asked)
        assert answer.code == 2 and f"did you mean {offered}?" in " ".join(answer.err.replace("│", " ").split())
