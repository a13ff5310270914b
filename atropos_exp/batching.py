"""From scored groups and their advantages to one packed batch. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from atropos_exp.types import Floats, Rollout, RolloutGroup, TrainBatch


def token_advantages(rollout: Rollout, advantage: float) -> Floats:
    """[T] the rollout's scalar spread over its trained tokens, or the environment's own values, verbatim."""
    values = rollout.advantages if rollout.advantages is not None else np.float32(advantage)
    if rollout.zero_advantage:
        values = np.float32(0.0)
    return np.where(rollout.trained, values, np.float32(0.0)).astype(np.float32)


def pack(groups: Sequence[RolloutGroup], advantages: Sequence[Floats], *, temperature: float) -> TrainBatch | None:
    """Lay the sequences that carry signal end to end; None if no sequence does.

    A sequence whose advantages are all zero has no policy gradient. It stays in the batch all the same, because the
    loss denominators count its tokens (and a KL term would train on it); only a batch without any signal is dropped.
    """
    import torch

    rollouts = [rollout for group in groups for rollout in group.rollouts]
    scalars = [float(value) for per_group in advantages for value in per_group]
    if len(scalars) != len(rollouts):
        raise ValueError(f"one advantage per rollout: got {len(scalars)} for {len(rollouts)} rollouts")
    if not rollouts:
        return None
    advantages_S = np.concatenate([token_advantages(r, a) for r, a in zip(rollouts, scalars, strict=True)])
    if not advantages_S.any():
        return None

    trained_S = np.concatenate([rollout.trained for rollout in rollouts])
    unknown = [np.zeros(len(rollout.token_ids), np.float32) for rollout in rollouts]
    behaviour = [r.logprobs if r.logprobs is not None else zeros for r, zeros in zip(rollouts, unknown, strict=True)]
    return TrainBatch(
        token_ids_S=torch.from_numpy(np.concatenate([rollout.token_ids for rollout in rollouts]).astype(np.int64)),
        lengths_N=torch.tensor([len(rollout.token_ids) for rollout in rollouts]),
        trained_S=torch.from_numpy(trained_S),
        advantages_S=torch.from_numpy(advantages_S),
        behaviour_logprobs_S=torch.from_numpy(np.where(trained_S, np.concatenate(behaviour), np.float32(0.0))),
        has_behaviour_N=torch.tensor([rollout.logprobs is not None for rollout in rollouts]),
        num_trained_tokens=int(trained_S.sum()),
        temperature=temperature,
    )
