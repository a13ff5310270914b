"""The learning rate as a pure function of the optimizer step."""

import math


def learning_rate_factor(step: int, *, scheduler: str, warmup_steps: int, total_steps: int, min_ratio: float) -> float:
    """The factor on the peak learning rate at optimizer step `step`, counted from 0.

    The warm-up climbs from 1 / warmup_steps to 1, so no step is spent at zero. After it the rate stays (constant)
    or falls, in a line or half a cosine wave, and reaches `min_ratio` at `total_steps`.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if scheduler == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    remaining = 1 - progress if scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return min_ratio + (1 - min_ratio) * remaining
