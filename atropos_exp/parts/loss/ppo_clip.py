"""PPO's clipped surrogate (arXiv:1707.06347) with a dual clip for negative advantages (arXiv:1912.09729)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from atropos_exp.parts.loss.base import AveragedLoss, ClippedRatio, require


@dataclass(frozen=True, kw_only=True)
class DualClip(ClippedRatio):
    """-min(ratio * A, clipped ratio * A), and at most dual_clip * |A| where A < 0: verl's policy loss "vanilla"."""

    dual_clip: float

    verl_name: ClassVar[str] = "vanilla"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.dual_clip > 1, "loss.dual_clip", self.dual_clip, "a number > 1: the ratio's bound where A < 0")

    def clip_settings(self) -> dict[str, float]:
        return {**super().clip_settings(), "clip_ratio_c": self.dual_clip}


@dataclass(frozen=True, kw_only=True)
class PPOClip(DualClip, AveragedLoss):
    """The surrogate, averaged as configured."""
