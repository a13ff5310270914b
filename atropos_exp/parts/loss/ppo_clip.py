"""PPO's clipped cost (Schulman et al. 2017, arXiv:1707.06347) with a dual clip (Ye et al. 2019, arXiv:1912.09729).

    c_it = -min(rho_it * A_it, clip(rho_it, 1 - clip_low, 1 + clip_high) * A_it)
    l_it = c_it if A_it >= 0, else min(c_it, dual_clip * |A_it|)

A token that has moved beyond the interval in the direction of its advantage gets no gradient. The dual clip bounds the
cost where the advantage is negative, for there rho_it, and so the gradient, could grow without limit. In the first
optimizer step of a batch rho_it is 1, and the gradient is that of -A_it * logprob_it.
"""

from typing import Annotated, ClassVar

from pydantic import Field

from atropos_exp.parts.loss.base import AveragedLoss, ClippedRatio


class DualClip(ClippedRatio):
    """The cost l_it: verl's policy loss "vanilla" (`compute_policy_loss_vanilla`), its average left to subclasses."""

    dual_clip: Annotated[float, Field(gt=1, le=1e9, description="the bound of the ratio where A < 0")]

    verl_name: ClassVar[str] = "vanilla"

    def clip_settings(self) -> dict[str, float]:
        return {**super().clip_settings(), "clip_ratio_c": self.dual_clip}


class PPOClip(DualClip, AveragedLoss):
    """The cost l_it, averaged by `agg_mode`."""
