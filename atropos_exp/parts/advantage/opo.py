"""OPO (Hao et al. 2025, arXiv:2505.23585): the baseline that minimises the variance of the gradient.

A longer rollout has a larger gradient, so its reward counts more in the group's baseline. With l_j trained tokens:

    A_i = r_i - sum_j l_j * r_j / sum_j l_j

Example: rewards 1, 0 of rollouts with 3 and 1 trained tokens have the baseline 0.75, so A = 0.25, -0.75.
"""

from typing import ClassVar

from atropos_exp.parts.advantage.base import ComparedRollouts, VerlAdvantage
from atropos_exp.types import Floats


class OPO(VerlAdvantage):
    """The advantages of verl's `compute_opo_outcome_advantage`."""

    verl_name: ClassVar[str] = "opo"

    def estimate(self, rows: ComparedRollouts) -> Floats:
        # verl takes the length as the sum of the mask's row and multiplies the result by the mask:
        # one column that holds the length stands for a whole row of ones
        lengths_N1 = rows.lengths_N[:, None]
        return (self.call_verl(rows, mask=lengths_N1) / lengths_N1)[:, 0].astype("float32")
