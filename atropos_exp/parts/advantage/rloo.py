"""RLOO (Ahmadian et al. 2024, arXiv:2402.14740): REINFORCE with a leave-one-out baseline.

The baseline of rollout i is the mean reward of the other rollouts of its group, which does not depend on rollout i:

    A_i = r_i - sum_{j != i} r_j / (G - 1) = G / (G - 1) * (r_i - mean(r))

Example: rewards 1, 0, 0, 0 give A = 1, -1/3, -1/3, -1/3.
"""

from typing import ClassVar

from atropos_exp.parts.advantage.base import VerlAdvantage


class RLOO(VerlAdvantage):
    """The advantages of verl's `compute_rloo_vectorized_outcome_advantage`."""

    verl_name: ClassVar[str] = "rloo_vectorized"
