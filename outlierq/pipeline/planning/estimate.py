"""What a run will cost: memory from shapes alone, time from a short matrix product on this machine, too."""

from __future__ import annotations

from outlierq.pipeline.planning.plan import Estimate, Plan
from outlierq.registry import method

# Time of a calibrated run as a multiple of its matrix products, measured on SmolLM2-135M with gptq-w4 on 2 CPU cores.
OVERHEAD = 2.5


def estimate(plan: Plan) -> Estimate:
    """Memory of the run without a ceiling, from shapes; time, from a short matrix product on this machine, too."""
    from outlierq.pipeline.planning.phases import BASE_BYTES, peaks
    from outlierq.pipeline.planning.work import NO_SAVINGS, work_of

    peak = max(peaks(work_of(plan), NO_SAVINGS).values())
    # Without a ceiling the allocator keeps some of what is freed.
    return Estimate(peak + (peak - BASE_BYTES) // 4, _seconds(plan))


def _seconds(plan: Plan) -> float:
    """Wall time of the run."""
    calibration = plan.recipe.calibration
    if calibration is None or not plan.recipe.needs:
        return 3.0 + sum(s.out_features * s.in_features for s in plan.schemes) / 2e8
    tokens = calibration.samples * calibration.sequence_length
    inputs = {(b.index, s.expert, s.in_features) for b in plan.structure.blocks for s in b.sites}
    share = 1.0 if calibration.all_experts else _share_of_experts(plan)
    products = 2 * tokens * sum(s.out_features * s.in_features * (share if s.expert else 1) for s in plan.schemes)
    products += 2 * tokens * sum(k * k * (share if expert else 1) for _, expert, k in inputs)
    solving = 6 * sum(s.out_features * s.in_features**2 for s in plan.schemes)
    sequential = calibration.mode == "sequential"
    beside = sequential and ("cross" in plan.recipe.needs or plan.recipe.learn is not None)  # the original model, too
    passes = 1 + sequential + beside
    return 5.0 + OVERHEAD * (passes * products + solving * 4 + _learning(plan)) / _flops()


def _learning(plan: Plan) -> float:
    """Operations of learning on blocks: for every token of every step a forward pass and two backward ones."""
    learn, calibration = plan.recipe.learn, plan.recipe.calibration
    if learn is None or calibration is None:
        return 0.0
    options = {name: each.default for name, each in method("learn", learn.method).options.items()} | learn.options
    weights = sum(s.out_features * s.in_features for s in plan.schemes)
    return float(6 * options.get("steps", 0) * options.get("step_tokens", 0) * weights)


def _share_of_experts(plan: Plan) -> float:
    """Which share of the tokens the router sends to an expert on average; 1 without experts."""
    config = plan.model.skeleton.config.get_text_config()
    experts = max((len({s.expert for s in block.sites if s.expert}) for block in plan.structure.blocks), default=0)
    per_token = getattr(config, "num_experts_per_tok", None)
    return per_token / experts if experts and per_token else 1.0


def _flops() -> float:
    """Products per second of a bfloat16 matrix product on this machine, from 50 ms of them."""
    import time

    import torch

    a = torch.ones(512, 512, dtype=torch.bfloat16)
    a @ a
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < 0.05:
        a @ a
        count += 1
    return count * 2 * 512**3 / (time.perf_counter() - started)
