"""A small masked-diffusion model in the formats of weights and inputs, and what hiding text in calibration brings.

    python benchmarks/masked_diffusion.py MODEL --calibration text.txt --text other.txt

MODEL, a small one that continues text, is taught to fill in hidden tokens first: there is no trained one of that size.
"""

import argparse
import tempfile
from pathlib import Path
from unittest import mock

import torch
from record import write_results

import outlierq
from outlierq.calibrate.text.windows import TokenSet
from outlierq.core.masking import hidden_at_random
from outlierq.core.windows import begun, opening_tokens
from outlierq.evaluate.divergence import text_windows
from outlierq.load import load_model, load_tokenizer, open_checkpoint

BATCH, RATE = 8, 1e-3
INT4 = "quantize.activations={kind: int, bits: 4}"
# Name, recipe, settings; GROUP stands for the group size of the weights.
RUNS = [
    ("W4A16, rtn", "rtn-w4", ["GROUP"]),
    ("W4A16, gptq", "gptq-w4", ["GROUP"]),
    ("W4A16, awq", "awq-gptq-w4", ["GROUP"]),
    ("W3A16, gptq", "gptq-w4", ["GROUP", "quantize.bits=3"]),
    ("W8A8", "w8a8-dynamic", []),
    ("W8A8, smoothquant", "smoothquant-w8a8", []),
    ("FP8", "fp8-dynamic", []),
    ("W4A4, gptq", "gptq-w4", ["GROUP", INT4]),
    ("W4A4, rotated", "rotate-w4a4", ["GROUP", "quantize.overrides=[]"]),
    ("NVFP4 W4A4", "nvfp4-w4a4", []),
]
AGAIN = ("W4A16, gptq", "W3A16, gptq", "W4A4, gptq")  # calibrated on text of which nothing is hidden, too


def main() -> None:
    """Teach, quantize in every way, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a small checkpoint with a head of its own or a tied one")
    parser.add_argument("--calibration", required=True, help="text file to teach and calibrate on")
    parser.add_argument("--text", required=True, help="text file to judge on")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--sequence-length", type=int, default=120)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "masked_diffusion.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        losses = taught(arguments, Path(folder, "model"))
        rows = [judged(arguments, Path(folder), *run) for run in RUNS]
        with mock.patch.object(TokenSet, "hidden_behind", lambda tokens, *_: tokens):
            plain = [judged(arguments, Path(folder), *run) for run in RUNS if run[0] in AGAIN]
    write_results(arguments.output, {"losses": losses, "rows": rows, "calibrated_on_plain_text": plain})


def taught(arguments: argparse.Namespace, out: Path) -> list[float]:
    """Write the model whose tokens see all others, taught to fill in; the loss of every 50 steps."""
    checkpoint = open_checkpoint(arguments.model)
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    model.requires_grad_(True).resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.is_causal, model.config.mask_token_id = False, tokenizer.mask_token_id
    for part in model.modules():
        part.is_causal = False
    ids = windows_of(tokenizer, arguments.calibration, arguments.sequence_length)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=arguments.steps)
    generator, losses = torch.Generator().manual_seed(0), []
    for step in range(arguments.steps):
        batch = ids[torch.randint(len(ids), (BATCH,), generator=generator)]
        loss = filling_loss(model, batch, tokenizer.mask_token_id, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    means = [sum(part) / len(part) for part in (losses[start : start + 50] for start in range(0, len(losses), 50))]
    print("loss", means, flush=True)
    return means


def windows_of(tokenizer: object, path: str, length: int) -> torch.Tensor:
    """All windows of a text, [windows, length]."""
    opening = opening_tokens(tokenizer)
    return begun(text_windows(tokenizer, Path(path).read_text(), length - len(opening)), opening)


def filling_loss(model: torch.nn.Module, ids: torch.Tensor, token: int, seed: int) -> torch.Tensor:
    """The mean over windows of the mean loss of what is hidden."""
    hidden = hidden_at_random(ids, token, 1, seed)
    logp = model(input_ids=hidden.over(ids), use_cache=False).logits.log_softmax(-1)
    lost = -logp.gather(-1, ids[..., None])[..., 0] * hidden.places
    return (lost.sum(1) / hidden.places.sum(1)).mean()


def judged(arguments: argparse.Namespace, folder: Path, name: str, recipe: str, settings: list[str]) -> dict:
    """One recipe, on the taught model."""
    usual = {
        "calibration.text": arguments.calibration,
        "calibration.samples": arguments.samples,
        "calibration.sequence_length": arguments.sequence_length,
    }
    group = f"quantize.group_size={arguments.group_size}"
    changed = [group if setting == "GROUP" else setting for setting in settings]
    if recipe not in ("rtn-w4", "w8a8-dynamic", "fp8-dynamic"):
        changed += [f"{key}={value}" for key, value in usual.items()]
    with tempfile.TemporaryDirectory(dir=folder) as place:
        out = Path(place, "out")
        outlierq.quantize(folder / "model", recipe, out=out, settings=changed, device="cpu")
        window = {"windows": arguments.windows, "window_length": arguments.sequence_length}
        made = outlierq.evaluate(out, folder / "model", text=arguments.text, device="cpu", cached=False, **window)
    print(name, made.kl, made.perplexity, made.reference_perplexity, flush=True)
    figures = made["divergence"]
    kept = (
        "kl_per_token",
        "kl_standard_error",
        "perplexity",
        "reference_perplexity",
        "top1_agreement",
        "tokens",
        "shift",
    )
    return {"name": name, "recipe": recipe} | {key: figures[key] for key in kept}


if __name__ == "__main__":
    main()
