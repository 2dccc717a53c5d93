"""Find the best mixture of schemes that keeps a size, and compress MODEL by it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from outlierq.cli import shared

if TYPE_CHECKING:
    from outlierq import Fitted

EXAMPLES = (
    "Examples:\n\n"
    "  print the recipe alone:\n\n"
    "  outlierq fit ./SmolLM2-135M --stats ./stats --bits 4.25\n\n"
    "  and compress by it:\n\n"
    "  outlierq fit ./Llama-3.1-8B --stats ./stats --size 4.5GiB --client vllm -o ./out\n\n"
    "  outlierq fit ./Llama-3.1-8B --stats ./stats --card 8GiB --context 32768 --client llama.cpp -o ./out"
)


def command(
    model: shared.Model,
    stats: shared.Stats,
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", help="The folder to write; without it only the recipe is printed."),
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Most bytes of the result without its report: 18GiB.")
    ] = None,
    bits: Annotated[
        float | None, typer.Option(help="Most bits of a weight of the linears, scales included, in the mean: 4.25.")
    ] = None,
    card: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory of a card, of which weights and cache may take 90 %: 24GiB."),
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the cache (16 bits) that the card holds, too.")
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Most KL per token, in nats: the result is measured, and chosen anew, until the smallest passes.",
        ),
    ] = None,
    client: shared.Client = "transformers",
    numbers: shared.Numbers = None,
    recipe: shared.OptionalRecipe = None,
    settings: shared.Settings = None,
    max_perplexity_increase: shared.MaxPerplexityIncrease = None,
    min_top1: shared.MinTop1 = None,
    device: shared.Device = "auto",
    revision: shared.Revision = None,
    trust_remote_code: shared.RemoteCode = False,
    trust_methods: shared.TrustMethods = False,
    restart: shared.Restart = False,
    quiet: shared.Quiet = False,
) -> None:
    """Choose bits and format of every layer so that MODEL keeps a size with the least loss.

    What a choice costs is predicted from statistics and weights. The recipe goes to stdout, with overrides for single
    layers, to be read and changed; with --out MODEL is compressed by it. The size of the result is that of the plan, to
    the byte, and never above the goal. With --max-kl and --out the result is measured; exit code 3 when none passes.
    """
    import outlierq

    def found(fitted: Fitted) -> None:
        typer.echo(fitted.text.rstrip())
        if out is None and not quiet:
            shared.plan_shower()(fitted.plan)

    with shared.progress(quiet) as listen:
        fitted = outlierq.fit(
            model,
            recipe,
            stats=stats,
            out=out,
            size=size,
            bits=bits,
            card=card,
            context=context,
            max_kl=max_kl,
            client=client,
            numbers=numbers or (),
            settings=settings,
            limits=outlierq.Limits.of(None, max_perplexity_increase, min_top1, None),
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            trust_methods=trust_methods,
            restart=restart,
            progress=listen,
            found=found,
            planned=None if quiet else shared.plan_shower(),
            command=shared.command_line(),
        )
    if fitted.report is None:
        return
    from outlierq.report import terminal

    shared.show(terminal.summary(fitted.report), stderr=True)
    shared.say(f"written and verified: {out}", quiet)
    if fitted.remark:
        shared.say(fitted.remark, quiet)
    if fitted.report.evaluation:
        shared.show(terminal.gate(fitted.report.evaluation.gate_rows), stderr=True)
        fitted.report.evaluation.raise_if_failed()
