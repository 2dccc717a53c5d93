"""What runs elsewhere: action, container, example and release give commands that exist; what a job of GitHub shows."""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import check_release
import hub_stand_in

ROOT = Path(__file__).parents[1]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
EXAMPLE = yaml.safe_load((ROOT / "examples" / "github-workflow.yml").read_text())
RELEASE = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
VERSION = check_release.prepared((ROOT / "CHANGELOG.md").read_text())
STEPS = {step.get("name", "Python"): step for step in ACTION["runs"]["steps"]}


def parsed(words: list[str]) -> None:
    """The command line reads the words; nothing is run."""
    from typer.main import get_command

    from outlierq.cli.main import app

    command = get_command(app)
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    context = command.make_context("x", list(words))
    assert context.params and not context.args


def step(name: str, folder: Path, **values: str) -> list[list[str]]:
    """The commands that a step of the action gives for inputs, in a folder with an `outlierq` that only notes them."""
    noted = folder / "noted"
    program = folder / "outlierq"
    program.write_text(
        f"#!{sys.executable}\nimport json, sys\nopen({str(noted)!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}"}
    for key, expression in STEPS[name]["env"].items():
        given = re.fullmatch(r"\$\{\{ inputs\.([\w-]+) \}\}", expression)[1]
        environment[key] = values.get(given.replace("-", "_"), ACTION["inputs"][given].get("default", ""))
    subprocess.run(["bash", "-eo", "pipefail", "-c", STEPS[name]["run"]], env=environment, cwd=folder, check=True)
    return [json.loads(line) for line in noted.read_text().splitlines()]


class TestAction:
    """`uses: OWNER/outlierq@v0.1.0`."""

    def test_it_compresses_holds_against_the_gate_and_publishes(self, tmp_path):
        inputs = {"model": "maker/model", "gate": "--max-kl 0.05 --min-top1 90%", "options": "-s gate.windows=4"}
        checked = step("Check the recipe", tmp_path, **inputs)
        made = step("Compress and gate", tmp_path, **inputs)[1:]
        sent = step("Publish", tmp_path, repo="me/model", base_model="maker/model")[2:]
        assert checked == [["plan", "maker/model", "-r", "gptq-w4"]]
        more = ["--max-kl", "0.05", "--min-top1", "90%", "-s", "gate.windows=4", "--junit", "outlierq-out.gate.xml"]
        assert made == [["quantize", "maker/model", "-r", "gptq-w4", "-o", "outlierq-out", *more]]
        assert sent == [["publish", "outlierq-out", "me/model", "--update", "--base-model", "maker/model"]]
        for words in (*checked, *made, *sent):
            parsed(words)

    def test_without_a_gate_or_an_original_nothing_is_said_of_them(self, tmp_path):
        assert step("Compress and gate", tmp_path, model="m") == [
            ["quantize", "m", "-r", "gptq-w4", "-o", "outlierq-out"]
        ]
        assert step("Publish", tmp_path, repo="a/b")[1:] == [["publish", "outlierq-out", "a/b", "--update"]]

    @pytest.mark.parametrize("hostile", ['x"; touch broken; "', "$(touch broken)", "`touch broken`", "x\ntouch broken"])
    def test_an_input_is_a_word_and_never_code(self, tmp_path, hostile):
        step("Check the recipe", tmp_path, model=hostile, recipe=hostile)
        step("Compress and gate", tmp_path, model=hostile, recipe=hostile, gate=hostile, options=hostile, out=hostile)
        step("Publish", tmp_path, repo=hostile, base_model=hostile)
        assert not (tmp_path / "broken").exists()

    def test_no_step_puts_an_input_into_its_text(self):
        for each in ACTION["runs"]["steps"]:
            assert "${{" not in each.get("run", ""), each["name"]
        assert [name for name, each in STEPS.items() if "HF_TOKEN" in each.get("env", {})] == ["Publish"]
        assert STEPS["Publish"]["if"] == "inputs.repo != ''"

    def test_it_is_itself_what_is_installed_so_it_works_from_any_repository(self):
        assert '"$GITHUB_ACTION_PATH[eval]"' in STEPS["Install outlierq"]["run"]
        assert all(each["shell"] == "bash" for each in ACTION["runs"]["steps"] if "run" in each)

    def test_the_example_gives_it_inputs_that_it_has_and_publishes_on_tags_only(self):
        (used,) = [s for s in EXAMPLE["jobs"]["compress"]["steps"] if "outlierq" in s.get("uses", "")]
        assert used["uses"].endswith(f"@v{VERSION}")
        assert set(used["with"]) <= set(ACTION["inputs"]) and {"model", "recipe", "gate", "repo"} <= set(used["with"])
        assert all("startsWith(github.ref, 'refs/tags/') &&" in used["with"][name] for name in ("repo", "token"))
        words = ["quantize", "m", "-r", used["with"]["recipe"], "-o", "out"]
        parsed([*words, *used["with"]["gate"].split(), *used["with"]["options"].split()])


@pytest.mark.slow
class TestActionOnARealModel:
    """The steps of the action as GitHub runs them, with outlierq itself and a stand-in for the Hub."""

    QUICK = "-s gate.windows=1 -s gate.window_length=32"

    @pytest.fixture
    def job(self, tmp_path):
        """Runs the steps after the installation until one fails; gives that one's name, its exit code, and stderr."""
        program = tmp_path / "bin" / "outlierq"
        program.parent.mkdir()
        program.write_text(f"#!{sys.executable}\nfrom outlierq.cli.main import run\n\nrun()\n")
        program.chmod(0o755)

        def run(hub: str, **inputs: str) -> tuple[str, int, str]:
            values = {name: each.get("default", "") for name, each in ACTION["inputs"].items()} | inputs
            said = ""
            for each in (each for each in ACTION["runs"]["steps"] if "env" in each):
                if each.get("if") and not values["repo"]:
                    continue
                given = {key: values[text.split("inputs.")[1].split()[0]] for key, text in each["env"].items()}
                of_job = {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md")}
                place = {
                    "PATH": f"{program.parent}:{os.environ['PATH']}",
                    "HF_ENDPOINT": hub,
                    "HF_HUB_DISABLE_XET": "1",
                }
                words = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", each["run"]]
                environment = os.environ | of_job | place | given
                done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True)
                said += done.stderr
                if done.returncode:
                    return each["name"], done.returncode, said
            return "", 0, said

        return run

    def test_kept_limits_publish_and_show_a_table(self, job, tiny_llama, tmp_path):
        with hub_stand_in.serving() as hub:
            more = {"repo": "alice/tiny", "token": hub_stand_in.TOKEN, "base-model": "alice/original"}
            ended = job(hub.url, model=str(tiny_llama), recipe="rtn-w8", gate="--max-kl 9", options=self.QUICK, **more)
            assert ended[:2] == ("", 0), ended[2]
            assert {"README.md", "outlierq.json", "model.safetensors"} <= hub.content("alice/tiny").keys()
        assert "Every limit was kept." in (tmp_path / "summary.md").read_text() and "::error" not in ended[2]
        assert (tmp_path / "outlierq-out.gate.xml").is_file()

    def test_a_limit_that_fails_ends_the_job_before_anything_is_published(self, job, tiny_llama, tmp_path):
        with hub_stand_in.serving() as hub:
            more = {"repo": "alice/tiny", "token": hub_stand_in.TOKEN}
            ended = job(hub.url, model=str(tiny_llama), recipe="rtn-w4", gate="--max-kl 0", options=self.QUICK, **more)
            assert ended[:2] == ("Compress and gate", 3) and not hub.repositories
        assert ended[2].count("::error title=outlierq::1 of 1 quality limits failed") == 1
        assert "**1 of 1 limits failed.**" in (tmp_path / "summary.md").read_text()
        assert (tmp_path / "outlierq-out" / "outlierq.json").is_file()


def test_the_container_has_the_command_as_its_entry_and_installs_torch_for_cpus_first():
    text = (ROOT / "Containerfile").read_text()
    assert 'ENTRYPOINT ["outlierq"]' in text
    assert text.index("whl/cpu") < text.index("/wheels/outlierq-")
    for line in re.findall(r"docker run .*?outlierq (.*?)(?:`|$)", text, re.MULTILINE):
        words = shlex.split(line)
        if words != ["--help"]:
            parsed(words)


def test_the_container_installs_the_wheel_that_it_built_with_extras_that_exist(tmp_path):
    import tomllib

    (tmp_path / "pip").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    (tmp_path / "pip").chmod(0o755)
    (tmp_path / "wheels").mkdir()
    wheel = tmp_path / "wheels" / "outlierq-1.2.3-cp312-cp312-linux_x86_64.whl"
    wheel.touch()
    runs = re.findall(r"^RUN (.*)$", (ROOT / "Containerfile").read_text(), re.MULTILINE)
    words = [
        subprocess.run(
            ["sh", "-c", run.replace("/wheels", str(tmp_path / "wheels"))],
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}, capture_output=True, text=True, check=True,
        ).stdout.splitlines()
        for run in runs
    ]  # fmt: skip
    assert [said[0] for said in words] == ["wheel", "install", "install"] and words[0][-1] == "/source"
    path, extras = re.fullmatch(r"(.*)\[(.*)\]", words[2][-1]).groups()
    assert path == str(wheel)
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras.split(",")) <= known.keys()


def test_every_command_of_the_page_on_ci_is_one_that_exists():
    lines = [line for line in (ROOT / "docs" / "ci.md").read_text().splitlines() if line.startswith("outlierq ")]
    assert len(lines) > 2
    for line in lines:
        parsed(shlex.split(line)[1:])


class TestRelease:
    """What a tag does."""

    def test_wheels_are_built_for_every_python_and_machine_and_published_without_a_token(self):
        jobs = RELEASE["jobs"]
        import tomllib

        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        versions = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
        build = next(s for s in jobs["wheels"]["steps"] if "cibuildwheel" in s.get("uses", ""))
        assert build["env"]["CIBW_BUILD"].split() == [f"cp{v.replace('.', '')}-*" for v in versions]
        assert {"ubuntu-24.04", "ubuntu-24.04-arm"} < set(jobs["wheels"]["strategy"]["matrix"]["os"])
        assert jobs["publish"]["permissions"] == {"id-token": "write"}
        assert jobs["publish"]["needs"] == ["wheels", "pure"]
        assert "secrets." not in (ROOT / ".github" / "workflows" / "release.yml").read_text()

    def test_scripts_that_it_calls_are_there(self):
        text = (ROOT / ".github" / "workflows" / "release.yml").read_text()
        called = set(re.findall(r"scripts/\w+\.py", text))
        assert called == {"scripts/check_release.py", "scripts/check_wheel.py"}
        assert all((ROOT / name).is_file() for name in called)

    @pytest.mark.parametrize(
        ("tag", "heading", "said"),
        [
            ("v1.2.3", "## 1.2.3 (2026-12-31)\n\n- a\n", []),
            ("v1.2.3rc1", "## 1.2.3rc1 (2026-12-31)\n\n- a\n", []),
            ("1.2.3", "## 1.2.3 (2026-12-31)\n\n- a\n", ["a release is tagged as v1.2.3"]),
            ("v1.2", "## 1.2 (2026-12-31)\n\n- a\n", ["a release is tagged as v1.2.3"]),
            ("v9.9.9", "## 1.2.3 (2026-12-31)\n\n- a\n", ["no section '## 9.9.9 (date)'; its first is 1.2.3"]),
            ("v1.2.3", "## 1.2.3 (unreleased)\n\n- a\n", ["write the day"]),
            ("v1.2.3", "## 1.2.3 (2026-12-31)\n\n## 0.0.1 (2026-01-01)\n\n- a\n", ["says nothing"]),
        ],
    )
    def test_a_tag_is_a_version_and_the_changelog_has_its_day(self, tag, heading, said):
        found = check_release.faults(tag, heading)
        assert len(found) == len(said) and all(part in fault for part, fault in zip(said, found, strict=True))

    def test_what_was_built_of_something_else_is_not_published(self, tmp_path):
        assert check_release.strangers("v1.2.3", tmp_path)
        good = (
            "outlierq-1.2.3-py3-none-any.whl",
            "outlierq-1.2.3-cp312-cp312-macosx_15_0_arm64.whl",
            "outlierq-1.2.3.tar.gz",
        )
        for name in (*good, "outlierq-1.2.30.tar.gz", "outlierq-1.2.4.dev1+g123-py3-none-any.whl"):
            (tmp_path / name).touch()
        assert [each.split()[0] for each in check_release.strangers("v1.2.3", tmp_path)] == [
            "outlierq-1.2.30.tar.gz",
            "outlierq-1.2.4.dev1+g123-py3-none-any.whl",
        ]

    def test_the_changelog_of_this_version_is_being_written(self):
        assert check_release.section((ROOT / "CHANGELOG.md").read_text(), VERSION)[1].startswith("- ")


class TestJob:
    """What a job of GitHub shows."""

    @pytest.fixture
    def page(self, tmp_path, monkeypatch) -> Path:
        """The page of a job, as GitHub passes it."""
        monkeypatch.setenv("GITHUB_ACTIONS", "true")
        monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
        return tmp_path / "summary.md"

    QUICK = ("-s", "gate.windows=1", "-s", "gate.window_length=32", "-q")

    def test_the_page_gets_a_table_of_the_run_and_of_its_gate(self, outlierq, tiny_llama, tmp_path, page):
        words = ("-r", "rtn-w8", "-o", tmp_path / "out", "--max-kl", 5, *self.QUICK)
        answer = outlierq("quantize", tiny_llama, *words)
        assert answer.code == 0 and "::error" not in answer.err
        text = page.read_text()
        assert text.startswith("### ") and re.search(r"\| KL divergence per token \|  \| [\d.e-]+ nats \|", text)
        assert "Every limit was kept." in text and "| ✅ | KL divergence per token" in text

    def test_a_passed_limit_is_an_annotation_and_is_marked_on_the_page(self, outlierq, tiny_llama, tmp_path, page):
        words = ("-r", "rtn-w4", "-o", tmp_path / "out", "--max-kl", 0, *self.QUICK)
        answer = outlierq("quantize", tiny_llama, *words)
        assert answer.code == 3
        (marked,) = [line for line in answer.err.splitlines() if line.startswith("::error")]
        assert marked.startswith("::error title=outlierq::1 of 1 quality limits failed%0A") and "FAILED" in marked
        assert "**1 of 1 limits failed.**" in page.read_text() and "❌" in page.read_text()

    def test_any_error_is_an_annotation_on_one_line(self, outlierq, page):
        answer = outlierq("plan", "no/such/folder", "-r", "none")
        assert answer.code == 1 and len([line for line in answer.err.splitlines() if "::error" in line]) == 1

    @pytest.mark.parametrize(
        "words", [("plan", "x", "--bad"), ("plan",), ("recipes", "shw"), ("fit", "x", "--card", "1x")]
    )
    def test_wrong_usage_is_an_annotation_too_and_has_no_codes_for_colours(self, outlierq, page, words):
        answer = outlierq(*words)
        assert answer.code == 2 and answer.err.count("::error title=outlierq::") == 1
        assert answer.err.startswith("error: ") and f"usage: outlierq {words[0]}" in answer.err
        assert "x1b" not in answer.err and "│" not in answer.err

    def test_nothing_in_an_error_ends_the_line_or_begins_another_command(self, page):
        from outlierq.report.ci.github import annotation

        marked = annotation("100%\n::set-output name=a::b\r\x1b[31m", title="a,b:c")
        assert marked == "::error title=a%2Cb%3Ac::100%25%0A::set-output name=a::b%0D\\x1b[31m".replace("%0D", "%0A")

    def test_names_of_others_mean_nothing_on_the_page(self, page):
        from outlierq.core.report import Evaluation
        from outlierq.report.ci.github import of_evaluation

        text = of_evaluation(Evaluation({"model": "<img src=x> | [a](b)", "divergence": {"perplexity": 2.0}}))
        assert "\\<img" in text and "\\[a\\](b)" in text

    def test_elsewhere_nothing_is_annotated_and_no_page_is_written(self, outlierq, monkeypatch):
        monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
        monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
        assert "::error" not in outlierq("plan", "no/such/folder", "-r", "none").err

    def test_a_page_that_cannot_be_written_loses_nothing(self, outlierq, tiny_llama, tmp_path, monkeypatch):
        monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "none" / "summary.md"))
        answer = outlierq("quantize", tiny_llama, "-r", "rtn-w8", "-o", tmp_path / "out", "-q")
        assert answer.code == 0 and "summary of this job cannot be written" in answer.err
