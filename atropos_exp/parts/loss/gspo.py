"""GSPO (arXiv:2507.18071): the clipped surrogate on one ratio per sequence, the geometric mean over its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from atropos_exp.parts.loss.base import AveragedLoss, ClippedRatio


@dataclass(frozen=True, kw_only=True)
class GSPO(ClippedRatio, AveragedLoss):
    """The clipped surrogate of PPO with the sequence ratio: verl's policy loss "gspo"."""

    verl_name: ClassVar[str] = "gspo"
