"""Measure a checkpoint: perplexity, divergence from its original, named tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from outlierq.cli import shared

EXAMPLES = (
    "Examples:\n\n"
    "  outlierq eval ./SmolLM2-135M-W4 --reference ./SmolLM2-135M\n\n"
    "  outlierq eval ./out --reference ./original --text wiki.test.raw --windows 64 --max-kl 0.05\n\n"
    "  outlierq eval ./out --tasks wikitext,mmlu --data-dir ./data --limit 20"
)


def command(
    model: shared.Model,
    reference: Annotated[str | None, typer.Option(help="The original, for KL, top-1 agreement and flips.")] = None,
    tasks: Annotated[str | None, typer.Option(help="lm-eval tasks, separated by commas: wikitext,mmlu.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Read the tasks' data from here instead of the Hub.")] = None,
    text: Annotated[str | None, typer.Option(help="Text file to measure on; default: held-out embedded text.")] = None,
    windows: Annotated[int, typer.Option(min=0, help="Number of windows of the text; 0 takes all.")] = 24,
    window_length: Annotated[int, typer.Option(min=2, help="Tokens in a window; windows do not overlap.")] = 512,
    limit: Annotated[int | None, typer.Option(min=1, help="Samples per task.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples in the prompt; default: the task's own.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at a time in tasks.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    max_kl: Annotated[float | None, typer.Option(help="Exit with 3 when KL per token is above this.")] = None,
    max_perplexity_increase: Annotated[
        float | None, typer.Option(help="Exit with 3 when perplexity rises by more; 0.03 is 3 %.")
    ] = None,
    min_top1: Annotated[float | None, typer.Option(help="Exit with 3 when top-1 agreement is below this.")] = None,
    device: shared.Device = "auto",
    revision: shared.Revision = None,
    trust_remote_code: shared.RemoteCode = False,
    as_json: shared.AsJson = False,
    quiet: shared.Quiet = False,
) -> None:
    """Perplexity of MODEL; with --reference also KL divergence per token, top-1 agreement and flips."""
    from outlierq.evaluate.gate import check_gate, raise_if_failed
    from outlierq.load import load_tokenizer
    from outlierq.pipeline import evaluation
    from outlierq.report import terminal

    limits = {"max_kl": max_kl, "max_perplexity_increase": max_perplexity_increase, "min_top1": min_top1}
    if any(limit is not None for limit in limits.values()) and reference is None:
        raise typer.BadParameter("quality gates compare with an original; give --reference", param_hint="--reference")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"{dtype!r}; choose float32, bfloat16 or float16", param_hint="--dtype")
    where = shared.choose_device(device)
    content, text_name = evaluation.evaluation_text(text)
    checkpoint = shared.open_model(model, revision, trust_remote_code)
    original = shared.open_model(reference, None, trust_remote_code) if reference else None
    loading = {"dtype": dtype, "device": where, "trust_remote_code": trust_remote_code}
    loaded = evaluation.load_for_evaluation(checkpoint, **loading)
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    result: dict = {"model": model, "reference": reference, "text": text_name, "dtype": dtype}
    with shared.progress(quiet) as listen:
        measured = evaluation.measure_text(
            loaded,
            tokenizer,
            content,
            reference=evaluation.load_for_evaluation(original, **loading) if original else None,
            window_length=window_length,
            windows=windows or None,
            listen=listen,
        )
    result["divergence"] = measured.to_dict()
    if tasks:
        shared.say(f"running {tasks} ...", quiet)
        named = [name.strip() for name in tasks.split(",") if name.strip()]
        result["tasks"] = evaluation.run_tasks(
            loaded,
            tokenizer,
            named,
            data_dir=data_dir,
            limit=limit,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
        )
    gate = check_gate(measured, **limits)
    if as_json:
        shared.print_json(result | {"gate": [vars(row) | {"passed": row.passed} for row in gate]})
    else:
        typer.echo(f"{model} on {text_name}")
        shared.show(terminal.divergence(measured))
        if tasks:
            shared.show(terminal.tasks(result["tasks"]))
        if gate:
            shared.show(terminal.gate(gate))
    raise_if_failed(gate)
