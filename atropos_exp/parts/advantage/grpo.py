"""GRPO (Shao et al. 2024, arXiv:2402.03300): how much better a rollout is than its group, in standard deviations.

For the rewards r_1 ... r_G of one group, every trained token of rollout i gets

    A_i = (r_i - mean(r)) / (std(r) + epsilon),    std(r) = sqrt(sum_j (r_j - mean(r))^2 / (G - 1))

With `norm_by_std=false` it is Dr. GRPO (Liu et al. 2025, arXiv:2503.20783): A_i = r_i - mean(r). Dividing by a small
deviation would give prompts that are almost always or almost never solved a larger weight.

Example: rewards 1, 0, 0, 0 have mean 0.25 and std 0.5, so A = 1.5, -0.5, -0.5, -0.5; Dr. GRPO: 0.75 and -0.25.
"""

from typing import Any, ClassVar

from atropos_exp.parts.advantage.base import Epsilon, VerlAdvantage


class GRPO(VerlAdvantage):
    """The advantages of verl's `compute_grpo_outcome_advantage`."""

    norm_by_std: bool
    epsilon: Epsilon

    verl_name: ClassVar[str] = "grpo"

    def verl_settings(self) -> dict[str, Any]:
        return {"epsilon": self.epsilon, "norm_adv_by_std_in_grpo": self.norm_by_std}
