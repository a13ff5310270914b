"""Scored groups, and one update on them through estimator, packing, loss and trainer against `plain_grpo.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from atropos_exp.batching import pack
from atropos_exp.parts.advantage.grpo import GRPO
from atropos_exp.parts.loss.ppo_clip import PPOClip
from atropos_exp.types import RolloutGroup, TrainBatch
from tests.helpers.plain_grpo import (
    CLIP_HIGH,
    CLIP_LOW,
    DUAL_CLIP,
    gradient_norm,
    make_group,
    make_rollout,
    total_loss,
    with_scalars,
)
from tests.helpers.trainer_cases import plain_model, weights_after_step

# prompt, answer, tool output, answer, user, answer
MULTI_TURN = ("ppaaattttaauuaaa", "pppaaattaaatttta", "paattttttuaaaaaa")
CLIPPING: dict[str, Any] = {
    "agg_mode": "token_mean", "kl_coef": 0.0, "kl_estimator": "k3",
    "clip_low": CLIP_LOW, "clip_high": CLIP_HIGH, "dual_clip": DUAL_CLIP,
}  # fmt: skip


def packed(groups: Sequence[RolloutGroup], temperature: float = 1.0) -> TrainBatch:
    advantages = GRPO(norm_by_std=True, epsilon=1e-6, normalization="none", clip=None)(groups)
    batch = pack(groups, advantages, temperature=temperature, version=0)
    assert batch is not None
    return batch


def clipped_loss(**changes: Any) -> PPOClip:
    return PPOClip(**(CLIPPING | changes))


def multi_turn(**more: Any) -> list[RolloutGroup]:
    rewards = (1.0, 0.0, 0.25)
    first = [make_rollout(MULTI_TURN[at], rewards[at], seed=at, **more) for at in range(3)]
    second = [make_rollout("ppaaaa", 0.0, seed=8, **more), make_rollout("ppaattaa", 1.0, seed=9, **more)]
    return [make_group(*first), make_group(*second)]


def check_update(trainer: Any, groups: Sequence[RolloutGroup], folder: Path, **given: Any) -> Any:
    """One update: loss, gradient norm and every new weight against the plain computation; returns the statistics."""
    model = plain_model(folder)
    loss = total_loss(model, with_scalars(groups), **given)
    expected = weights_after_step(model, loss)
    stats = trainer.update(packed(groups, given.get("temperature", 1.0)))
    assert stats.loss == pytest.approx(loss.item(), abs=2e-6)
    assert stats.grad_norm == pytest.approx(gradient_norm(model), rel=1e-5)
    for name, tensor in trainer.parameters():
        torch.testing.assert_close(
            tensor, expected[name], atol=3e-6, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )
    return stats


def loss_and_norm(folder: Path, groups: Sequence[RolloutGroup], **given: Any) -> tuple[float, float]:
    model = plain_model(folder)
    loss = total_loss(model, with_scalars(groups), **given)
    loss.backward()
    return loss.item(), gradient_norm(model)


def assert_differs(stats: Any, loss: float, norm: float) -> None:
    """By thousands of times the tolerance of `check_update`."""
    assert abs(loss - stats.loss) > 0.01 and abs(norm - stats.grad_norm) > 0.02 * norm
