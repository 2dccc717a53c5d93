"""The runs that are compared, and how each is started: same model, same calibration tokens, same scheme."""

import json
import shutil
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from measure import measure
from protocol import CALIBRATION_SAMPLES, CALIBRATION_TEXT, SEQUENCE_LENGTH, write_calibration
from record import versions

GROUP_SIZE = 64
SCHEME = f"4-bit integer weights, groups of {GROUP_SIZE}, activations not quantized"
OURS = "outlierq"
PEERS = ("llmcompressor", "gptqmodel")
PEER_SCRIPTS = Path(__file__).parent / "peers"
RECIPES = {"rtn": "rtn-w4", "gptq": "gptq-w4", "awq": "awq-w4", "awq-gptq": "awq-gptq-w4"}
METHODS = {"llmcompressor": ("gptq", "awq", "awq-both"), "gptqmodel": ("gptq", "awq"), OURS: tuple(RECIPES)}


@dataclass(frozen=True)
class Run:
    """One tool making one checkpoint with 4-bit weights in groups of GROUP_SIZE."""

    tool: str
    method: str
    symmetric: bool

    @property
    def name(self) -> str:
        """The key in the results, and the folder of the output."""
        return f"{self.tool}-{self.method}-{'sym' if self.symmetric else 'asym'}"


RUNS = {
    run.name: run
    for tool, methods in METHODS.items()
    for method in methods
    for run in (Run(tool, method, symmetric=True), Run(tool, method, symmetric=False))
}


@dataclass(frozen=True)
class Setup:
    """What all runs share. outputs: folder of the checkpoints; keep_peers: do not repeat what peers finished there."""

    model: Path
    data_dir: Path
    tokens: Path
    outputs: Path
    keep_peers: bool
    threads: int
    programs: dict[str, str | None]

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables of every run."""
        threads = str(self.threads)
        return {"OMP_NUM_THREADS": threads, "GPTQMODEL_CPU_WORKERS": threads, "HF_HUB_OFFLINE": "1"}


def add_arguments(parser: ArgumentParser) -> None:
    """The options that quality.py and cost.py share."""
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with the WikiText-2 raw texts")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder of the original, in bf16")
    parser.add_argument("--outlierq", default=str(Path(sys.executable).with_name(OURS)), help="our command")
    parser.add_argument("--llmcompressor-python", help="Python of the environment with llm-compressor")
    parser.add_argument("--gptqmodel-python", help="Python of the environment with GPTQModel")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"do only these runs: {' '.join(RUNS)}")
    parser.add_argument("--reuse", type=Path, help="folder for the outputs; what peers finished there is kept")
    parser.add_argument("--threads", type=int, default=2, help="OMP_NUM_THREADS of every run (default: 2)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write")


@contextmanager
def setup_from(arguments: Namespace) -> Iterator[Setup]:
    """The setup that the command line asks for, with the calibration tokens written; removes outputs not to be kept."""
    with TemporaryDirectory() as temporary:
        outputs = arguments.reuse or Path(temporary)
        outputs.mkdir(parents=True, exist_ok=True)
        setup = Setup(
            model=arguments.model,
            data_dir=arguments.data_dir,
            tokens=outputs / "calibration-tokens.json",
            outputs=outputs,
            keep_peers=arguments.reuse is not None,
            threads=arguments.threads,
            programs={
                OURS: arguments.outlierq,
                "llmcompressor": arguments.llmcompressor_python,
                "gptqmodel": arguments.gptqmodel_python,
            },
        )
        write_tokens(setup)
        yield setup


def write_tokens(setup: Setup) -> None:
    """Write the calibration tokens; refuse kept outputs that were made from others."""
    kept = setup.tokens.read_bytes() if setup.tokens.exists() else None
    write_calibration(setup.model, setup.data_dir, setup.tokens)
    if kept is not None and kept != setup.tokens.read_bytes():
        setup.tokens.write_bytes(kept)
        raise SystemExit("error: the outputs in the --reuse folder were made from other calibration tokens")


def select(names: list[str] | None, setup: Setup, default: list[str]) -> list[Run]:
    """The runs called `names`, or those of `default` whose tool is given or whose output is kept."""
    unknown = sorted(set(names or []) - set(RUNS))
    if unknown:
        raise SystemExit(f"error: no run is called {', '.join(unknown)}\n\nhint: the runs are {', '.join(RUNS)}")
    if names:
        return [RUNS[name] for name in names]
    return [RUNS[name] for name in default if setup.programs[RUNS[name].tool] or keeps(RUNS[name], setup)]


def keeps(run: Run, setup: Setup) -> bool:
    """Whether this is a peer's run, finished earlier, that `--reuse` keeps."""
    return setup.keep_peers and run.tool in PEERS and cost_file(run, setup).exists()


def cost_file(run: Run, setup: Setup) -> Path:
    """Where the cost of a finished run lies."""
    return setup.outputs / f"{run.name}.cost.json"


def execute(run: Run, setup: Setup) -> dict:
    """Make the checkpoint of `run` in setup.outputs and return its cost, or the cost of the kept run."""
    if keeps(run, setup):
        return json.loads(cost_file(run, setup).read_text())
    require(setup.programs[run.tool], run)
    for stale in (run.name, f"{run.name}.partial"):  # a run of ours that was stopped would be resumed, and look cheap
        shutil.rmtree(setup.outputs / stale, ignore_errors=True)
    cost = measure(command(run, setup), setup.outputs / f"{run.name}.log", setup.environment)
    cost["threads"] = setup.threads
    if run.tool in PEERS:
        cost["versions"] = versions(setup.programs[run.tool])
    cost_file(run, setup).write_text(json.dumps(cost, indent=2) + "\n")
    return cost


def require(program: str | None, run: Run) -> None:
    """End with a hint if the program that makes `run` is not there."""
    option = f"--{OURS}" if run.tool == OURS else f"--{run.tool}-python"
    if program is None or shutil.which(program) is None:
        raise SystemExit(f"error: {run.name} needs a program, and {program} is none\n\nhint: name it with {option}")


def command(run: Run, setup: Setup) -> list[str]:
    """The command line of a run."""
    out = str(setup.outputs / run.name)
    program = setup.programs[run.tool]
    if run.tool == OURS:
        return [program, *quantize(RECIPES[run.method], run.symmetric, setup.model, setup.data_dir), "-o", out]
    script = str(PEER_SCRIPTS / f"{run.tool}_run.py")
    asymmetric = [] if run.symmetric else ["--asymmetric"]
    return [program, script, str(setup.model), str(setup.tokens), out, "--method", run.method, *asymmetric]


def quantize(recipe: str, symmetric: bool, model: Path, data_dir: Path) -> list[str]:
    """Our arguments for one recipe under the benchmark's scheme, with its calibration text unless it needs none."""
    settings = {"quantize.symmetric": str(symmetric).lower(), "quantize.group_size": GROUP_SIZE}
    if recipe != RECIPES["rtn"]:
        settings["calibration.text"] = data_dir / CALIBRATION_TEXT
        settings["calibration.samples"] = CALIBRATION_SAMPLES
        settings["calibration.sequence_length"] = SEQUENCE_LENGTH
        settings["calibration.seed"] = "null"  # the first windows, as for the peers
    overrides = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return ["quantize", str(model), "--recipe", recipe, *overrides]
