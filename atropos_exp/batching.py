"""Scored groups and their advantages, packed into one batch."""

from collections.abc import Sequence

import numpy as np

from atropos_exp.types import Floats, Rollout, RolloutGroup, TrainBatch


def token_advantages(rollout: Rollout, advantage: float) -> Floats:
    """Return [T] the advantage of each token of a rollout.

    The scalar `advantage` is spread over the trained tokens; the environment's own advantages replace it. All are 1 in
    a supervised rollout, and 0 where `zero_advantage` is set.
    """
    values = rollout.advantages if rollout.advantages is not None else np.float32(advantage)
    if rollout.supervised:
        values = np.float32(1.0)
    if rollout.zero_advantage:
        values = np.float32(0.0)
    return np.where(rollout.trained, values, np.float32(0.0)).astype(np.float32)


def pack(
    groups: Sequence[RolloutGroup], advantages: Sequence[Floats], *, temperature: float, version: int
) -> TrainBatch | None:
    """Pack all sequences end to end, for one update; None if no sequence has a signal. `temperature` is the run's, and
    `version` that of the weights which the update trains.

    A sequence whose advantages are all zero has no policy gradient. It stays in the batch all the same, because the
    loss denominators count its tokens (and a KL term would train on it); only a batch without any signal is dropped.

    A supervised sequence has temperature 1 and no behaviour or reference logprobs, whatever its rollout says: nothing
    is divided by how it was sampled.
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
    behaviour = [None if rollout.supervised else rollout.logprobs for rollout in rollouts]
    reference = [None if rollout.supervised else rollout.reference_logprobs for rollout in rollouts]
    temperatures = [
        1.0 if rollout.supervised else rollout.temperature or temperature  # a rollout's is never 0
        for rollout in rollouts
    ]
    return TrainBatch(
        token_ids_S=torch.from_numpy(np.concatenate([rollout.token_ids for rollout in rollouts]).astype(np.int64)),
        lengths_N=torch.tensor([len(rollout.token_ids) for rollout in rollouts]),
        trained_S=torch.from_numpy(trained_S),
        advantages_S=torch.from_numpy(advantages_S),
        behaviour_logprobs_S=torch.from_numpy(_lay_out(rollouts, behaviour)),
        has_behaviour_N=torch.tensor([values is not None for values in behaviour]),
        fresh_N=torch.tensor(
            [
                values is not None and rollout.by_engine and rollout.policy_version == version
                for rollout, values in zip(rollouts, behaviour, strict=True)
            ]
        ),
        reference_logprobs_S=torch.from_numpy(_lay_out(rollouts, reference)),
        has_reference_N=torch.tensor([values is not None for values in reference]),
        supervised_N=torch.tensor([rollout.supervised for rollout in rollouts]),
        temperature_N=torch.tensor(temperatures, dtype=torch.float32),
        num_trained_tokens=int(trained_S.sum()),
    )


def _lay_out(rollouts: Sequence[Rollout], per_rollout: Sequence[Floats | None]) -> Floats:
    """[S] float32, 0 where a token is not trained or its rollout has no values."""
    zero = np.float32(0.0)
    pairs = zip(rollouts, per_rollout, strict=True)
    parts = [np.where(rollout.trained, zero if values is None else values, zero) for rollout, values in pairs]
    return np.concatenate(parts).astype(np.float32)
