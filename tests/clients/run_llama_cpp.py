"""Runs inside llama.cpp's environment: `python run_llama_cpp.py JOB.json OUT.json`. See `jobs.py` for both files."""

import json
import os
import sys
import time


def main() -> None:
    import llama_cpp
    import numpy as np

    with open(sys.argv[1]) as file:
        job = json.load(file)
    start = time.perf_counter()
    file = job["folder"] if os.path.isfile(job["folder"]) else os.path.join(job["folder"], "model.gguf")
    # Type 0 is float32: of the cache.
    exact = {"type_k": 0, "type_v": 0, "flash_attn": False} if job["options"].get("exact") else {}
    model = llama_cpp.Llama(file, n_ctx=1024, n_batch=512, n_threads=1, logits_all=True, verbose=False, **exact)
    loaded = time.perf_counter()

    def logits(ids: list[int], known: int = 0) -> np.ndarray:
        """[new tokens, vocabulary] float64 of the ids behind the `known` ones."""
        if not known:
            model.reset()
        model.eval(ids[known:])
        return np.asarray(model.scores[known : len(ids)], dtype=np.float64)

    ids, known = list(job["prompt"]), 0
    for _ in range(job["new_tokens"]):
        last = logits(ids, known)[-1]
        known = len(ids)
        ids.append(int(last.argmax()))
    losses = []
    for window in job["windows"]:
        scores = logits(window)[:-1]
        scores -= scores.max(axis=1, keepdims=True)
        chosen = scores[np.arange(len(window) - 1), window[1:]]
        losses.append((np.log(np.exp(scores).sum(axis=1)) - chosen).tolist())
    said = {
        "client": f"llama-cpp-python {llama_cpp.__version__}",
        "tokens": ids[len(job["prompt"]) :],
        "losses": losses,
        "logits": [logits(window).tolist() for window in job.get("logits", [])],
        "ids": [model.tokenize(text.encode(), add_bos=True, special=True) for text in job.get("texts", [])],
        "load_seconds": loaded - start,
        "seconds": time.perf_counter() - loaded,
    }
    with open(sys.argv[2], "w") as file:
        json.dump(said, file)


if __name__ == "__main__":
    main()
