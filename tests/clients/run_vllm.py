"""Runs inside vLLM's environment: `python run_vllm.py JOB.json OUT.json`. See `jobs.py` for both files."""

import json
import os
import sys
import time

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # On CPUs with AMX every int4 checkpoint would get int8 inputs, which it does not ask for.
    "VLLM_CPU_INT4_W4A8": "0",
}
for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)


def main() -> None:
    with open(sys.argv[1]) as file:
        job = json.load(file)
    import vllm
    from absent import stand_in
    from vllm.model_executor.models import registry

    stand_in()
    registry._run_in_subprocess = lambda look: look()  # where there would be no stand-in
    start = time.perf_counter()
    engine = vllm.LLM(
        model=job["folder"],
        dtype="bfloat16",
        max_model_len=1024,
        enforce_eager=True,
        seed=0,
        enable_prefix_caching=False,
        disable_log_stats=True,
        **job["options"],
    )
    loaded = time.perf_counter()
    greedy = vllm.SamplingParams(temperature=0, max_tokens=job["new_tokens"], ignore_eos=True)
    [answer] = engine.generate([{"prompt_token_ids": job["prompt"]}], greedy, use_tqdm=False)
    scoring = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    scored = engine.generate([{"prompt_token_ids": ids} for ids in job["windows"]], scoring, use_tqdm=False)
    losses = [
        [-found[token].logprob for token, found in zip(ids[1:], one.prompt_logprobs[1:], strict=True)]
        for ids, one in zip(job["windows"], scored, strict=True)
    ]
    said = {
        "client": f"vLLM {vllm.__version__}",
        "tokens": list(answer.outputs[0].token_ids),
        "losses": losses,
        "load_seconds": loaded - start,
        "seconds": time.perf_counter() - loaded,
    }
    with open(sys.argv[2], "w") as file:
        json.dump(said, file)


if __name__ == "__main__":
    main()
