"""GSPO (Zheng et al. 2025, arXiv:2507.18071): PPO's clip on one ratio per sequence, the geometric mean over its tokens.

    s_i = exp(sum_t (logprob_it - old_logprob_it) / T_i)
    l_it = -min(s_i * A_it, clip(s_i, 1 - clip_low, 1 + clip_high) * A_it)

In the cost of token t, only that token's own logprob carries the gradient of s_i, which there is s_i itself. As a ratio
of whole sequences, s_i stays close to 1: its bounds are far narrower than PPO's.
An importance weight multiplies the cost of its own token; in TRL all tokens of a sequence share the mean of theirs.
"""

from typing import ClassVar

from atropos_exp.parts.loss.base import AveragedLoss, ClippedRatio


class GSPO(ClippedRatio, AveragedLoss):
    """verl's policy loss "gspo" (`compute_policy_loss_gspo`)."""

    verl_name: ClassVar[str] = "gspo"
