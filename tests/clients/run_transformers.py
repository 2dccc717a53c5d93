"""Runs inside a client's environment: `python run_transformers.py JOB.json OUT.json`. See `jobs.py` for both files."""

import collections
import json
import os
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"


def main() -> None:
    import torch
    import transformers

    with open(sys.argv[1]) as file:
        job = json.load(file)
    torch.set_num_threads(1)
    start = time.perf_counter()
    options = {"dtype": torch.bfloat16, **job["options"]}
    model = auto_class(job["folder"], options).from_pretrained(job["folder"], **options).eval()
    loaded = time.perf_counter()
    kinds = collections.Counter(type(part).__name__ for name, part in model.named_modules() if name.endswith("_proj"))
    prompt = torch.tensor([job["prompt"]])
    model.generation_config.eos_token_id = None  # an end of text is a token like any other
    with torch.inference_mode():
        new = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": job["new_tokens"], "do_sample": False}
        tokens = model.generate(prompt, **new)[0, prompt.shape[1] :].tolist()
        losses = []
        for window in job["windows"]:
            ids = torch.tensor([window])
            logits = model(ids).logits[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").tolist())
    said = {
        "client": f"transformers {transformers.__version__}",
        "linears": dict(kinds),
        "tokens": tokens,
        "losses": losses,
        "load_seconds": loaded - start,
        "seconds": time.perf_counter() - loaded,
    }
    with open(sys.argv[2], "w") as file:
        json.dump(said, file)


def auto_class(folder: str, options: dict) -> type:
    """The class of transformers in which a checkpoint is loaded: another one for models that see."""
    import transformers

    if "gguf_file" in options:
        return transformers.AutoModelForCausalLM
    with open(os.path.join(folder, "config.json")) as file:
        sees = json.load(file)["architectures"][0].endswith("ForConditionalGeneration")
    return transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM


if __name__ == "__main__":
    main()
