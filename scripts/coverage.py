"""Which architectures come out right: `make coverage` tries every one that the installed transformers can build.

For each a tiny random checkpoint is made (`coverage_models.py`) and compressed with three recipes; each result is
loaded in its own Auto class and held against the original: missing tensors, every weight, the logits, and what the
config says is quantized. Every architecture and recipe is a line in a JSON lines file as soon as it is known, so that a
run that was stopped goes on. `--write` makes docs/models.md and benchmarks/results/coverage.json of it, with what the
latter said before of all that was not measured anew.

Random weights say nothing of quality: only right or wrong. Inputs are random tokens, and for recipes that calibrate
held-out text of the kind that they see: GPTQ gives up what never occurs in it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from coverage_models import POSITIONS, VOCABULARY, architectures, auto_class, tiny_model, tokens, write_checkpoint

import outlierq
from outlierq.calibrate.text.embedded import embedded_text
from outlierq.core.errors import OutlierqError
from outlierq.load.model.conversion.class_named import class_named
from outlierq.load.model.experts.apart import as_stored

RECIPES = ("awq-gptq-w4", "rtn-w8", "fp8-dynamic")
CALIBRATED = ("awq-gptq-w4",)
SETTINGS = {"calibration.samples": 16, "calibration.sequence_length": 48}
# The largest relative error that rounding leaves in a weight of random numbers, and, of the KL of shuffled weights, the
# part that is left: both are far from what a wrong scale or a lost tensor makes.
LARGEST_ERROR = {"awq-gptq-w4": 0.5, "rtn-w8": 0.02, "fp8-dynamic": 0.08}
LARGEST_KL = {"awq-gptq-w4": 0.35, "rtn-w8": 0.1, "fp8-dynamic": 0.15}
DECLARED = ("config", "tensors")  # what `verify` finds in names and configs; weights are compared here
NAMES = "export.names: class"  # what a plan says where it helps, as it says settings: `--set 'key=value'`
LEFT = ("stays in one tensor", "three dimensions")  # of what a plan says of most that it leaves
LEAST = 32  # rows and columns: what is smaller (states, streams of hyper-connections) is none of a linear
TABLES = ("A_log", ".ape")  # of states and positions
ENOUGH = 0.99  # of the linear weights quantized
ROOT = Path(__file__).parents[1]

RIGHT, PART, REFUSED, WRONG, CRASH, NOT_MADE = "right", "part left", "refused", "WRONG", "CRASH", "not built"
ELSEWHERE = "not in transformers"


PAGE = """# Which architectures come out right

Made by `make coverage` with {versions}. For every architecture a tiny random model is
compressed with {recipes}, loaded in its own Auto class, and compared in weights, logits and what
its config says. The state is the worst of the three. Random weights say nothing of quality. Inputs
were random tokens, no images; for a recipe that calibrates held-out text, or random tokens, which is harder.
"""
STATES = """
**right**: all three load and agree. **part left**: right, but less than 99 % of the linear weights were quantized.
**not in transformers**: its plan says that transformers does not load one of them, and why. **refused**: before work,
with the sentence. **not built**: transformers itself does not run the tiny model. **WRONG** and **CRASH** are faults.
Where the plan of a recipe offers a setting with which transformers loads the result, that was set.
"""


@dataclass
class Result:
    """What became of one architecture with one recipe. share: of linear weights that are quantized. kl: of the logits,
    shuffled: that of a model whose weights were shuffled. error: the largest relative one of a weight.
    """

    architecture: str
    kind: str
    recipe: str
    state: str
    sentence: str = ""
    share: float | None = None
    error: float | None = None
    kl: float | None = None
    shuffled: float | None = None
    seconds: float = 0.0


def main() -> int:
    """Measure what is not measured yet, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "coverage.jsonl", help="JSON lines, read and added to")
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="model types, or the words text and multimodal")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--again", action="store_true", help="also what was measured before")
    parser.add_argument(
        "--write", action="store_true", help="write docs/models.md and benchmarks/results/coverage.json"
    )
    arguments = parser.parse_args()
    quiet()
    known = {} if arguments.again else _read(arguments.results)
    for name, kind in sorted(architectures().items()):
        if arguments.only and not {name, kind} & set(arguments.only):
            continue
        recipes = [recipe for recipe in arguments.recipes if (name, recipe) not in known]
        for result in measure(name, kind, recipes) if recipes else ():
            with arguments.results.open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")
            print(f"{name:24} {result.recipe:12} {result.state:10} {result.sentence[:120]}", flush=True)
    if arguments.write:
        _write(_written() | _read(arguments.results))
    return 0


def quiet() -> None:
    """Libraries that say much."""
    import transformers

    os.environ["TQDM_DISABLE"] = "1"
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def measure(name: str, kind: str, recipes: list[str]) -> Iterator[Result]:
    """One architecture with every recipe; whatever goes wrong is a result."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        try:
            model = tiny_model(name, kind)
            write_checkpoint(model, source)
            original = Original.of(model, name, kind, source, recipes)
        except Exception as error:  # whatever the library raises for a config of ours
            for recipe in recipes:
                yield Result(name, kind, recipe, NOT_MADE, _brief(error))
            return
        for recipe in recipes:
            start = time.monotonic()
            result = _measured(original, recipe, Path(folder) / recipe)
            result.seconds = round(time.monotonic() - start, 1)
            shutil.rmtree(Path(folder) / recipe, ignore_errors=True)
            yield result


@dataclass
class Tried:
    """Tokens to try a model with, its log-probabilities, and the KL of a model with shuffled weights."""

    ids: torch.Tensor
    logits: torch.Tensor
    shuffled: float


@dataclass
class Original:
    """A tiny model as transformers loads it, tried with random tokens, and with text of the kind that calibrates, each
    where a recipe asks for it.
    """

    name: str
    kind: str
    source: Path
    model: torch.nn.Module
    random: Tried | None
    text: Tried | None

    @classmethod
    def of(cls, model: torch.nn.Module, name: str, kind: str, source: Path, recipes: list[str]) -> Original:
        """As the checkpoint is loaded again."""
        ids = tokens(torch.Generator().manual_seed(1))
        loaded, info = auto_class(kind, name).from_pretrained(source, dtype="auto", output_loading_info=True)
        if info["missing_keys"]:
            raise ValueError(f"transformers does not find {min(info['missing_keys'])} in what it saved")
        loaded.eval()
        asked = [ids if any(recipe not in CALIBRATED for recipe in recipes) else None,
                 _text(source, ids.shape) if any(recipe in CALIBRATED for recipe in recipes) else None]  # fmt: skip
        logits = [None if each is None else _logits(loaded, each) for each in asked]
        other = _shuffled(model)
        tried = [
            None if each is None else Tried(each, before, _kl(before, _logits(other, each)))
            for each, before in zip(asked, logits, strict=True)
        ]
        return cls(name, kind, source, loaded, *tried)

    def tried(self, recipe: str) -> Tried:
        """What a recipe is judged by: one that calibrates fits the model to its text, and is judged by such text."""
        return self.text if recipe in CALIBRATED else self.random


def _text(source: Path, shape: torch.Size) -> torch.Tensor:
    """Tokens [sequences, tokens] of held-out text."""
    from transformers import AutoTokenizer

    text = embedded_text("evaluation")[: 4 * shape.numel()]
    return torch.tensor(AutoTokenizer.from_pretrained(source)(text)["input_ids"][: shape.numel()]).view(shape)


def _measured(original: Original, recipe: str, out: Path) -> Result:
    """Compress, load and compare."""
    result = Result(original.name, original.kind, recipe, RIGHT, shuffled=original.tried(recipe).shuffled)
    planned, settings = False, SETTINGS
    try:
        plan = outlierq.plan(original.source, recipe, settings=settings)
        if offered := _offered(plan.clients):
            said = " and ".join(f"{key}: {value}" for key, value in offered.items())
            settings, result.sentence = SETTINGS | offered, f"with {said}, which the plan offers"
            plan = outlierq.plan(original.source, recipe, settings=settings)
        planned = True
        outlierq.quantize(original.source, recipe, out=out, settings=settings, device="cpu")
    except OutlierqError as error:
        result.state = CRASH if planned else REFUSED
        result.sentence = ("after planning: " if result.state == CRASH else "") + " ".join(str(error).split())
        return result
    except Exception as error:  # a traceback for the user
        result.state, result.sentence = CRASH, _brief(error)
        return result
    told = [line for line in plan.clients if line.startswith("transformers") and "does not load" in line]
    if told:
        result.state, result.sentence = ELSEWHERE, told[0]
        return result
    try:
        _compare(original, out, result)
    except Exception as error:  # what was written does not load, or does not run
        result.state, result.sentence = WRONG, f"written, but does not load: {_brief(error)}"
    if result.state == PART and not result.sentence:
        result.sentence = next((note for note in plan.notes if any(why in note for why in LEFT)), "")
    return result


def _offered(lines: list[str]) -> dict[str, Any]:
    """The settings that a plan says to be what transformers loads."""
    lines = [line for line in lines if line.startswith("transformers") and "does not load" in line]
    offered = {key: json.loads(value) for line in lines for key, value in re.findall(r"`--set '(.+?)=(.+?)'`", line)}
    return offered | ({"export.names": "class"} if any(NAMES in line for line in lines) else {})


def _compare(original: Original, out: Path, result: Result) -> None:
    """Everything that can be seen in what was written."""
    result.share = _share(original, out, is_renamed=NAMES in result.sentence)
    loaded, info = auto_class(original.kind, original.name).from_pretrained(out, dtype="auto", output_loading_info=True)
    loaded.eval()
    faults = [f"{len(info[what])} {what.replace('_', ' ')}, such as {min(map(str, info[what]))}"
              for what in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[what]]  # fmt: skip
    tried = original.tried(result.recipe)
    result.kl = _kl(tried.logits, _logits(loaded, tried.ids))  # first: packed weights are decoded by it
    errors = dict(_errors(original.model, loaded, vectors="awq" not in result.recipe))
    result.error = max(errors.values(), default=0.0)
    if not result.error <= LARGEST_ERROR[result.recipe]:
        worst = max(errors, key=lambda key: errors[key])
        faults.append(f"{worst} differs by {errors[worst]:.3g}")
    if not result.kl <= LARGEST_KL[result.recipe] * tried.shuffled + 1e-3:
        faults.append(f"KL {result.kl:.3g}, {tried.shuffled:.3g} with shuffled weights")
    declared = [fault for fault in outlierq.verify(out).faults if fault.check in DECLARED]
    faults += [f"verify: {fault}" for fault in declared[:1]]
    if faults:
        result.state, result.sentence = WRONG, "; ".join(faults)
    elif result.share < ENOUGH:
        result.state = PART


def _errors(original: torch.nn.Module, loaded: torch.nn.Module, *, vectors: bool) -> Iterator[tuple[str, float]]:
    """Relative error of every parameter that both models have; a linear's weight is read off its outputs.

    vectors: also of gains and biases, into which a recipe may fold scales.
    """
    parts = dict(loaded.named_modules())
    for name, parameter in original.named_parameters():
        owner, _, leaf = name.rpartition(".")
        part = parts.get(owner)
        if part is None or parameter.numel() == 0 or (parameter.dim() < 2 and not vectors):
            continue
        value = part._parameters.get(leaf)
        if isinstance(part, torch.nn.Linear) and leaf == "weight" and (value is None or value.dtype.itemsize == 1):
            value = _read_off(part)
        if value is not None:
            difference = (value.float() - parameter.float()).norm() / parameter.float().norm().clamp_min(1e-6)
            yield name, float(difference) if difference.isfinite() else float("inf")


def _read_off(linear: torch.nn.Linear) -> torch.Tensor:
    """The weight [out, in] by which a linear layer acts, however it is stored."""
    with torch.no_grad():
        dtype = next((p.dtype for p in linear.parameters() if p.dtype.itemsize > 1), torch.bfloat16)
        bias = linear(torch.zeros(1, linear.in_features, dtype=dtype))
        return (linear(torch.eye(linear.in_features, dtype=dtype)).float() - bias.float()).T


def _logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [tokens, vocabulary]."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1).flatten(0, -2)


def _kl(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.exp() * (one - other)).sum(-1).mean())


def _shuffled(model: torch.nn.Module) -> torch.nn.Module:
    """The model with the rows and columns of its matrices in another order. Changes it."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2 and VOCABULARY not in parameter.shape:
                flat = parameter.flatten()
                parameter.copy_(flat[torch.randperm(len(flat), generator=generator)].view(parameter.shape))
    return model


def _share(original: Original, out: Path, *, is_renamed: bool) -> float:
    """Which part of the linear weights is quantized: all matrices but embeddings, heads, routers and towers.

    is_renamed: the result has the names of the class.
    """
    source, after = outlierq.open(original.source), outlierq.open(out).tensors
    before = as_stored(class_named(source)).tensors if is_renamed else source.tensors
    text = _of_text(original.model, list(before), has_towers=original.kind != "text")
    linear = {name: info for name, info in before.items() if name in text and _is_linear(name, info.shape)}
    plain = sum(info.nbytes for name, info in linear.items() if name in after and after[name].dtype == info.dtype)
    return 1 - plain / max(sum(info.nbytes for info in linear.values()), 1)


def _of_text(model: Any, names: list[str], *, has_towers: bool) -> set[str]:
    """Stored names of what is in the part that transformers calls the decoder, in its own conversion's words.

    has_towers: whether there is anything beside it.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    root, towers = "", []
    if model.config.get_text_config() is model.config:
        if not (has_towers and (towers := [f"{name}." for name in _towers(model)])):
            return set(names)
    else:
        decoder = model.get_decoder()
        root = next(name for name, part in model.named_modules() if part is decoder)
    steps, slots = get_model_conversion_mapping(model), model.state_dict()
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    prefix = model.base_model_prefix or None
    slot = {n: n if n in slots else rename_source_key(n, renamings, converters, prefix, slots)[0] for n in names}
    inside = {name for name in names if not root or slot[name].startswith(f"{root}.")}
    return {name for name in inside if not slot[name].startswith(tuple(towers))}


def _towers(model: Any) -> list[str]:
    """Parts of a model whose config is that of its text that are models with a config of their own, and, beside them,
    what projects from their space.
    """
    from transformers import PreTrainedModel

    parts = dict(model.named_modules())
    towers = [n for n, part in parts.items() if isinstance(part, PreTrainedModel) and part.config is not model.config]
    beside = {name.rpartition(".")[0] for name in towers}
    projectors = [n for n in parts if n.rpartition(".")[0] in beside and n.endswith(("projection", "projector"))]
    return towers + projectors


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    if {VOCABULARY, POSITIONS} & set(shape) or "embed" in name or "conv" in name:
        return False
    return len(shape) in (2, 3) and min(shape[-2:]) >= LEAST and not name.endswith(TABLES)


def _brief(error: Exception) -> str:
    """Type, words and place of an exception."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    words = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {words} ({Path(place.filename).name}:{place.lineno})"


def _written() -> dict[tuple[str, str], dict[str, Any]]:
    """Results that were written before, by architecture and recipe."""
    results = json.loads((ROOT / "benchmarks/results/coverage.json").read_text())["results"]
    return {(result["architecture"], result["recipe"]): result for result in results}


def _read(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Results by architecture and recipe; the last of each."""
    lines = path.read_text().splitlines() if path.exists() else []
    results = map(json.loads, lines)
    return {(result["architecture"], result["recipe"]): result for result in results}


def _write(results: dict[tuple[str, str], dict[str, Any]]) -> None:
    """The table and the numbers of all architectures that are known."""
    names = [name for name in sorted(architectures()) if any(name == known for known, _ in results)]
    rows = [[results[name, recipe] for recipe in RECIPES if (name, recipe) in results] for name in names]
    about = {name: importlib.metadata.version(name) for name in ("transformers", "torch", "compressed-tensors")}
    if importlib.util.find_spec("timm"):  # some towers are of that library
        about["timm"] = importlib.metadata.version("timm")
    states = {kind: _totals([row for row in rows if row[0]["kind"] == kind]) for kind in ("text", "multimodal")}
    every = [result | {"sentence": _cell(result["sentence"])} for row in rows for result in row]
    content = {"versions": about, "totals": states, "results": every}
    (ROOT / "benchmarks/results/coverage.json").write_text(json.dumps(content, indent=1) + "\n")
    (ROOT / "docs/models.md").write_text("\n".join(_page(rows, states, about)) + "\n")


def _worst(row: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the results of an architecture, the one that says most against it, with a sentence where there is one."""
    order = (WRONG, CRASH, REFUSED, NOT_MADE, ELSEWHERE, PART, RIGHT)
    return min(row, key=lambda result: (order.index(result["state"]), not result["sentence"]))


def _totals(rows: list[list[dict[str, Any]]]) -> dict[str, int]:
    states = [_worst(row)["state"] for row in rows]
    return {state: states.count(state) for state in (RIGHT, PART, ELSEWHERE, REFUSED, WRONG, CRASH, NOT_MADE)}


def _page(rows: list[list[dict[str, Any]]], totals: dict[str, dict[str, int]], about: dict[str, str]) -> Iterator[str]:
    """docs/models.md."""
    versions = ", ".join(f"{name} {version}" for name, version in about.items())
    yield PAGE.format(versions=versions, recipes=", ".join(f"`{recipe}`" for recipe in RECIPES))
    yield "| | " + " | ".join(totals["text"]) + " |"
    yield "|---" * (len(totals["text"]) + 1) + "|"
    for kind, counts in totals.items():
        yield f"| {kind} | " + " | ".join(map(str, counts.values())) + " |"
    yield STATES
    counts = ", ".join(f"{sum(r['recipe'] == recipe for row in rows for r in row)} with {recipe}" for recipe in RECIPES)
    kinds = " and ".join(f"{sum(row[0]['kind'] == kind for row in rows)} {kind}" for kind in totals)
    for kind, total in totals.items():
        built = sum(total.values()) - total[NOT_MADE]
        loaded = total[RIGHT] + total[PART]
        if built:
            yield f"Of {built} {kind} architectures that can be built {loaded} come out right ({loaded / built:.1%}).\n"
    yield f"Measured: {kinds} architectures; {counts}. The state is the worst of those that were measured.\n"
    yield "| architecture | kind | state | share quantized | KL, of that of shuffled weights | |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        worst = _worst(row)
        shares = [result["share"] for result in row if result["share"] is not None]
        share = f"{min(shares):.0%}" if shares else ""
        kls = " / ".join("" if r["kl"] is None else f"{r['kl'] / max(r['shuffled'], 1e-9):.3f}" for r in row)
        cells = (row[0]["architecture"], row[0]["kind"], worst["state"], share, kls, _cell(worst["sentence"]))
        yield "| " + " | ".join(cells) + " |"


def _cell(sentence: str) -> str:
    """A sentence that fits into a cell and names no folder of this machine."""
    words = re.sub(re.escape(tempfile.gettempdir()) + r"/\w+/", "", sentence)
    return words.replace("|", "/").replace(tempfile.gettempdir(), "")[:320]


if __name__ == "__main__":
    sys.exit(main())
