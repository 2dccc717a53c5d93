"""README and docs are true: commands and snippets run, links lead somewhere, what is generated is current."""

from __future__ import annotations

import ast
import itertools
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from doc_pages import DOCS, PAGES, ROOT, Command, anchors, blocks, calls, commands, inline_code, links, name_of
from doc_reader import MODELS, STANDS_FOR, TEXTS, Reader, few_tokens

import outlierq

# Programs that a page may call beside ours; tests/clients calls those that serve.
OTHERS = {"vllm", "curl", "pip", "git", "cd", "cat", "head", "uvx", "pipx", "docker", "python3.11", "pre-commit"}
PEERS = {"auto-round"}
LLAMA_CPP = {f"llama-{name}" for name in ("server", "cli", "imatrix", "quantize", "perplexity")}
# Pages whose commands take a second or two for a tiny model; the others are `slow`.
QUICK = ("README.md", "docs/first-model.md", "docs/python.md")
names = pytest.mark.parametrize("page", PAGES, ids=name_of)


@cache
def command_line():
    """The whole command line, as click has it."""
    from typer.main import get_command

    from outlierq.cli.main import app

    return get_command(app)


def ours(page: Path) -> list[Command]:
    """Every call of outlierq in the blocks of a page, as the words behind its name."""
    found = []
    for command in commands(page, {"outlierq", "torchrun", "python"}):
        words = command.words
        if words[0] != "outlierq":
            if words[1:3] != ("-m", "outlierq") and ("-m", "outlierq") not in itertools.pairwise(words):
                continue
            words = words[words.index("outlierq") :]
        found.append(Command(command.page, command.line, words[1:]))
    return found


def check(words: tuple[str, ...]) -> None:
    """The command line itself reads the words, the recipe exists, and its settings fit; nothing is run."""
    words = tuple(word for word in words[: words.index(">")] if word) if ">" in words else words
    words = tuple(STANDS_FOR.get(word, word) for word in words)
    command, context = command_line(), None
    if words[0].startswith("-"):
        assert words[0] in {option for parameter in command.params for option in parameter.opts}
        return
    while hasattr(command, "commands"):
        assert words[0] in command.commands, words[0]
        command, words = command.commands[words[0]], words[1:]
    context = command.make_context(command.name, list(words))
    assert not context.args
    check_recipes(command.name, context.params)


def check_recipes(command: str, values: dict) -> None:
    """Names of recipes are those of shipped ones, or of files; settings are keys that they know."""
    from outlierq.recipe import load

    asked = (
        values.get("recipe") or values.get("recipes") or (values["reference"] if command in ("show", "check") else ())
    )
    asked = [asked] if isinstance(asked, str) else list(asked)
    for name in (name for each in asked for name in each.split(",")):
        if name.endswith((".yaml", "/")) or "/" in name or ":" in name:
            continue  # a file, a result, or a repository
        load(name, list(values.get("settings") or values.get("set") or ()))


@names
def test_every_command_of_a_page_is_one_that_exists(page):
    for command in ours(page):
        try:
            check(command.words)
        except BaseException as error:  # click leaves the process by exceptions of its own
            raise AssertionError(f"{command}: {error!r}") from error


def test_the_readme_names_every_command_and_no_other():
    readme = (ROOT / "README.md").read_text()
    table = readme[readme.index("| command | what it does |") : readme.index("Every command has examples")]
    first = [line.split("|")[1] for line in table.splitlines()[2:] if line]
    assert sorted(re.findall(r"`(\w+)`", "".join(first))) == sorted(command_line().commands)


def test_the_page_on_python_names_every_function():
    page = (ROOT / "docs" / "python.md").read_text()
    named = set(re.findall(r"`outlierq\.(\w+)`", page))
    assert named == {name for name in outlierq.__all__ if name.islower()}


def test_the_first_screen_of_the_readme_goes_from_nothing_to_a_verified_checkpoint():
    """`scripts/stranger.py` follows it in an empty environment."""
    words = runpy.run_path(str(ROOT / "scripts" / "stranger.py"))["commands"]()
    assert [each[0] if each[0] == "pip" else each[1] for each in words] == ["pip", "quantize", "verify", "eval"]


@names
def test_blocks_of_bash_call_programs_that_are_known(page):
    known = {"outlierq", "torchrun", "python", "make", "export", "convert_hf_to_gguf.py", *OTHERS, *PEERS, *LLAMA_CPP}
    assert {block.language for block in blocks(page)} <= {"", "bash", "python", "yaml", "text"}, "others are not tried"
    for block in (block for block in blocks(page) if block.language == "bash"):
        for line, words in calls(block):
            assert words[0].rpartition("/")[2] in known, f"{name_of(page)}:{line} {words[0]}"


def test_the_pages_hold_commands_at_all():
    assert sum(len(ours(page)) for page in PAGES) > 45


@names
def test_targets_scripts_and_extras_that_a_page_names_exist(page):
    targets = set(re.findall(r"^([\w-]+)(?: [\w -]+)?:", (ROOT / "Makefile").read_text(), re.MULTILINE))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for command in commands(page, {"make", "python", "pip"}):
        program, *words = command.words
        if program == "make":
            assert next(w for w in words if "=" not in w) in targets, str(command)
        elif program == "python" and words[0].endswith(".py"):
            folder = (ROOT / words[0]).parent  # options that several scripts have are in a module beside them
            source = "".join(path.read_text() for path in folder.glob("*.py")) if (ROOT / words[0]).exists() else ""
            missing = [w for w in words[1:] if w.startswith("--") and f'"{w}"' not in source]
            assert not missing, f"{command}: {missing}"
        elif program == "pip":
            asked = [name for w in words for name in re.findall(r"^(?:\.|outlierq)\[([\w,]+)\]", w)]
            assert {each for name in asked for each in name.split(",")} <= extras.keys(), str(command)


@names
def test_commands_in_running_text_exist(page):
    for line, code in inline_code(page):
        words = shlex.split(code.replace("'", "")) if code.startswith("outlierq ") else []
        if len(words) < 2 or words[1].startswith("-"):
            continue
        command, rest = command_line(), words[1:]
        while hasattr(command, "commands") and rest:
            assert rest[0] in command.commands, f"{name_of(page)}:{line} {code}"
            command, rest = command.commands[rest[0]], rest[1:]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in rest if word.startswith("-") and len(word) > 1} <= known, (
            f"{name_of(page)}:{line} {code}"
        )


RECIPE = re.compile(r"(rtn|gpta?q|awq|best|w[48]|fp8|(nv|mx)fp[48]|auto|rotate|smoothquant|os-plus|gguf|kv)-[\w-]+")
SETTING = re.compile(r"(?:calibration|quantize|export|gate|kv_cache)\.[\w.]+=\S+")


@names
def test_recipes_and_settings_in_running_text_exist(page):
    from outlierq.core.errors import RecipeError
    from outlierq.recipe import load, shipped
    from outlierq.registry import formats

    def fits(setting: str, recipe: str) -> bool:
        try:
            return bool(load(recipe, [setting]))
        except RecipeError:
            return False

    for line, code in inline_code(page):
        if RECIPE.fullmatch(code):
            assert code in {*shipped(), *formats()}, f"{name_of(page)}:{line} {code}"
        for setting in SETTING.findall(code.replace("'", "")):
            some = ("gptq-w4", "gguf-q8_0", "mxfp4")
            assert any(fits(setting, recipe) for recipe in some), f"{name_of(page)}:{line} {setting}"


@names
def test_links_and_anchors_lead_somewhere(page):
    broken = []
    for line, target in links(page):
        if re.match(r"[a-z]+:", target):
            continue  # another site
        path, _, anchor = unquote(target).partition("#")
        goal = (page.parent / path).resolve() if path else page
        if not goal.exists() or not goal.is_relative_to(ROOT):
            broken.append(f"{name_of(page)}:{line} {target}")
        elif anchor and goal.suffix == ".md" and anchor not in anchors(goal):
            broken.append(f"{name_of(page)}:{line} {target}: no such heading")
    assert not broken


@names
def test_files_that_a_page_names_exist(page):
    """`benchmarks/fit.py` is one of the repository, `quantize/gptq.py` one of the package."""
    pattern = re.compile(r"(?P<folder>\w+)/[\w./-]*\.(py|md|yaml|json|c|cu)")
    folders = {path.name for place in (ROOT, ROOT / "outlierq") for path in place.iterdir() if path.is_dir()}
    for line, code in inline_code(page):
        named = pattern.fullmatch(code)
        if named and named["folder"] in folders:
            places = (ROOT / code, ROOT / "outlierq" / code)
            assert any(place.exists() for place in places), f"{name_of(page)}:{line} {code}"


@cache
def sayings() -> dict[str, str]:
    """Every text in the package as a pattern in which what is filled in may be anything, and its longest fixed part."""
    found = {}
    for path in (ROOT / "outlierq").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            fixed = [p.value.rstrip("\n") for p in parts if isinstance(p, ast.Constant) and isinstance(p.value, str)]
            if sum(map(len, fixed)) >= 8:  # fewer letters could be anything
                filled = [re.escape(p.value) if isinstance(p, ast.Constant) else ".*?" for p in parts]
                pattern = "".join(filled).removesuffix("\\\n")
                found[pattern] = max(fixed, key=len)
                first, _, below = pattern.partition("\\\n")
                if below and len(first.replace(".*?", "")) >= 8:
                    found[first] = ""  # a page may leave out what stands below it
    return found


def is_said(text: str) -> bool:
    """Whether some text of the package could read like this."""
    return any(fixed in text and re.fullmatch(pattern, text, re.DOTALL) for pattern, fixed in sayings().items())


def quoted(page: Path) -> list[tuple[str, str]]:
    """What the blocks of a page quote behind "error:" and "hint:", with the place of each."""
    found = []
    for block in blocks(page):
        for part in re.split(r"^(?=error: |hint: )", block.text, flags=re.MULTILINE):
            if part.startswith(("error: ", "hint: ")):
                first = part.split(": ", 1)[1].strip().split("\n")[0]
                found.append((f"{name_of(page)}:{block.line}", first))
    return found


def test_every_message_that_the_docs_quote_is_said_by_the_code():
    messages = [message for page in PAGES for message in quoted(page)]
    assert len(messages) > 25
    unsaid = [f"{where} {text}" for where, text in messages if not is_said(text)]
    assert not unsaid


def kinds_of_errors() -> set[str]:
    """The names of the classes of errors in the package."""
    classes = [
        node
        for path in (ROOT / "outlierq").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    kinds = {"OutlierqError"}
    while True:
        more = {each.name for each in classes if {base.id for base in each.bases if isinstance(base, ast.Name)} & kinds}
        if more <= kinds:
            return kinds
        kinds |= more


def test_every_kind_of_error_has_its_remedy_and_no_other():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    rows = re.findall(r"^\| `(\w+Error)` \| (.+) \| (.+) \|$", page, re.MULTILINE)
    assert {kind for kind, *_words in rows} == kinds_of_errors() and len(rows) == len(kinds_of_errors())
    assert all(len(remedy) > 10 for _kind, _about, remedy in rows)


def test_the_reference_of_recipes_is_current_and_explains_every_key():
    made = runpy.run_path(str(ROOT / "scripts" / "recipe_reference.py"))["page"]()
    assert made == (ROOT / "docs" / "recipe-reference.md").read_text(), "python scripts/recipe_reference.py --write"
    unexplained = [line for line in made.splitlines() if line.startswith("| `") and line.endswith("|  |")]
    assert not unexplained


@pytest.fixture(scope="module")
def desk(tiny_llama, tmp_path_factory) -> Path:
    """What pages take for granted: models by the names that pages use, and files of text."""
    place = tmp_path_factory.mktemp("desk")
    for name in MODELS:
        (place / name).symlink_to(tiny_llama)
    for name in TEXTS:
        (place / name).write_text("The quick brown fox jumps over the lazy dog. " * 400)
    chat = {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello! " * 40}]}
    (place / "chats.jsonl").write_text((json.dumps(chat) + "\n") * 40)
    outlierq.quantize(place / "model", "dense", format="gguf", out=place / "model-f16.gguf")
    return place


PROVOKING = (
    "plan ./nowhere",
    "plan meta-llama/Llama-3.1-8B",
    "plan ./model -r gptq-4",
    "plan ./model -r rtn-w4 --set quantize.groupsize=64",
    "plan ./model -r rtn-w4 --set quantize.group_size=100 --set quantize.when_indivisible=error",
    "plan ./model -r rtn-w4 --format gptq",
    "plan ./model -r gptq-w4 --max-memory 100MiB",
    "plan ./pickled",
    "quantize ./model -r gptq-w4 --stats ./out -o never",
    "quantize ./model -r gptq-w4 --set calibration.sequence_length=1024 -o never",
    pytest.param("eval ./model --tasks nonsense", marks=pytest.mark.slow),  # imports lm-eval
)


@pytest.mark.parametrize("line", PROVOKING)
def test_an_error_is_said_as_the_docs_quote_it(line, desk, outlierq, tmp_path, monkeypatch):
    (tmp_path / "model").symlink_to((desk / "model").resolve())
    (tmp_path / "pickled").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "pickled" / "config.json").write_text((desk / "model" / "config.json").read_text())
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    answer = outlierq(*line.split())
    said = answer.err[answer.err.index("error: ") :].removeprefix("error: ").split("\n")[0]
    quotes = [text for _where, text in quoted(ROOT / "docs" / "troubleshooting.md")]
    patterns = [re.sub(r"\d+", r"[\\d.,]+", re.escape(text).replace(r"\.\.\.", ".*")) for text in quotes]
    assert answer.code == 1 and any(re.fullmatch(pattern, said) for pattern in patterns), said


@pytest.fixture
def reader(desk, outlierq, tmp_path, monkeypatch) -> Reader:
    """Somebody with these files, whose recipes take a second."""
    for path in desk.iterdir():
        (tmp_path / path.name).symlink_to(path.resolve())
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    few_tokens(monkeypatch)
    return Reader(tmp_path, outlierq)


def test_figures_of_the_pages_that_count_are_right():
    shipped = len(list((ROOT / "recipes").glob("*.yaml")))
    assert f"which of the {shipped} recipes" in (ROOT / "docs" / "index.md").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    page = (ROOT / "docs" / "install.md").read_text()
    assert {name for name in extras if f"`{name}`" not in page} == set()


def test_sizes_and_losses_of_the_recipes_are_those_that_were_measured():
    results = ROOT / "benchmarks" / "results"
    sizes = json.loads((results / "sizes.json").read_text())["models"]
    losses = json.loads((results / "recommended.json").read_text())["kl"]
    runs = json.loads((results / "fp4-babyllama.json").read_text())["runs"]
    losses |= {name: run["kl"][0] for name, run in runs.items() if name not in losses}
    page = (ROOT / "docs" / "choose.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d.]+) GB \| ([\d.]+) GB \| ([\d.]+) \|$", page, re.MULTILINE)
    assert len(rows) > 15
    for name, size, memory, loss in rows:
        plan = sizes["Llama-3.1-8B"][name]
        assert (float(size), float(memory)) == (
            round(plan["bytes"] / 1e9, 1),
            round(plan["least_ceiling_bytes"] / 1e9, 1),
        ), name
        assert float(loss) == pytest.approx(losses[name], abs=5e-5), name
    page = (ROOT / "docs" / "time-and-memory.md").read_text()
    rows = re.findall(r"^\| ([\w.-]+) \| `([\w-]+)` \| ([\d.]+) GB \| ([\d.]+) GB \|$", page, re.MULTILINE)
    assert len(rows) > 5
    for model, name, most, least in rows:
        plan = sizes[model][name]
        assert (float(most), float(least)) == (
            round(plan["peak_bytes"] / 1e9, 1),
            round(plan["least_ceiling_bytes"] / 1e9, 1),
        )


def test_planned_and_taken_times_are_those_that_were_measured():
    measured = json.loads((ROOT / "benchmarks" / "results" / "plan_time.json").read_text())
    page = (ROOT / "docs" / "time-and-memory.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \| (\d+) s \| (\d+) s \| ([\d.]+) \|$", page, re.MULTILINE)
    runs = {run["recipe"]: run for run in measured["rows"]}
    assert {name for name, *_figures in rows} == set(runs) and len(runs) == 5
    for name, *figures in rows:
        run = runs[name]
        said = (round(run["estimated_seconds"]), round(run["wall_seconds"]), run["ratio"])
        assert tuple(map(float, figures)) == said and run["ratio"] < measured["bound"], name


RUNS = {  # what the pages call a run of outliers.json
    "rounded to nearest": "w8a8-rtn", "`w8a8-dynamic`": "w8a8-rtn", "`smoothquant-w8a8`": "smoothquant",
    "`os-plus-w8a8`": "os-plus", "`rotate-w8a8`": "rotate", "`int8-split`": "int8-split", "`llm-int8`": "llm-int8",
    "`w8a8-static`": "w8a8-static", "`fp8-dynamic`": "fp8-dynamic",
}  # fmt: skip


def test_losses_by_outliers_are_those_that_were_measured():
    runs = json.loads((ROOT / "benchmarks" / "results" / "outliers.json").read_text())["runs"]
    page = (ROOT / "docs" / "outliers.md").read_text()
    rows = re.findall(r"^\| ([^|(]+?)(?: \(.*?\))? \| (0\.\d+) \| (0\.\d+) \|$", page, re.MULTILINE)
    ours = [(RUNS[name], plain, stressed) for name, plain, stressed in rows if name in RUNS]
    assert len(ours) == 5
    for name, *losses in ours:
        for kind, loss in zip(("plain", "stressed"), losses, strict=True):
            assert float(loss) == pytest.approx(runs[f"{name}/{kind}"]["kl"], rel=0.005)
    page = (ROOT / "docs" / "choose.md").read_text()
    cells = re.findall(r"\| (`[\w-]+`) \| (0\.\d+) \| ([\d.]+) % \|$", page, re.MULTILINE)
    assert len(cells) > 5
    for name, loss, agreement in cells:
        run = runs[f"{RUNS[name]}/plain"]
        assert (float(loss), float(agreement)) == (round(run["kl"], 4), round(100 * run["top1_agreement"], 1)), name


def test_the_tables_of_large_models_are_those_that_the_benchmark_prints():
    script = ROOT / "benchmarks" / "scaling.py"
    printed = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert len(rows) > 25 and [row for row in rows if row not in page] == []


def test_recipes_that_the_pages_show_are_sound():
    from outlierq.recipe.schema import Recipe

    base = yaml.safe_load(outlierq.recipe_text("gptq-w4"))
    shown = [(page, block) for page in PAGES for block in blocks(page) if block.language == "yaml"]
    checked = 0
    for page, block in shown:
        content = yaml.safe_load(block.text)
        own_code = ":" in str(content.get("quantize", {}).get("method", "")) if isinstance(content, dict) else True
        if not own_code and content.keys() <= Recipe.model_fields.keys():
            assert outlierq.read_recipe({**base, **content}), f"{name_of(page)}:{block.line}"
            checked += 1
    assert checked > 3


def followed() -> list:
    """Every page with something to run; those that take long are marked."""
    return [
        pytest.param(page, id=name_of(page), marks=() if name_of(page) in QUICK else pytest.mark.slow) for page in PAGES
    ]


@pytest.mark.parametrize("page", followed())
def test_what_a_page_shows_runs(page, reader):
    reader.follow(page)


def navigation() -> list[str]:
    """The pages that the site's menu names."""

    def walk(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in walk(part)]

    text = re.sub(r"!!python\S*", "", (ROOT / "mkdocs.yml").read_text())
    return walk(yaml.safe_load(text)["nav"])


def test_the_menu_of_the_site_names_every_page_once():
    assert sorted(navigation()) == [page.name for page in DOCS]


def test_links_out_of_the_pages_lead_to_copies_on_the_site(tmp_path):
    made = subprocess.run([sys.executable, ROOT / "scripts" / "docs_site.py", "-o", tmp_path / "site"], check=False)
    assert made.returncode == 0
    sources = sorted((tmp_path / "site").rglob("*.md"))
    assert len(sources) > len(DOCS) and (tmp_path / "site/repository/benchmarks/results/outliers.json").is_file()
    for page in sources:
        for line, target in links(page):
            path = unquote(target).partition("#")[0]
            assert re.match(r"[a-z]+:", target) or not path or (page.parent / path).exists(), (
                f"{page.name}:{line} {target}"
            )


@pytest.mark.slow
def test_the_site_builds_and_no_link_of_it_is_broken(tmp_path):
    pytest.importorskip("zensical", reason="zensical is not installed; run `make docs`")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    for command in (
        [ROOT / "scripts" / "docs_site.py", "-o", tmp_path / "build" / "docs"],
        ["-m", "zensical", "build", "--strict"],
    ):
        made = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True)
        assert made.returncode == 0, made.stdout + made.stderr
    assert {page.stem for page in DOCS} <= {page.stem for page in (tmp_path / "build" / "site").glob("*.html")}
