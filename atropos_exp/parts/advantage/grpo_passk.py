"""GRPO for pass@k (arXiv:2503.19595): only the best rollout of a group is rewarded, by its lead over the second."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from atropos_exp.parts.advantage.base import ComparedRollouts, VerlAdvantage
from atropos_exp.parts.advantage.grpo import check_epsilon
from atropos_exp.types import Floats


@dataclass(frozen=True, kw_only=True)
class GRPOPassK(VerlAdvantage):
    """verl's `compute_grpo_passk_outcome_advantage`: (best - second) / (std + epsilon) for the best, else zero."""

    norm_by_std: bool
    epsilon: float

    verl_name: ClassVar[str] = "grpo_passk"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_epsilon(self.epsilon)

    def estimate(self, rows: ComparedRollouts) -> Floats:
        mask = np.ones((len(rows.rewards_N), 1), dtype=bool)
        config = {"norm_adv_by_std_in_grpo": self.norm_by_std}  # where verl looks for it here
        return self.call_verl(rows, mask=mask, epsilon=self.epsilon, config=config)[:, 0]
