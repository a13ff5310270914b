"""What all advantage estimators share: which rollouts are compared, verl's estimator by name, whitening, clipping.

N counts the compared rollouts of all groups of a batch. The files beside this one show one formula each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field

from atropos_exp.config.settings import Settings
from atropos_exp.errors import UserError
from atropos_exp.types import Floats, RolloutGroup

LARGEST_REWARD = 1e18  # its square still fits into float32
# Values that differ by less than this fraction of the largest are equal: some roundings of their type. Dividing such a
# residue by its own standard deviation would blow it up to a full-sized advantage.
EQUAL_WITHIN = {"float64": 1e-12, "float32": 1e-6}
# Rewards of a group that spread over less than this share of the largest are centred in float64 before verl sees them:
# as float32 their differences would lose digits. verl's estimators subtract a baseline of the group, so a shift changes
# nothing else; where no digit is at stake they get what they were given, and their numbers are verl's to the last bit.
CENTRED_BELOW = 1 / 16
Epsilon = Annotated[float, Field(ge=0, le=1e6, description="a small number, such as 1e-6")]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ComparedRollouts:
    """The rollouts of a batch whose rewards are compared, all groups end to end."""

    rewards_N: Floats
    index_N: NDArray[np.object_]  # number of the group, as objects: verl groups by hash
    lengths_N: NDArray[np.int64]  # trained tokens
    counts_N: NDArray[np.bool_]  # False: only part of the baseline (`zero_advantage`)


def _around_zero(clip: list[float] | None) -> list[float] | None:
    if clip is not None and not (len(clip) == 2 and clip[0] <= 0 <= clip[1] != clip[0]):
        raise UserError(
            f"got {clip}, expected null or [low, high] with low <= 0 <= high and low < high, so that a rollout without "
            "advantage keeps none"
        )
    return clip


class VerlAdvantage(Settings):
    """An estimator of verl's registry (`get_adv_estimator_fn`) as an `AdvantageEstimator`.

    The advantage is exactly zero for groups of one, groups whose rewards are all equal, groups that bring their own
    advantages, and supervised rollouts; none of them enters a statistic. A rollout with `zero_advantage` counts in
    its group's baseline and gets zero itself.

    Example: `GRPO(norm_by_std=True, epsilon=1e-6, normalization="none", clip=None)(groups)` gives one float32 [G] for
    each group.
    """

    normalization: Literal["none", "batch"]
    clip: Annotated[list[Annotated[float, Field(ge=-1e9, le=1e9)]] | None, AfterValidator(_around_zero)]

    verl_name: ClassVar[str]
    min_group_size: ClassVar[int] = 2

    def __call__(self, groups: Sequence[RolloutGroup]) -> list[Floats]:
        """One float32 [G] per group. Raises UserError for a reward beyond float32."""
        rewards = [_rewards(group) for group in groups]
        compared = [i for i, group in enumerate(groups) if not group.has_own_advantages and not is_constant(rewards[i])]
        advantages = [np.zeros(len(group.rollouts), dtype=np.float32) for group in groups]
        if not compared:
            return advantages
        rollouts = [rollout for i in compared for rollout in groups[i].compared]
        sizes = [len(rewards[i]) for i in compared]
        rows = ComparedRollouts(
            rewards_N=np.concatenate([_as_float32(rewards[i]) for i in compared]),
            index_N=np.repeat(np.arange(len(compared)), sizes).astype(object),
            lengths_N=np.array([rollout.num_trained for rollout in rollouts], dtype=np.int64),
            counts_N=np.array([not rollout.zero_advantage for rollout in rollouts]),
        )
        parts = np.split(self._finish(self.estimate(rows), rows), np.cumsum(sizes)[:-1])
        for i, part in zip(compared, parts, strict=True):
            advantages[i][[not rollout.supervised for rollout in groups[i].rollouts]] = part
        return advantages

    def estimate(self, rows: ComparedRollouts) -> Floats:
        """The advantages [N] of `rows`, before normalization and clipping."""
        return self.call_verl(rows, mask=np.ones((len(rows.rewards_N), 1), dtype=bool), **self.verl_settings())[:, 0]

    def verl_settings(self) -> dict[str, Any]:
        """The further arguments of verl's estimator."""
        return {}

    def call_verl(self, rows: ComparedRollouts, *, mask: NDArray[Any], **settings: Any) -> Floats:
        """Call verl's estimator with one reward per row; its result has the shape of `mask` [N, R]."""
        import torch
        from verl.trainer.ppo import core_algos

        advantages, _ = core_algos.get_adv_estimator_fn(self.verl_name)(
            token_level_rewards=torch.tensor(rows.rewards_N).unsqueeze(-1),
            response_mask=torch.from_numpy(mask),
            index=rows.index_N,
            **settings,
        )
        return np.asarray(advantages, dtype=np.float32)

    def _finish(self, advantages_N: Floats, rows: ComparedRollouts) -> Floats:
        if self.normalization == "batch":
            advantages_N = whiten(advantages_N, rows)
        if self.clip is not None:
            advantages_N = np.clip(advantages_N, self.clip[0], self.clip[1])
        assert np.isfinite(advantages_N).all(), f"{self.verl_name} gave a non-finite advantage"
        return np.where(rows.counts_N, advantages_N, np.float32(0.0))


def is_constant(values: NDArray[np.floating[Any]], *, among: NDArray[np.floating[Any]] | None = None) -> bool:
    """Whether there is nothing to compare: fewer than two `values`, or all of them equal up to rounding.

    Rounding is that of their type, measured against the largest of `among` (by default of the values themselves)."""
    largest = np.abs(values if among is None else among).max(initial=0.0)
    return len(values) < 2 or bool(np.ptp(values) <= EQUAL_WITHIN[values.dtype.name] * largest)


def whiten(advantages_N: Floats, rows: ComparedRollouts) -> Floats:
    """(A - mean) / sqrt(var + 1e-8) over the trained tokens of the rows that count: verl's `masked_whiten`.

    The result is zero if they do not differ: whitening a constant would only magnify its rounding.
    """
    import torch
    from verl.utils.torch_functional import masked_whiten

    if is_constant(advantages_N[rows.counts_N], among=advantages_N):
        return np.zeros_like(advantages_N)
    # a row counts once per trained token: the number of tokens as mask does what repeating the row would do
    weights_N = torch.from_numpy(rows.lengths_N * rows.counts_N)
    return np.asarray(masked_whiten(torch.tensor(advantages_N), weights_N), dtype=np.float32)


def _rewards(group: RolloutGroup) -> NDArray[np.float64]:
    rewards = np.array([rollout.reward for rollout in group.compared], dtype=np.float64)
    if not (np.abs(rewards) <= LARGEST_REWARD).all():
        raise UserError(
            f"a reward of prompt {group.prompt_id!r} is {np.abs(rewards).max():g} in size; "
            f"expected at most {LARGEST_REWARD:g}, scale the reward"
        )
    return rewards


def _as_float32(rewards_G: NDArray[np.float64]) -> Floats:
    """The rewards of one group for verl, shifted by their mean where they are close to one another."""
    if np.ptp(rewards_G) < CENTRED_BELOW * np.abs(rewards_G).max():
        # the first is subtracted before the mean is taken, so that its sum rounds no more than the differences do
        rewards_G = rewards_G - rewards_G[0]
        rewards_G = rewards_G - rewards_G.mean()
    return rewards_G.astype(np.float32)
