"""Advantage-weighted SFT: cross-entropy on the sampled tokens, each weighted by its advantage (REINFORCE)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from atropos_exp.parts.loss.base import AveragedLoss


@dataclass(frozen=True, kw_only=True)
class AdvantageWeightedSFT(AveragedLoss):
    """-(advantage * logprob) over trained tokens: verl's policy loss "gpg". Ignores the old policy."""

    verl_name: ClassVar[str] = "gpg"
