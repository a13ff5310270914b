"""CISPO (MiniMax 2025, arXiv:2506.13585): a token's weight is clipped, but never its gradient.

    l_it = -stop_gradient(clip(rho_it, 1 - clip_low, 1 + clip_high)) * A_it * logprob_it

PPO's clip, in contrast, gives a token whose ratio has left the interval no gradient at all.
"""

from typing import ClassVar

from atropos_exp.parts.loss.base import AveragedLoss, ClippedRatio


class CISPO(ClippedRatio, AveragedLoss):
    """verl's policy loss "cispo" (`compute_policy_loss_cispo`)."""

    verl_name: ClassVar[str] = "cispo"
