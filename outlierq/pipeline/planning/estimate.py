"""What a run will cost: memory from shapes alone, time from a short matrix product on this machine, too."""

from __future__ import annotations

from math import prod

from outlierq.pipeline.planning.plan import Estimate, Plan
from outlierq.pipeline.planning.speed import measured_speed
from outlierq.pipeline.remodel.rewrite import original_of
from outlierq.registry import method, transform_method

# Time of a calibrated run as a multiple of its matrix products, measured on SmolLM2-135M. In CPU seconds of one core,
# measured and as said here: gptq-w4 46 and 49, gptaq-w4 68 and 58, awq-gptq-w4 115 and 103,
# smoothquant-w8a8 74 and 64, gguf-q4_k 45 and 51.
OVERHEAD = 2.5
# A transform that searches its scales rounds the weights and multiplies them with the hessian so often.
SEARCHED = 30
# Time of writing text as a multiple of its matrix products, which are of few rows at a time.
WRITING = 10.0
FOLDED = ("smoothquant",)  # transforms that have nothing to search
# Seconds to start and end, and weights that a thread rounds in one (SmolLM2-135M on AVX-512, CPU seconds of whole runs:
# rtn-w8 5.8, rtn-w4 8.9, mxfp4 16.5). Floats and types of GGUF are searched on more grids.
START, ROUNDED, SEARCHED_INTEGERS, SEARCHED_FLOATS = 4.5, 1.2e8, 2.5e7, 9e6
# Weights that are decoded in a second: of a GGUF file (rtn-w8 of one took 12.1), and of what torch decodes.
FROM_GGUF, FROM_CODES = 2.5e7, 2e8
# Of a weight, for a token of a step in which rotations learn: forward, again, backward through both, and the turns.
# With OVERHEAD: spinquant-w4a4 on BabyLlama 46 s beside 86 measured, a step on SmolLM2-135M 14 beside 9.
TURNING, STEP_TOKENS = 10, 2048
# A calibration before the plan runs the model forward, then forward and backward for what an error costs at its end.
EXAMINING = 4


def estimate(plan: Plan, *, stats: bool = False, device: str = "cpu") -> Estimate:
    """Memory of the run without a ceiling, from shapes; time, from a short matrix product on this machine, too.

    stats: statistics come from a file. Time is None where nothing is known of it: on a GPU, of methods from outside, of
    codebooks of vectors.
    """
    from outlierq.pipeline.planning.phases import BASE_BYTES, peaks
    from outlierq.pipeline.planning.work import NO_SAVINGS, work_of

    peak = max(peaks(work_of(plan, stats=stats), NO_SAVINGS).values())
    unknown = device != "cpu" or bool(plan.recipe.outside_code) or any(s.vector > 1 for s in plan.schemes.values())
    speed = measured_speed()
    alone = None if unknown else _seconds(plan, stats, speed.best)
    # Without a ceiling the allocator keeps some of what is freed.
    return Estimate(peak + (peak - BASE_BYTES) // 4, alone and alone * speed.waiting, speed.waiting)


def _seconds(plan: Plan, stats: bool, best: float) -> float:
    """Wall time of the run on a machine that has nothing else to do. best: operations in a second."""
    calibration = plan.recipe.calibration
    if calibration is None or not plan.recipe.needs:
        return START + _decoding(plan) + _rounding(plan)
    tokens = calibration.samples * calibration.sequence_length
    inputs = {(b.index, s.expert, s.in_features) for b in plan.structure.blocks for s in b.sites}
    share = 1.0 if calibration.all_experts else _share_of_experts(plan)
    products = 2 * tokens * sum(s.out_features * s.in_features * (share if s.expert else 1) for s in plan.schemes)
    products += 2 * tokens * sum(k * k * (share if expert else 1) for _, expert, k in inputs)
    solving = 6 * sum(s.out_features * s.in_features**2 for s in plan.schemes)
    sequential = calibration.mode == "sequential"
    beside = sequential and ("cross" in plan.recipe.needs or plan.recipe.learn is not None)  # the original model, too
    passes = (not stats) + sequential + beside
    searching = sum(SEARCHED / 3 for t in plan.recipe.group_transforms if t.method not in FOLDED)
    quantize = plan.recipe.quantize
    passes += EXAMINING if quantize is not None and quantize.keep_share is not None else 0
    work = passes * products + solving * (4 + searching) + _learning(plan) + _turning(plan)
    return START + _decoding(plan) * (1 + passes) + (OVERHEAD * work + (0 if stats else _writing(plan))) / best


def _writing(plan: Plan) -> float:
    """Operations of writing text: each token goes through the whole model, a few of them at a time."""
    calibration = plan.recipe.calibration
    if calibration is None:
        return 0.0
    tokens = calibration.own_share * calibration.samples * calibration.sequence_length
    return WRITING * 2 * tokens * sum(s.out_features * s.in_features for s in plan.structure.sites)


def _rounding(plan: Plan) -> float:
    """Seconds of rounding without data."""
    import torch

    searched = (
        plan.recipe.quantize is not None and plan.recipe.quantize.options.get("scale_search", "minmax") != "minmax"
    )
    seconds = 0.0
    for site, scheme in plan.schemes.items():
        grids = SEARCHED_INTEGERS if scheme.kind == "int" and scheme.type is None else SEARCHED_FLOATS
        seconds += site.out_features * site.in_features / (grids if searched else ROUNDED)
    return seconds / torch.get_num_threads()


def _decoding(plan: Plan) -> float:
    """Seconds of decoding a compressed source once."""
    from outlierq.load import FramedCheckpoint, GgufCheckpoint

    source = original_of(plan.checkpoint)
    rate = FROM_GGUF if isinstance(source, FramedCheckpoint | GgufCheckpoint) else FROM_CODES
    coded = (name for name in source.tensors if rate == FROM_GGUF or source.making_bytes(name))
    return sum(prod(source.tensors[name].shape) for name in coded) / rate


def _turning(plan: Plan) -> float:
    """Operations of rotations that learn: in every step some tokens of the text go through the whole model."""
    calibration, steps = plan.recipe.calibration, 0
    if calibration is None:
        return 0.0
    for step in plan.recipe.turning:
        options = {name: each.default for name, each in transform_method(step.method).options.items()} | step.options
        steps += options.get("steps", 0)
    tokens = min(STEP_TOKENS, calibration.samples * calibration.sequence_length)
    return TURNING * tokens * steps * float(sum(s.out_features * s.in_features for s in plan.structure.sites))


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
