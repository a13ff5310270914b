"""GRPO for pass@k (Tang et al. 2025, arXiv:2503.19595): only the best of a group counts, as when one of k may answer.

The best rollout of a group gets its lead over the second best, every other one 0:

    A_best = (r_best - r_second) / (std(r) + epsilon),    std(r) = sqrt(sum_j (r_j - mean(r))^2 / (G - 1))

With `norm_by_std=false` the lead is not divided. If two rollouts share the highest reward, nobody gets an advantage.
"""

from typing import Any, ClassVar

from atropos_exp.parts.advantage.base import Epsilon, VerlAdvantage


class GRPOPassK(VerlAdvantage):
    """The advantages of verl's `compute_grpo_passk_outcome_advantage`."""

    norm_by_std: bool
    epsilon: Epsilon

    verl_name: ClassVar[str] = "grpo_passk"

    def verl_settings(self) -> dict[str, Any]:
        config = {"norm_adv_by_std_in_grpo": self.norm_by_std}  # where verl looks for it here
        return {"epsilon": self.epsilon, "config": config}
