"""GRPO (arXiv:2402.03300): reward minus the group's mean, over its standard deviation.

Without the division it is Dr. GRPO (arXiv:2503.20783).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from atropos_exp.errors import UserError
from atropos_exp.parts.advantage.base import ComparedRollouts, VerlAdvantage
from atropos_exp.types import Floats


@dataclass(frozen=True, kw_only=True)
class GRPO(VerlAdvantage):
    """verl's `compute_grpo_outcome_advantage`; the standard deviation is the unbiased one."""

    norm_by_std: bool
    epsilon: float

    verl_name: ClassVar[str] = "grpo"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_epsilon(self.epsilon)

    def estimate(self, rows: ComparedRollouts) -> Floats:
        mask = np.ones((len(rows.rewards_N), 1), dtype=bool)
        return self.call_verl(rows, mask=mask, epsilon=self.epsilon, norm_adv_by_std_in_grpo=self.norm_by_std)[:, 0]


def check_epsilon(epsilon: float) -> None:
    if not epsilon >= 0:
        raise UserError(f"advantage.epsilon is {epsilon}; expected a small number >= 0, such as 1e-6")
