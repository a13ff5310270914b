"""Dr. GRPO (Liu et al. 2025, arXiv:2503.20783): PPO's clipped cost, summed and divided by a constant length.

    loss = sum_i (sum_t l_it / scale_factor) / N,    with l_it of `ppo_clip.py`

Dividing by each sequence's own length T_i instead, as GRPO does, makes long wrong answers cheaper than short ones.
`scale_factor` is `max_response_length` by default. The other half of Dr. GRPO is `advantage=dr_grpo`.
"""

from atropos_exp.config.settings import Count
from atropos_exp.parts.loss.ppo_clip import DualClip


class DrGRPO(DualClip):
    """verl's policy loss "vanilla" with the average "seq-mean-token-sum-norm"."""

    scale_factor: Count  # tokens

    def aggregation(self) -> tuple[str, int | None]:
        return "seq-mean-token-sum-norm", self.scale_factor
