"""Made-up outlier reports with the dimensions and habits of real models, for tests and for looking at the page."""

from __future__ import annotations

import numpy as np

from outlierq.core.measured.outliers import BlockOutliers, GroupOutliers, MassiveEntry, OutlierReport

PLANTED = {78: 45.0, 214: 25.0, 423: 60.0}  # residual channel -> how many times above the others
SPIKE_BLOCK, SPIKE_CHANNEL, SPIKE = 2, 1101, 2143.0  # one input of down_proj, as massive activations arise

ROLES = {
    "self_attn.q_proj": (1, ("q_proj", "k_proj", "v_proj"), "self_attn"),
    "self_attn.o_proj": (1, ("o_proj",), "self_attn"),
    "mlp.gate_proj": (1, ("gate_proj", "up_proj"), "mlp"),
    "mlp.down_proj": (0, ("down_proj",), "mlp"),
}


def outlier_report(
    blocks: int = 30, hidden: int = 576, intermediate: int = 1536, model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
) -> OutlierReport:
    """A report of SmolLM2's size, or of another one; the same for the same arguments."""
    random = np.random.default_rng(0)
    groups = []
    for block in range(blocks):
        for role, (is_hidden, leaves, parent) in ROLES.items():
            groups.append(_group(random, block, role, hidden if is_hidden else intermediate, leaves, parent))
    dangerous = sum(group.danger == "dangerous" for group in groups)
    return OutlierReport(
        model=model,
        fingerprint="3f1a9c0e5b7d24680a1b2c3d4e5f60718293a4b5c6d7e8f90123456789abcdef",
        statistics="128 sequences of 512 tokens of the embedded calibration text",
        seconds=4.218,
        groups=tuple(groups),
        blocks=tuple(_block(random, block, hidden) for block in range(blocks)),
        outlier_features={"423": (0.9333, 0.412), "78": (0.7, 0.081)},
        outlier_channels=tuple(PLANTED),
        summary=(
            f"{dangerous} of {len(groups)} inputs lose more than 10 % of their output in plain W8A8, "
            "nearly all for the same 3 channels.",
            f"Channels {', '.join(map(str, PLANTED))} are 25 to 60 times above the median in every block; "
            "dividing them out before quantizing (smoothquant) brings all but one input under 2 %.",
            f"model.layers.{SPIKE_BLOCK}.mlp.down_proj holds one value of {SPIKE:,.0f} on the first token of "
            "every sequence.",
        ),
        notes=("Statistics of the embedded text were used, because no --stats were given.",),
    )


def _group(random, block: int, role: str, width: int, leaves: tuple[str, ...], parent: str) -> GroupOutliers:
    spread, level = (0.35, 2.5 + block / 12) if parent == "self_attn" else (0.5, 3.5 + block / 8)
    abs_max = level * random.lognormal(0, spread, width)
    planted = role in ("self_attn.q_proj", "mlp.gate_proj")
    if planted:
        for channel, times in PLANTED.items():
            if channel < width:
                abs_max[channel] = level * times * random.lognormal(0, 0.15)
    if role == "self_attn.o_proj":
        abs_max /= 6
    spike = role == "mlp.down_proj" and block == SPIKE_BLOCK
    if spike:
        abs_max[SPIKE_CHANNEL % width] = SPIKE
    error = float(0.006 * random.lognormal(0, 0.3) * (14 if planted else 60 if spike else 1) * (1 + block / 40))
    danger = "dangerous" if error > 0.1 else "watch" if error > 0.05 else "calm"
    remedy = "" if danger == "calm" else "mixed precision" if spike else "smoothquant"
    errors = {"w8a8": error, "w4a16": float(0.04 * random.lognormal(0, 0.2))}
    if remedy:
        errors[f"w8a8 {remedy}"] = error / 9
    reasons = {
        "calm": (),
        "watch": ("3 channels hold half of the largest magnitude",),
        "dangerous": (
            "channel 423 is 60 times the median",
            "a scale per token leaves 4 of 255 steps to the other channels",
        ),
    }[danger]
    return GroupOutliers(
        group=f"model.layers.{block}.{role}",
        block=block,
        role=role,
        sites=tuple(f"model.layers.{block}.{parent}.{leaf}" for leaf in leaves),
        tokens=65536,
        abs_max=tuple(float(value) for value in abs_max),
        outlier_channels=tuple(PLANTED) if planted else (SPIKE_CHANNEL,) if spike else (),
        measures={"channel_ratio": float(abs_max.max() / np.median(abs_max)), "kurtosis": 3.4},
        errors=errors,
        remedy=remedy,
        danger=danger,
        reasons=reasons,
        missing=("hill_alpha: fewer than 50 rows in the reservoir",) if role == "self_attn.o_proj" else (),
    )


def _block(random, block: int, hidden: int) -> BlockOutliers:
    massive = []
    if block >= SPIKE_BLOCK:
        for sequence in range(4):
            for channel, value in ((423 % hidden, 1890.0), (78 % hidden, -812.0)):
                value *= float(random.lognormal(0, 0.05)) * (0.2 if block == 29 else 1)
                massive.append(MassiveEntry(block, sequence, 0, 1, "<|im_start|>", channel, value, abs(value) / 1.4))
        for position, text in ((7, "."), (41, "\n"), (388, ".")):
            if (block + position) % 3:
                value = float(240 * random.lognormal(0, 0.3))
                massive.append(MassiveEntry(block, 1, position, 30, text, 423 % hidden, value, value / 1.4))
    return BlockOutliers(block, owl=4.2, measures={"residual_abs_max": 1890.0}, massive=tuple(massive))
