"""Plant faults in exports of every format and see which `outlierq verify` finds: `python scripts/plant_faults.py`.

Each fault (`planted.py`) is one change in a copy of a sound export of a tiny random model. It is looked for in three
states of the folder, with and without `--source`:

    as it is       outlierq.json keeps the digests of the files that the run wrote: what happens to a checkpoint later
    signed again   the record is that of the damaged files: what an exporter would do that writes wrong numbers
    no report      a checkpoint of another program

Clean exports of every shipped recipe are verified in the same ways; a fault found in one of them is a false alarm. The
same seed gives the same faults. The result is entered in benchmarks/results/planted.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import planted
import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "planted.json"
SMALL = ["calibration.samples=6", "calibration.sequence_length=32"]
# Exports in which faults are planted, by kind: recipe and settings.
EXPORTS: dict[str, tuple[str, list[str]]] = {
    "compressed-tensors": ("rtn-w4", ["quantize.group_size=32"]),
    "compressed-tensors-asymmetric": ("rtn-w4", ["quantize.group_size=32", "quantize.symmetric=false"]),
    "awq": ("rtn-w4", ["quantize.group_size=32", "quantize.symmetric=false", "export.format=awq"]),
    "awq-folded": ("awq-w4", ["quantize.group_size=32"]),
    "gptq": ("gptq-w4", ["quantize.group_size=32", "export.format=gptq"]),
    "gptq-asymmetric": ("rtn-w4", ["quantize.group_size=32", "quantize.symmetric=false", "export.format=gptq"]),
    "gptq-v2": ("rtn-w4", ["quantize.group_size=32", "quantize.symmetric=false", "export.format=gptq-v2"]),
    "gguf": ("gguf-q4_k", []),
    "fp8-dynamic": ("fp8-dynamic", []),
    "fp8-block": ("fp8-block", []),
    "nvfp4": ("nvfp4", []),
    "mxfp4": ("mxfp4", []),
    "llm-int8": ("llm-int8", []),
    "int8-split": ("int8-split", []),
    "w8a8-static": ("w8a8-static", []),
    "smoothquant": ("smoothquant-w8a8", []),
    "rotated": ("rotate-w4a8", []),
    "kv-fp8": ("kv-fp8", []),
    "mixture": ("rtn-w4", ["quantize.group_size=32"]),
}
# Plain tensors, config, tokenizer and files are tried in these: without folds, with folds, rotated.
EVERYTHING = ("compressed-tensors", "awq-folded", "rotated")
STATES = ("as it is", "signed again", "no report")


def write_source(folder: Path, *, biases: bool = True) -> Path:
    """A random Llama of 2 blocks with 256 channels, random gains and biases, and a tokenizer with merges."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=320, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=1,
            eos_token_id=2, initializer_range=0.05, attention_bias=biases,
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return _saved(model, folder)


def write_mixture(folder: Path) -> Path:
    """A random Qwen3-MoE of 2 blocks with 256 channels and 4 experts each, of which a token takes 2."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=320, hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=4, num_experts_per_tok=2,
            norm_topk_prob=True, max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=1,
            eos_token_id=2, initializer_range=0.05,
        )
    )  # fmt: skip
    return _saved(model, folder)


def _saved(model: Any, folder: Path) -> Path:
    """The model in bfloat16, with a tokenizer that knows some merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, do_sample=True, temperature=0.7)
    model.to(torch.bfloat16).save_pretrained(folder)
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator([planted.__doc__, __doc__], trainer)
    template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
    PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=template
    ).save_pretrained(folder)
    return folder


def source_of(source: Path, name: str) -> Path:
    """The source for a kind of exports or a recipe: readers of GGUF files know no Llama with biases."""
    special = {"gguf": "source-of-gguf", "mixture": "source-of-mixtures"}
    return next((source.parent / place for start, place in special.items() if name.startswith(start)), source)


def export(source: Path, out: Path, recipe: str, settings: list[str]) -> Path:
    """The source, compressed."""
    from outlierq.load import open_checkpoint
    from outlierq.pipeline.planning.decide import make_plan
    from outlierq.pipeline.quantize import quantize
    from outlierq.recipe import load

    small = SMALL if load(recipe, []).calibration else []
    quantize(make_plan(open_checkpoint(str(source)), load(recipe, [*settings, *small])), out)
    return out


def faults_of(kind: str) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Every fault that is planted in exports of one kind, as a function of the copy's folder."""
    if kind == "mixture":
        for name, change in planted.of_mixture():
            yield name, lambda folder, change=change: _plant(folder, change)
        return
    if kind == "gguf":
        for name, change in planted.of_gguf():
            yield name, lambda folder, change=change: change(next(folder.glob("*.gguf")))
        return
    asked = list(planted.of_linear(kind)) if kind != "kv-fp8" else []
    asked += planted.of_format(kind)
    if "asymmetric" in kind or kind in ("awq", "gptq-v2"):
        asked += planted.of_zero_points()
    if kind in EVERYTHING:
        for more in (planted.of_plain_tensors, planted.of_config, planted.of_tokens, planted.of_files):
            asked += more()
    for name, change in asked:
        yield name, lambda folder, change=change: _plant(folder, change)


def _plant(folder: Path, change: planted.Change) -> None:
    """NoFaultError when the change leaves everything as it was: gains of ones are already ones after a rotation."""
    before, copy = planted.Copy.of(folder), planted.Copy.of(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    change(copy)
    if copy.is_like(before) and files == {path.name: path.read_bytes() for path in folder.iterdir()}:
        raise planted.NoFaultError
    copy.save()


def sign_again(folder: Path) -> None:
    """The record of the files as they are now: what a run would have left that wrote them so."""
    from outlierq.core.machine.record import OF_TENSORS, file_entry, signed
    from outlierq.core.report import REPORT_NAME, Report
    from outlierq.load.record import weights_digest

    report = Report.from_dict(json.loads((folder / REPORT_NAME).read_text()))
    files = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".gguf"):
            files[path.name] = {"bytes": path.stat().st_size, OF_TENSORS: weights_digest(path)}
        elif path.name != REPORT_NAME:
            files[path.name] = file_entry(path)
    report = signed(replace(report, record=None), {**report.record, "files": files})
    (folder / REPORT_NAME).write_text(json.dumps(report.to_dict()))


def found_in(folder: Path, source: Path) -> dict[str, list[str]]:
    """What `verify` says of the folder in each state, without and with the source: the checks that found a fault.

    With the source everything is looked at as without it, and more: where that found a fault, it is not done again.
    """
    from outlierq.core.errors import OutlierqError
    from outlierq.core.report import REPORT_NAME
    from outlierq.pipeline.verify import verify

    said = {}
    for state in STATES:
        if state == "signed again":
            try:
                sign_again(folder)
            except (OutlierqError, OSError):  # weights that cannot be read at all
                continue
        if state == "no report":
            (folder / REPORT_NAME).unlink()
        for original in (None, str(source)):
            if original and said[state]:
                said[f"{state}, with --source"] = said[state]
                continue
            gguf = list(folder.glob("*.gguf"))
            result = verify(str(gguf[0] if gguf else folder), original)
            said[f"{state}, with --source" if original else state] = sorted({f.check for f in result.faults})
    return said


def plant(source: Path, work: Path, kinds: list[str]) -> list[dict[str, Any]]:
    """Every fault of these kinds with what was found."""
    rows = []
    for kind in kinds:
        origin = source_of(source, kind)
        clean = export(origin, work / kind, *EXPORTS[kind])
        for name, change in faults_of(kind):
            copy = Path(shutil.copytree(clean, work / "copy"))
            try:
                change(copy)
                rows.append({"export": kind, "fault": name, "found": found_in(copy, origin)})
            except planted.NoFaultError:
                print(f"{kind}: {name}: changes nothing")
            except Exception as error:
                raise RuntimeError(f"{kind}: {name}: {error}") from error
            finally:
                shutil.rmtree(copy)
    return rows


def clean_exports(source: Path, work: Path) -> dict[str, dict[str, list[str]]]:
    """False alarms: what is found in sound exports of all shipped recipes, and of the kinds above."""
    from outlierq.core.errors import OutlierqError
    from outlierq.recipe.shipped import shipped

    alarms = {}
    asked = {f"recipe {name}": (name, []) for name in shipped()} | EXPORTS
    for name, (recipe, settings) in asked.items():
        try:
            origin = source_of(source, name.removeprefix("recipe "))
            folder = export(origin, work / "clean", recipe, settings)
        except OutlierqError as error:
            print(f"{name}: not for this model: {error.what}")
            continue
        alarms[name] = found_in(folder, origin)
        shutil.rmtree(folder)
    return alarms


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Counts by state and by kind of export."""
    counts: dict[str, Any] = {}
    for state in [text for name in STATES for text in (name, f"{name}, with --source")]:
        tried = [row for row in rows if state in row["found"]]
        found = [row for row in tried if row["found"][state]]
        by_kind = Counter(row["export"] for row in tried)
        hits = Counter(row["export"] for row in found)
        counts[state] = {
            "planted": len(tried), "found": len(found), "share": round(len(found) / max(1, len(tried)), 4),
            "by_export": {kind: f"{hits[kind]} of {count}" for kind, count in by_kind.items()},
        }  # fmt: skip
    return counts


def written(rows: list[dict[str, Any]], alarms: dict[str, dict[str, list[str]]]) -> None:
    """Print the figures and enter them."""
    counts = summary(rows)
    for state, numbers in counts.items():
        print(f"{state}: {numbers['found']} of {numbers['planted']} found ({numbers['share']:.1%})")
    wrong = {name: said for name, said in alarms.items() if any(said.values())}
    print(f"false alarms: {len(wrong)} of {len(alarms)} clean exports {wrong or ''}")
    missed = [
        {"export": row["export"], "fault": row["fault"], "missed": [s for s, c in row["found"].items() if not c]}
        for row in rows
    ]
    content = {
        "what": __doc__.split("\n")[0], "summary": counts, "clean_exports": len(alarms), "false_alarms": wrong,
        "missed": [row for row in missed if row["missed"]],
    }  # fmt: skip
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    """Plant, look, and enter the result; or a part of it, to be entered with the others."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--only", nargs="*", choices=sorted(EXPORTS), help="kinds of exports; default: all")
    asked.add_argument("--part", type=Path, help="write what was found here, and enter nothing")
    asked.add_argument("--clean", action="store_true", help="look at clean exports only")
    asked.add_argument("--enter", nargs="*", type=Path, help="enter the results of parts")
    options = asked.parse_args()
    if options.enter:
        parts = [json.loads(path.read_text()) for path in options.enter]
        alarms = {name: said for part in parts for name, said in part["alarms"].items()}
        written([row for part in parts for row in part["rows"]], alarms)
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="planted-") as place:
        source = write_source(Path(place) / "source")
        write_source(Path(place) / "source-of-gguf", biases=False)
        write_mixture(Path(place) / "source-of-mixtures")
        rows = [] if options.clean else plant(source, Path(place), options.only or list(EXPORTS))
        alarms = clean_exports(source, Path(place)) if options.clean or not options.only else {}
    if options.part:
        options.part.write_text(json.dumps({"rows": rows, "alarms": alarms}))
    else:
        written(rows, alarms)


if __name__ == "__main__":
    main()
