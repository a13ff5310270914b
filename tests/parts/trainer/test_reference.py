"""Reference logprobs: used where they came with the rollouts, computed where they did not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atropos_exp.types import Rollout, RolloutGroup
from tests.helpers.plain_grpo import logprobs_of, make_group, make_rollout, total_loss, with_scalars
from tests.helpers.scored_groups import clipped_loss, multi_turn, packed
from tests.helpers.trainer_cases import Lora, Model, full_weights, plain_model

KL = 0.4


def given(rollout: Rollout, values_T: Any) -> Rollout:
    return dataclasses.replace(rollout, reference_logprobs=np.where(rollout.trained, values_T, 0.0).astype(np.float32))


def by_plain_code(model: Any, rollout: Rollout, temperature: float = 1.0) -> Any:
    """[T] of `model`, 0 for the first token."""
    with torch.no_grad():
        return np.concatenate([[0.0], logprobs_of(model, rollout, temperature).numpy()])


def with_reference(folder: Path, which: Any, temperature: float = 1.0) -> list[RolloutGroup]:
    """Rollout number n of the batch is given logprobs of a policy near the first one where `which(n)`."""
    rng, numbers, model, groups = np.random.default_rng(1), iter(range(100)), plain_model(folder), multi_turn()

    def change(rollout: Rollout) -> Rollout:
        values_T = by_plain_code(model, rollout, temperature) + 0.5 * rng.normal(size=len(rollout.token_ids))
        return given(rollout, values_T) if which(next(numbers)) else rollout

    return [make_group(*(change(rollout) for rollout in group.rollouts)) for group in groups]


def count_passes(trainer: Any) -> list[int]:
    """One entry per forward pass of the reference model from now on."""
    passes: list[int] = []
    trainer._reference.module.register_forward_hook(lambda *_: passes.append(1))
    return passes


@pytest.mark.parametrize(("supplied", "num_passes"), [("all", 0), ("some", 1), ("none", 1)])
def test_the_kl_term_by_hand(start: Any, model_folder: Path, supplied: str, num_passes: int) -> None:
    which = {"all": lambda n: True, "some": lambda n: n in (0, 3), "none": lambda n: False}[supplied]
    groups = with_reference(model_folder, which, 0.9)
    reference = plain_model(model_folder)
    trainer = start(loss=clipped_loss(kl_coef=KL), learning_rate=0.005)
    trainer.update(packed(groups, 0.9))  # away from the reference
    model = plain_model(model_folder)
    model.load_state_dict(full_weights(trainer), strict=False)
    judged = with_scalars(groups)
    loss = total_loss(model, judged, temperature=0.9, reference=reference, kl_coef=KL)
    loss.backward()
    norm = sum(float((p.grad.double() ** 2).sum()) for p in model.parameters()) ** 0.5
    passes = count_passes(trainer)
    stats = trainer.update(packed(groups, 0.9))
    assert len(passes) == num_passes
    assert stats.loss == pytest.approx(loss.item(), abs=1e-5)
    assert stats.grad_norm == pytest.approx(norm, rel=1e-4)
    without = total_loss(model, judged, temperature=0.9).item()
    assert stats.reference_kl == pytest.approx((loss.item() - without) / KL, abs=1e-5)
    assert stats.reference_kl > 0.01


def test_what_the_reference_model_would_say_changes_nothing(start: Any, model_folder: Path) -> None:
    """Supplied by plain code from the first weights, or computed by the trainer: one and the same update."""
    reference = plain_model(model_folder)

    computed = multi_turn()
    brought = [make_group(*(given(r, by_plain_code(reference, r)) for r in group.rollouts)) for group in computed]
    first, second = (start(loss=clipped_loss(kl_coef=KL), learning_rate=0.005) for _ in range(2))
    for _ in range(2):
        one, other = first.update(packed(computed)), second.update(packed(brought))
        for name in ("loss", "reference_kl", "grad_norm"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-4, abs=1e-6), name
    assert one.reference_kl > 0.001


def test_with_lora_the_bare_model_is_the_reference_where_none_came(start: Any, model_folder: Path) -> None:
    groups = with_reference(model_folder, lambda n: n == 1)
    trainer = start(loss=clipped_loss(kl_coef=KL), model=Model(lora=Lora(rank=4)), learning_rate=0.5)
    trainer.update(packed(groups))
    model = plain_model(model_folder)
    model.load_state_dict(full_weights(trainer), strict=False)
    loss = total_loss(model, with_scalars(groups), reference=plain_model(model_folder), kl_coef=KL)
    assert trainer.update(packed(groups)).loss == pytest.approx(loss.item(), abs=2e-5)


def test_an_example_needs_no_reference(start: Any, model_folder: Path) -> None:
    groups = with_reference(model_folder, lambda n: True)
    example = make_group(make_rollout("ppaaa", 0.0, seed=3, supervised=True))
    trainer = start(loss=clipped_loss(kl_coef=KL))
    passes = count_passes(trainer)
    trainer.update(packed([*groups, example]))
    assert passes == []


def test_without_a_kl_term_they_are_not_used(start: Any, model_folder: Path) -> None:
    first, second = start(loss=clipped_loss()), start(loss=clipped_loss())
    assert first._reference is None
    brought = with_reference(model_folder, lambda n: True)
    assert first.update(packed(multi_turn())) == second.update(packed(brought))
