"""CISPO (arXiv:2506.13585): clips the weight of a token, never its gradient, so every token keeps teaching."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from atropos_exp.parts.loss.base import AveragedLoss, ClippedRatio


@dataclass(frozen=True, kw_only=True)
class CISPO(ClippedRatio, AveragedLoss):
    """-(clipped ratio * advantage * logprob), the ratio without gradient: verl's policy loss "cispo"."""

    verl_name: ClassVar[str] = "cispo"
