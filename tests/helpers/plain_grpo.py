"""GRPO written out rollout by rollout and token by token: what the packed trainer must reproduce.

Starts from the rollouts, not from a batch, and shares no code with the package but the nouns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atropos_exp.types import Finish, Rollout, RolloutGroup

VOCAB = 48
CLIP_LOW, CLIP_HIGH, DUAL_CLIP = 0.2, 0.3, 3.0


def make_rollout(turns: str, reward: float, *, seed: int, behaviour: float | None = 0.8, **more: Any) -> Rollout:
    """`turns` has a letter per token: "a" where the policy sampled, anything else where it did not.

    `behaviour`: spread of the sampler's logprobs around those of a uniform guess; None: unknown.
    """
    rng = np.random.default_rng(seed)
    trained = np.array([letter == "a" for letter in turns])
    logprobs = None
    if behaviour is not None:
        logprobs = np.where(trained, -math.log(VOCAB) + behaviour * rng.normal(size=len(turns)), 0.0)
    return Rollout(
        token_ids=rng.integers(0, VOCAB, len(turns)).astype(np.int32),
        trained=trained,
        logprobs=None if logprobs is None else logprobs.astype(np.float32),
        reward=reward,
        finish=Finish.STOP,
        policy_version=0,
        **more,
    )


def make_group(*rollouts: Rollout) -> RolloutGroup:
    return RolloutGroup(prompt_id="p", source="atropos", rollouts=rollouts)


def scalar_advantages(group: RolloutGroup) -> list[float]:
    """(reward - mean) / (unbiased standard deviation + 1e-6) over the rollouts that are judged."""
    rewards = [rollout.reward for rollout in group.rollouts if not rollout.supervised]
    mean = sum(rewards) / max(1, len(rewards))
    deviation = math.sqrt(sum((r - mean) ** 2 for r in rewards) / max(1, len(rewards) - 1))
    return [(rollout.reward - mean) / (deviation + 1e-6) if deviation else 0.0 for rollout in group.rollouts]


def logits_of(model: Any, rollout: Rollout, temperature: float) -> Tensor:
    """[T - 1, V] float64; row t - 1 predicts token t."""
    ids = torch.from_numpy(rollout.token_ids.astype(np.int64))
    logits: Tensor = model(input_ids=ids[None]).logits[0, :-1].double() / temperature
    return logits


def logprobs_of(model: Any, rollout: Rollout, temperature: float) -> Tensor:
    """[T - 1] float64, of tokens 1.. under the temperature of the rollout, or `temperature`."""
    ids = torch.from_numpy(rollout.token_ids.astype(np.int64))
    logits = logits_of(model, rollout, rollout.temperature or temperature)
    return torch.log_softmax(logits, -1)[torch.arange(len(ids) - 1), ids[1:]]


def token_loss(logprob: Tensor, old: float, advantage: float, weight: float) -> Tensor:
    """The clipped surrogate with the dual clip, by branches."""
    ratio = (logprob - old).exp()
    objective = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantage)
    if advantage < 0:
        objective = torch.clamp(objective, min=DUAL_CLIP * advantage)
    return -weight * objective


def total_loss(
    model: Any,
    judged: Sequence[tuple[Rollout, float]],
    *,
    temperature: float = 1.0,
    cap: float = 2.0,
    old: Any = None,
    reference: Any = None,
    kl_coef: float = 0.0,
    train_tools: bool = False,
    scalar_only: bool = False,
) -> Tensor:
    """Sum over trained tokens over their number. `judged`: rollouts with the scalar advantage of their group.

    `old` and `reference` are models; without `old` the policy is its own. `train_tools` and `scalar_only` make the
    two mistakes that the trainer must not make.
    """
    total, num_tokens = torch.zeros((), dtype=torch.float64), 0
    for rollout, scalar in judged:
        length = len(rollout.token_ids)
        trained = [t for t in range(1, length) if rollout.trained[t] or (train_tools and t >= 2)]
        num_tokens += len(trained)
        if rollout.supervised:
            labels = torch.full((length - 1,), -100)
            for t in trained:
                labels[t - 1] = int(rollout.token_ids[t])
            total = total + torch.nn.functional.cross_entropy(logits_of(model, rollout, 1.0), labels, reduction="sum")
            continue
        logprobs = logprobs_of(model, rollout, temperature)
        with torch.no_grad():
            before = logprobs.detach() if old is None else logprobs_of(old, rollout, temperature)
            anchor = None if reference is None else logprobs_of(reference, rollout, temperature)
        for t in trained:
            own = rollout.advantages is not None and not scalar_only
            advantage = float(rollout.advantages[t]) if own else scalar  # type: ignore[index]
            advantage = 0.0 if rollout.zero_advantage else advantage
            weight = 1.0
            if rollout.logprobs is not None:
                weight = min(math.exp(float(before[t - 1]) - float(rollout.logprobs[t])), cap)
            total = total + token_loss(logprobs[t - 1], float(before[t - 1]), advantage, weight)
            if kl_coef:
                given = rollout.reference_logprobs
                fixed = float(given[t]) if given is not None else float(anchor[t - 1])  # type: ignore[index]
                difference = fixed - logprobs[t - 1]
                divergence = difference.exp() - difference - 1
                assert divergence < 10, "verl cuts k3 off at 10: choose policies that are closer"
                total = total + kl_coef * divergence
    return total / num_tokens


def with_scalars(groups: Sequence[RolloutGroup]) -> list[tuple[Rollout, float]]:
    """Every rollout with the advantage that its group gives it, in the order of the batch."""
    return [pair for group in groups for pair in zip(group.rollouts, scalar_advantages(group), strict=True)]


def gradient_norm(model: Any) -> float:
    return math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in model.parameters()))
