"""Supervised rollouts: torch's cross-entropy, in the same batch as groups that are compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from atropos_exp.types import RolloutGroup
from tests.helpers.plain_grpo import gradient_norm, logits_of, make_group, make_rollout, total_loss, with_scalars
from tests.helpers.scored_groups import (
    assert_differs,
    check_update,
    clipped_loss,
    loss_and_norm,
    multi_turn,
    packed,
)
from tests.helpers.trainer_cases import full_weights, plain_model


def mixed() -> list[RolloutGroup]:
    """A compared group, a wholly supervised one, and one with a supervised rollout among compared ones.

    The supervised rollouts carry what must not matter: rewards, a sampler's logprobs, a temperature.
    """
    first, second = multi_turn()
    examples = [
        make_rollout(turns, reward, seed=20 + at, behaviour=spread, supervised=True, temperature=temperature)
        for at, (turns, reward, spread, temperature) in enumerate(
            [("ppppaaa", 0.0, None, None), ("paattaaa", 1.0, 2.0, 0.3), ("ppa", 1.0, None, None)]
        )
    ]
    demonstration = make_rollout("ppaaaaaaaa", 77.0, seed=30, supervised=True)
    return [first, make_group(*examples), make_group(second.rollouts[0], demonstration, second.rollouts[1])]


def without_flag(groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    return [make_group(*(dataclasses.replace(r, supervised=False) for r in group.rollouts)) for group in groups]


def test_only_examples(start: Any, model_folder: Path) -> None:
    """The whole batch is cross-entropy, at temperature 1 whatever the run's is."""
    group = mixed()[1]
    model = plain_model(model_folder)
    logits = torch.cat([logits_of(model, rollout, 1.0) for rollout in group.rollouts])
    labels = torch.cat(
        [
            torch.where(torch.from_numpy(rollout.trained), torch.from_numpy(rollout.token_ids).long(), -100)[1:]
            for rollout in group.rollouts
        ]
    )
    expected = torch.nn.functional.cross_entropy(logits, labels)  # mean over what is not -100
    expected.backward()
    stats = start(loss=clipped_loss()).update(packed([group], temperature=0.5))
    assert stats.loss == stats.supervised_loss == pytest.approx(expected.item(), abs=2e-6)
    assert stats.policy_loss == 0.0 and stats.clip_fraction == 0.0
    assert stats.grad_norm == pytest.approx(gradient_norm(model), rel=1e-5)
    assert stats.importance_truncated_fraction == 0.0 and stats.logprob_gap_max != stats.logprob_gap_max  # NaN


def test_examples_beside_compared_groups(start: Any, model_folder: Path) -> None:
    groups = mixed()
    trainer = start(loss=clipped_loss())
    stats = check_update(trainer, groups, model_folder, temperature=0.8)
    assert_differs(stats, *loss_and_norm(model_folder, without_flag(groups), temperature=0.8))
    examples = [pair for pair in with_scalars(groups) if pair[0].supervised]
    share = sum(rollout.num_trained for rollout, _ in examples) / stats.num_trained_tokens
    alone = total_loss(plain_model(model_folder), examples).item()
    assert stats.supervised_loss == pytest.approx(alone * share, abs=2e-6)
    assert stats.loss == pytest.approx(stats.policy_loss + stats.supervised_loss, abs=1e-6)

    weights = full_weights(trainer)
    split = start(loss=clipped_loss(), max_tokens_per_micro_batch=16)
    many = split.update(packed(groups, temperature=0.8))
    assert many.num_micro_batches >= 6
    for field in ("loss", "policy_loss", "supervised_loss", "grad_norm", "entropy", "importance_truncated_fraction"):
        assert getattr(many, field) == pytest.approx(getattr(stats, field), rel=1e-5, abs=1e-6), field
    for name, tensor in split.parameters():
        torch.testing.assert_close(tensor, weights[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("max_tokens", [1000, 16])
def test_examples_in_two_mini_batches(start: Any, model_folder: Path, max_tokens: int) -> None:
    """The second step's ratios are against the policy before the first; examples know no ratio."""
    groups = mixed()
    settings = {"learning_rate": 0.3, "num_mini_batches": 2}
    trainer = start(loss=clipped_loss(), max_tokens_per_micro_batch=max_tokens, **settings)
    stats = trainer.update(packed(groups))
    model, before = plain_model(model_folder), plain_model(model_folder)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.3, betas=(0.9, 0.999), eps=1.0)
    judged, losses, norms = with_scalars(groups), [], []
    for part in (judged[:5], judged[5:]):
        assert 0 < sum(rollout.supervised for rollout, _ in part) < len(part)
        optimizer.zero_grad()
        loss = total_loss(model, part, old=before)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        norms.append(gradient_norm(model))
    assert stats.loss == pytest.approx(sum(losses) / 2, abs=2e-5)
    assert stats.grad_norm == pytest.approx(sum(norms) / 2, rel=1e-4)
    assert stats.clip_fraction > 0  # so the ratios of the second step matter
    for name, tensor in model.named_parameters():
        torch.testing.assert_close(full_weights(trainer)[name], tensor.detach(), atol=1e-5, rtol=1e-4)


def test_an_example_pays_no_kl(start: Any, model_folder: Path) -> None:
    groups = mixed()
    reference = plain_model(model_folder)
    trainer = start(loss=clipped_loss(kl_coef=0.5), learning_rate=0.02)
    trainer.update(packed(groups))  # away from the reference
    model = plain_model(model_folder)
    model.load_state_dict(full_weights(trainer), strict=False)
    loss = total_loss(model, with_scalars(groups), reference=reference, kl_coef=0.5)
    stats = trainer.update(packed(groups))
    assert stats.loss == pytest.approx(loss.item(), abs=1e-5)
    assert stats.loss - stats.policy_loss - stats.supervised_loss == pytest.approx(0.5 * stats.reference_kl, abs=1e-5)
    assert stats.reference_kl > 0.01


def test_a_zeroed_example_teaches_nothing(start: Any) -> None:
    groups = mixed()
    zeroed = make_group(*(dataclasses.replace(r, zero_advantage=True) for r in groups[1].rollouts))
    trainer = start(loss=clipped_loss())
    stats = trainer.update(packed([groups[0], zeroed]))
    alone = start(loss=clipped_loss()).update(packed([groups[0]]))
    assert stats.supervised_loss == 0.0
    scale = alone.num_trained_tokens / stats.num_trained_tokens  # its tokens still count in the denominator
    assert stats.grad_norm == pytest.approx(alone.grad_norm * scale, rel=1e-5)
