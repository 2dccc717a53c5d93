"""What is shown is harmless, in any encoding, and a stream that fails never undoes finished work."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from outlierq.core.machine.printable import STAND_INS, printable, representable, whole_characters
from outlierq.core.machine.untrusted import brief

TITLE = "\x1b]0;title\x07"  # sets a terminal's title
ACTING = [
    *map(chr, range(0x09)),
    *map(chr, range(0x0B, 0x20)),
    *map(chr, range(0x7F, 0xA0)),
    "\u202e",
    "\u2066",
    "\u2028",
]
SMALL = ("--set", "calibration.samples=6", "--set", "calibration.sequence_length=32")
NARROW = [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}]
NARROW += [{"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}]
full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")


def shell(line: str, *words: object, **environment: str) -> subprocess.CompletedProcess:
    """A line of bash in which `outlierq` is the command and $1, $2, ... are the words."""
    script = f'outlierq() {{ "{sys.executable}" -m outlierq "$@"; }}\n{line}'
    command = ["bash", "-c", script, "bash", *map(str, words)]
    settings = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, env=settings, timeout=120)


class TestPrintable:
    """One function makes text harmless."""

    @pytest.mark.parametrize("char", ACTING, ids=ascii)
    def test_every_character_that_acts_becomes_visible(self, char):
        assert printable(f"a{char}b").isprintable() and printable(f"a{char}b") != f"a{char}b"

    def test_what_is_seen_stays(self):
        text = "naïve → 中文\u3000 ≤ 5\tx\n\u200d"
        assert printable(text) == text

    def test_bytes_that_are_not_utf8_are_named(self):
        assert printable(os.fsdecode(b"caf\xe9")) == "caf\\xe9"

    def test_noncharacters_are_escaped_since_xml_forbids_them(self):
        assert printable("\ufffe\U0001ffff") == "\\ufffe\\U0001ffff"

    def test_a_value_in_a_message_stays_on_its_line(self):
        assert brief("a\nerror: b\x1b[2J") == "a\\nerror: b\\x1b[2J"
        assert len(brief("\x1b" * 500)) == 100

    @pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
    def test_any_encoding_can_carry_it(self, encoding):
        text = "".join(STAND_INS) + "".join(map(chr, range(0x2500, 0x2580))) + "中"
        assert representable(text, encoding).encode(encoding)
        assert representable("3 × → ≤ │", "ascii") == "3 x -> <= |"

    def test_json_has_whole_characters_only(self):
        half = os.fsdecode(b"caf\xe9")
        assert whole_characters({half: [half, ("a", 1, None)]}) == {"caf\\xe9": ["caf\\xe9", ["a", 1, None]]}


class TestHostileNames:
    """Names in a checkpoint reach no terminal as they are."""

    @pytest.fixture
    def hostile(self, llama_copy, tmp_path, monkeypatch) -> Path:
        monkeypatch.setenv("COLUMNS", "400")  # no line ends inside of the name
        folder = tmp_path / f"model{TITLE}\u202e"
        shutil.copytree(llama_copy, folder)
        return folder

    @pytest.mark.parametrize("command", ["plan", "inspect", "verify", "eval", "compare", "diff", "quantize"])
    def test_of_folders(self, outlierq, hostile, tmp_path, command):
        words = {"compare": (hostile,), "diff": (hostile,), "quantize": ("-r", "rtn-w4", "-o", tmp_path / "out")}
        words |= {"eval": ("--windows", "2", "--window-length", "32")}
        answer = outlierq(command, hostile, *words.get(command, ()))
        assert answer.code == 0, answer.err
        shown = answer.out + answer.err
        assert printable(shown) == shown
        named = command in ("inspect", "verify", "eval", "quantize")  # rich drops the bell by itself
        assert not named or "\\x1b]0;title" in shown.replace("\n", "")

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("quantization_config", {"quant_method": TITLE}),
            ("architectures", [TITLE]),
            ("torch_dtype", TITLE),
            ("dtype", TITLE),
            ("rope_scaling", {"rope_type": TITLE, "factor": 2.0}),
            ("auto_map", {"AutoConfig": TITLE}),
            ("model_type", TITLE),
        ],
    )
    @pytest.mark.parametrize("command", ["plan", "inspect", "verify", "eval"])
    def test_of_the_config(self, outlierq, llama_copy, command, key, value):
        path = llama_copy / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
        answer = outlierq(command, llama_copy)
        shown = answer.out + answer.err
        assert shown and printable(shown) == shown

    def test_of_tensors(self, outlierq, llama_copy):
        from safetensors.torch import load_file, save_file

        path = llama_copy / "model.safetensors"
        save_file({**load_file(path), f"extra{TITLE}": load_file(path)["model.norm.weight"]}, path, {"format": "pt"})
        for command in ("plan", "inspect", "verify"):
            answer = outlierq(command, llama_copy)
            assert printable(answer.out + answer.err) == answer.out + answer.err
        assert "extra\\x1b]0;title\\x07" in outlierq("diff", llama_copy, llama_copy).out + answer.out + answer.err

    def test_json_stays_json(self, outlierq, hostile):
        answer = outlierq("inspect", hostile, "--json")
        assert json.loads(answer.out)["source"] == str(hostile) and printable(answer.out) == answer.out

    def test_a_wrong_word_on_the_command_line_is_shown_harmlessly(self, outlierq):
        answer = outlierq("plan", "model", f"--{TITLE}", "more")
        assert answer.code == 2 and printable(answer.err) == answer.err

    def test_a_terminal_gets_the_styles_of_ours_alone(self, tmp_path):
        import pty

        master, slave = pty.openpty()
        code = (
            "import sys, warnings\nfrom outlierq.cli.streams import Streams\nStreams()\n"
            "from outlierq.report.terminal import make_console, _table\nfrom rich.text import Text\n"
            f"hostile = {TITLE!r} + '\\x1b[1A\\x1b[31mred'\n"
            "table = _table('name')\ntable.add_row(hostile)\n"
            "for part in (table, hostile, Text(hostile, style='bold')):\n    make_console().print(part)\n"
            "print(hostile)\nwarnings.warn(hostile)\nsys.stderr.write(hostile)\n"
        )
        environment = {**os.environ, "TERM": "xterm-256color"}
        done = subprocess.Popen([sys.executable, "-c", code], stdout=slave, stderr=slave, env=environment)
        assert done.wait(60) == 0
        os.close(slave)
        shown = os.read(master, 1 << 16).decode()
        os.close(master)
        assert "\x07" not in shown and "\x1b]" not in shown and "\x1b[1A" not in shown and "\x1b[31m" not in shown
        assert "\x1b[1m" in shown and shown.count("\\x1b]0;title") == 6


class TestStreams:
    """Closed, full and narrow streams."""

    @pytest.mark.parametrize("closed", [">&- 2>&- <&-", pytest.param("2>/dev/full", marks=pytest.mark.slow)])
    def test_a_closed_stream_costs_nothing(self, tiny_llama, tmp_path, closed):
        out = tmp_path / "out"
        assert shell(f'outlierq quantize "$1" -r rtn-w4 -o "$2" {closed}', tiny_llama, out).returncode == 0
        assert not [file for file in out.iterdir() if b"verified:" in file.read_bytes()]  # no file became stdout

    @pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "2>/dev/full"])
    def test_the_exit_code_stays_true(self, closed):
        assert shell(f"outlierq recipes list {closed}").returncode == 0
        assert shell(f"outlierq recipes show none {closed}").returncode == 1
        assert shell(f"outlierq inspect --none {closed}").returncode == 2

    def test_the_exit_code_of_a_command_that_reads_a_model_stays_true(self, tiny_llama):
        assert shell('outlierq inspect "$1" >&- 2>&-', tiny_llama).returncode == 0

    @full
    def test_a_full_disk_for_stdout_says_that_the_work_is_done(self, outlierq, tiny_llama, tmp_path):
        out = tmp_path / "out"
        done = shell('outlierq quantize "$1" -r rtn-w4 -o "$2" > /dev/full', tiny_llama, out)
        assert done.returncode == 1 and b"Traceback" not in done.stderr
        assert b"the work itself is done" in done.stderr and b"again" not in done.stderr
        assert outlierq("verify", out).code == 0

    @full
    def test_the_exit_code_of_the_work_itself_comes_first(self):
        assert shell("outlierq recipes show none > /dev/full").returncode == 1
        assert shell("outlierq recipes check rtn-w4 --none > /dev/full").returncode == 2
        done = shell("outlierq recipes list --json > /dev/full")
        assert done.returncode == 1 and b"No space left on device" in done.stderr

    def test_a_reader_that_goes_away_is_no_error_message(self):
        done = shell("outlierq recipes show gptq-w4 | (exec 0<&-; sleep 1); exit ${PIPESTATUS[0]}")
        assert done.returncode == 1 and b"error" not in done.stderr and b"the work itself is done" in done.stderr

    @pytest.mark.parametrize("environment", NARROW, ids=str)
    def test_narrow_encodings_get_plain_characters(self, tiny_llama, environment):
        last = environment == NARROW[-1]  # what reads a model prints by the same streams, and takes longer
        for words in ("recipes list", "quantize --help", "nothing", *(('inspect "$1"', 'plan "$1/→"') if last else ())):
            done = shell(f"outlierq {words}", tiny_llama, **environment)
            shown = done.stdout + done.stderr
            assert shown and b"Traceback" not in shown and b"\\u" not in shown.replace(b"\\u2192", b"")
            assert max(shown) < 0x80 or environment == NARROW[1]

    @pytest.mark.slow
    def test_a_table_gets_plain_lines_and_signs(self, tiny_llama, tmp_path):
        command = 'outlierq quantize "$1" -r rtn-w4 -o "$2" --max-kl 9'
        done = shell(command, tiny_llama, tmp_path / "out", PYTHONIOENCODING="ascii")
        assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
        assert b" -> " in done.stdout and b"x smaller" in done.stdout and b"<= 9" in done.stdout
        assert b"\\u" not in done.stdout + done.stderr

    def test_junit_is_xml_whatever_the_path(self):
        from outlierq.evaluate.gate import GateRow
        from outlierq.report.ci.junit import junit_xml

        names = "".join(map(chr, range(0x20))) + "\x7f\x85\ufffe\uffff\ud800<&\"'"
        raw = junit_xml([GateRow(f"task {names}", 2.0, "<=", 1.0), GateRow("kl", 0.0, "<=", 1.0)], names, 1.0)
        cases = list(ElementTree.fromstring(raw).iter("testcase"))
        assert len(cases) == 2 and "\\x1b" in cases[0].get("classname")


class TestPathsThatAreNotUtf8:
    """Linux allows any bytes in a path; every command takes them."""

    @pytest.fixture
    def places(self, tiny_llama, tmp_path) -> tuple[Path, Path]:
        source, folder = (tmp_path / os.fsdecode(name) for name in (b"caf\xe9", b"out\xe9"))
        try:
            shutil.copytree(tiny_llama, source)
        except OSError:
            pytest.skip("the file system takes UTF-8 only")
        return source, folder

    def test_all_commands_take_them(self, outlierq, places, tmp_path):
        source, out = places
        stats, page, results, junit = (
            tmp_path / os.fsdecode(name) for name in (b"st\xe9", b"page\xe9", b"r\xe9.json", b"j\xe9.xml")
        )
        window, gate = ("--windows", "2", "--window-length", "32"), ("--max-kl", "9", "--junit", junit)
        for words in [
            ("plan", source),
            ("calibrate", source, "-o", stats, "--samples", "6", "--sequence-length", "32"),
            ("detect", source, "--stats", stats, "-o", page),
            ("quantize", source, "-r", "gptq-w4", "--stats", stats, *SMALL, "-o", out, *gate),
            ("verify", out, "--source", source),
            ("inspect", out),
            ("diff", source, out),
            ("compare", source, out),
            ("eval", out, "--reference", source, *window, "--record", "-o", results, "--json"),
            ("publish", out, "me/it", "--base-model", "owner/name", "--dry-run"),
            ("quantize", source, "-r", "rtn-w4", "--set", "export.format=gguf", "-o", f"{out}-gguf"),
        ]:
            answer = outlierq(*words)
            assert answer.code == 0, (words[0], answer.err)
        assert "caf\\xe9" in json.loads((out / "outlierq.json").read_bytes())["model"]
        assert "caf\\xe9" in page.with_name(page.name + ".html").read_text(encoding="utf-8")
        assert json.loads(results.read_bytes()) and ElementTree.fromstring(junit.read_bytes()) is not None
        assert not list(tmp_path.glob("outlierq-path-*"))
