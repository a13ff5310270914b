"""Dr. GRPO (arXiv:2503.20783): PPO's clipped surrogate, summed over tokens and divided by a constant length.

Dividing by each sequence's own length would favour long wrong answers.
"""

from __future__ import annotations

from dataclasses import dataclass

from atropos_exp.parts.loss.base import require
from atropos_exp.parts.loss.ppo_clip import DualClip


@dataclass(frozen=True, kw_only=True)
class DrGRPO(DualClip):
    """verl's policy loss "vanilla" with the aggregation "seq-mean-token-sum-norm"."""

    scale_factor: int

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.scale_factor > 0, "loss.scale_factor", self.scale_factor, "a positive number of tokens")

    def aggregation(self) -> tuple[str, int | None]:
        return "seq-mean-token-sum-norm", self.scale_factor
