"""The shipped policy losses through the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra.utils import get_class

from tests.helpers.trainer_cases import (
    CONF,
    full_weights,
    make_batch,
    plain_loss,
    plain_model,
    weights_after_step,
)

LOSSES = sorted(path.stem for path in (CONF / "loss").glob("*.yaml"))


def build(name: str, **changes: Any) -> Any:
    values = yaml.safe_load((CONF / "loss" / f"{name}.yaml").read_text())
    numbers = {key: float(values[key]) for key in ("clip_low", "clip_high") if key in values}
    sizes = {"scale_factor": 16} if "scale_factor" in values else {}
    target = values.pop("_target_")
    return get_class(target)(**(values | numbers | sizes | changes))


@pytest.mark.parametrize("name", ["advantage_weighted_sft", "ppo_clip"])
def test_on_policy_gradient_by_hand(start: Any, model_folder: Path, name: str) -> None:
    """-(weight * advantage * logprob), token mean. The clipped ratio is 1 on-policy, with the same gradient."""
    batch = make_batch(temperature=0.8)
    model = plain_model(model_folder)
    loss = plain_loss(model, batch)
    expected = weights_after_step(model, loss)
    trainer = start(loss=build(name))
    stats = trainer.update(batch)
    if name == "advantage_weighted_sft":
        assert stats.policy_loss == pytest.approx(loss.item(), abs=2e-6)
    assert stats.clip_fraction == 0
    for key, tensor in trainer.parameters():
        torch.testing.assert_close(tensor, expected[key], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_trains_the_same_in_any_micro_batches(start: Any, name: str) -> None:
    changes = {"num_mini_batches": 2, "learning_rate": 0.05}
    whole = start(loss=build(name, kl_coef=0.1), **changes)
    parts = start(loss=build(name, kl_coef=0.1), max_tokens_per_micro_batch=20, **changes)
    before = full_weights(whole)
    batch = make_batch()
    one, many = whole.update(batch), parts.update(batch)
    assert many.num_micro_batches > 2 * one.num_micro_batches
    for field in ("loss", "policy_loss", "clip_fraction", "reference_kl", "grad_norm"):
        assert getattr(one, field) == pytest.approx(getattr(many, field), rel=1e-4, abs=1e-6), field
    moved = full_weights(whole)
    assert any((moved[key] - before[key]).abs().max() > 1e-4 for key in moved)
    for key, tensor in parts.parameters():
        torch.testing.assert_close(tensor, moved[key], atol=1e-6, rtol=1e-4)
