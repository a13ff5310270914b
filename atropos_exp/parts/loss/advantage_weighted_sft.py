"""Advantage-weighted SFT: cross-entropy on the sampled tokens, each weighted by its advantage.

    l_it = -A_it * logprob_it

This is REINFORCE (Williams 1992), which GPG (Chu et al. 2025, arXiv:2504.02546) finds to suffice. The old policy
plays no part, so make one optimizer step per batch, or accept that later ones are off-policy.
"""

from typing import ClassVar

from atropos_exp.parts.loss.base import AveragedLoss


class AdvantageWeightedSFT(AveragedLoss):
    """verl's policy loss "gpg" (`compute_policy_loss_gpg`)."""

    verl_name: ClassVar[str] = "gpg"
