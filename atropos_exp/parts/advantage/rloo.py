"""RLOO (arXiv:2402.14740): reward minus the mean of the other rollouts of the group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from atropos_exp.parts.advantage.base import VerlAdvantage


@dataclass(frozen=True, kw_only=True)
class RLOO(VerlAdvantage):
    """verl's `compute_rloo_vectorized_outcome_advantage`."""

    verl_name: ClassVar[str] = "rloo_vectorized"
