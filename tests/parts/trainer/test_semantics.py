"""From scored groups to new weights: masks with holes, token advantages, importance weights, zeroed rollouts.

Everything runs through the estimator, the packing, a shipped loss and the trainer, against `plain_grpo.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from atropos_exp.parts.loss.ppo_clip import PPOClip
from atropos_exp.types import Rollout, RolloutGroup
from tests.helpers.plain_grpo import logprobs_of, make_group, make_rollout, with_scalars
from tests.helpers.scored_groups import (
    CLIPPING,
    assert_differs,
    check_update,
    clipped_loss,
    loss_and_norm,
    multi_turn,
    packed,
)
from tests.helpers.trainer_cases import full_weights, plain_model


def test_tool_and_user_tokens_have_no_loss(start: Any, model_folder: Path) -> None:
    groups = multi_turn()
    stats = check_update(start(loss=clipped_loss()), groups, model_folder)
    assert_differs(stats, *loss_and_norm(model_folder, groups, train_tools=True))


def test_the_logits_that_predict_tool_tokens_have_a_gradient_of_exactly_zero(start: Any, model_folder: Path) -> None:
    """Read off the last hidden states of the packed pass: they act through the logits of their position only."""
    trainer, groups = start(loss=clipped_loss()), multi_turn()
    seen: list[Tensor] = []

    def watch(_module: Any, _input: Any, output: Tensor) -> None:
        output.register_hook(seen.append)

    trainer._backend.module.model.norm.register_forward_hook(watch)
    batch = packed(groups)
    trainer.update(batch)
    (gradient_1SH,) = seen
    predicts_trained = torch.cat([batch.trained_S[1:], torch.tensor([False])])
    sizes_S = gradient_1SH[0].abs().amax(-1)
    assert (sizes_S[~predicts_trained] == 0.0).all() and int((~predicts_trained).sum()) > 25
    assert (sizes_S[predicts_trained] > 1e-4).all()

    # the same in plain code, by autograd down to the logits themselves
    model, start_at = plain_model(model_folder), 0
    for rollout, scalar in with_scalars(groups):
        ids = torch.from_numpy(rollout.token_ids.astype(np.int64))
        hidden = model.model(input_ids=ids[None]).last_hidden_state
        logits = model.lm_head(hidden)
        picked = torch.log_softmax(logits[0, :-1], -1)[torch.arange(len(ids) - 1), ids[1:]]
        gaps = picked.detach().double() - torch.from_numpy(rollout.logprobs[1:]).double()  # type: ignore[index]
        weights = gaps.exp().clamp(max=2.0) * torch.from_numpy(rollout.trained[1:])
        objective = -(weights * scalar * picked).sum() / batch.num_trained_tokens
        to_logits, to_hidden = torch.autograd.grad(objective, (logits, hidden))
        masked = ~np.append(rollout.trained[1:], False)
        assert (to_logits[0, masked] == 0.0).all() and (to_logits[0, ~masked].abs().amax(-1) > 0).all()
        ours = gradient_1SH[0, start_at : start_at + len(ids)]
        torch.testing.assert_close(ours, to_hidden[0].float(), atol=1e-6, rtol=1e-4)
        start_at += len(ids)


def test_what_an_environment_says_of_tool_tokens_is_never_read(start: Any) -> None:
    clean = multi_turn()
    rng = np.random.default_rng(0)

    def dirty(rollout: Rollout, *, advantages: bool) -> Rollout:
        values = rng.normal(size=len(rollout.token_ids)).astype(np.float32)
        noise = np.where(rollout.trained, np.float32(0.0), values)
        changes = {"logprobs": rollout.logprobs + noise}  # type: ignore[operator]
        if advantages:
            changes["advantages"] = np.where(rollout.trained, np.float32(0.5), 9 * values)
        return dataclasses.replace(rollout, **changes)

    def apply(groups: Sequence[RolloutGroup], change: Any) -> list[RolloutGroup]:
        return [make_group(*(change(rollout) for rollout in group.rollouts)) for group in groups]

    half = apply(clean, lambda r: dataclasses.replace(r, advantages=np.full(len(r.token_ids), 0.5, np.float32)))
    for one, other in [
        (clean, apply(clean, lambda r: dirty(r, advantages=False))),
        (half, apply(clean, lambda r: dirty(r, advantages=True))),
    ]:
        first, second = start(loss=clipped_loss()), start(loss=clipped_loss())
        assert first.update(packed(one)) == second.update(packed(other))
        weights = full_weights(second)
        assert all(torch.equal(tensor, weights[name]) for name, tensor in first.parameters())
    # and straight into a batch, past the packing
    batch = packed(clean)
    noise_S = torch.where(batch.trained_S, 0.0, torch.randn(len(batch.trained_S)))
    spoiled = dataclasses.replace(
        batch,
        advantages_S=batch.advantages_S + noise_S,
        behaviour_logprobs_S=batch.behaviour_logprobs_S + noise_S,
        reference_logprobs_S=batch.reference_logprobs_S + noise_S,
    )
    assert start(loss=clipped_loss()).update(batch) == start(loss=clipped_loss()).update(spoiled)


def test_token_advantages_reach_the_loss_verbatim(start: Any, model_folder: Path) -> None:
    """One group brings its own, unnormalised and different on every token; the other is compared as always."""
    plain = multi_turn()
    rng = np.random.default_rng(5)
    first = [
        dataclasses.replace(rollout, advantages=rng.normal(0.7, 1.5, len(rollout.token_ids)).astype(np.float32))
        for rollout in plain[0].rollouts
    ]
    groups = [make_group(*first), plain[1]]
    stats = check_update(start(loss=clipped_loss()), groups, model_folder)
    by_rewards = loss_and_norm(model_folder, groups, scalar_only=True)
    assert_differs(stats, *by_rewards)
    assert by_rewards == pytest.approx(loss_and_norm(model_folder, plain))


def test_importance_weights_are_those_of_an_independent_computation(start: Any, model_folder: Path) -> None:
    groups, cap, temperature = multi_turn(behaviour=1.2), 1.5, 0.8
    stats = check_update(
        start(loss=clipped_loss(), importance_cap=cap), groups, model_folder, cap=cap, temperature=temperature
    )
    model, gaps = plain_model(model_folder), []
    for rollout, _ in with_scalars(groups):
        with torch.no_grad():
            now = logprobs_of(model, rollout, temperature).numpy()
        gaps += (now - rollout.logprobs[1:])[rollout.trained[1:]].tolist()  # type: ignore[index]
    truncated = float(np.mean(np.exp(gaps) > cap))
    assert 0.1 < truncated < 0.9 and np.ptp(np.minimum(np.exp(gaps), cap)) > 0.5
    assert stats.importance_truncated_fraction == pytest.approx(truncated)
    assert stats.logprob_gap_mean == pytest.approx(np.abs(gaps).mean(), rel=1e-5)
    assert abs(loss_and_norm(model_folder, groups, cap=100.0, temperature=temperature)[0] - stats.loss) > 0.01
    on_policy = [make_group(*(dataclasses.replace(r, logprobs=None) for r in group.rollouts)) for group in groups]
    assert abs(loss_and_norm(model_folder, on_policy, temperature=temperature)[0] - stats.loss) > 0.01


def test_importance_weights_of_later_mini_batches_use_the_policy_before_the_update(
    start: Any, model_folder: Path
) -> None:
    seen: list[dict[str, Any]] = []

    class Watched(PPOClip):
        def __call__(self, **given: Any) -> tuple[Tensor, dict[str, float]]:
            seen.append(given)
            return super().__call__(**given)

    groups = multi_turn(behaviour=1.2)
    start(loss=Watched(**CLIPPING), num_mini_batches=2, learning_rate=0.5).update(packed(groups))
    assert [len(call["mask_NR"]) for call in seen] == [3, 2]
    model, rollouts = plain_model(model_folder), [rollout for group in groups for rollout in group.rollouts]
    weights = [row_R for call in seen for row_R in call["importance_NR"]]
    now = [row_R.detach() for call in seen for row_R in call["logprobs_NR"]]
    moved = []
    for rollout, weights_R, now_R in zip(rollouts, weights, now, strict=True):
        with torch.no_grad():
            before = logprobs_of(model, rollout, 1.0)[rollout.trained[1:]]
        behaviour = torch.from_numpy(rollout.logprobs[rollout.trained])  # type: ignore[index]
        expected = (before - behaviour).exp().clamp(max=2.0).float()
        torch.testing.assert_close(weights_R[: len(expected)], expected, atol=1e-5, rtol=1e-4)
        moved.append(float((now_R[: len(before)] - before).abs().max()))
    assert max(moved[:3]) < 1e-4 and min(moved[3:]) > 0.01  # the first mini-batch has changed the policy meanwhile


def test_a_zeroed_rollout_counts_in_the_baseline_and_teaches_nothing(start: Any, model_folder: Path) -> None:
    first, second, cut = (make_rollout("ppaaaa", reward, seed=at) for at, reward in enumerate((1.0, 0.5, 0.0)))
    zeroed = dataclasses.replace(cut, zero_advantage=True)
    groups = [make_group(first, second, zeroed)]
    batch = packed(groups)
    # mean 0.5, deviation 0.5: 1, 0 and -1; the last one is taken away afterwards
    expected = torch.tensor([0.0, 0, 1, 1, 1, 1] + [0.0] * 12)
    torch.testing.assert_close(batch.advantages_S, expected, atol=1e-5, rtol=0)
    assert batch.num_trained_tokens == 12
    stats = check_update(start(loss=clipped_loss()), groups, model_folder)
    counted, _ = loss_and_norm(model_folder, [make_group(first, second, cut)])
    without, _ = loss_and_norm(model_folder, [make_group(first, second)])
    assert min(abs(counted - stats.loss), abs(without - stats.loss)) > 0.05


def test_mixed_temperatures_are_those_of_each_sequence(
    start: Any, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from atropos_exp.parts.trainer import logprob_head

    rollouts = [
        make_rollout("ppaaatttaa" + "a" * at, reward, seed=at, temperature=temperature)
        for at, (reward, temperature) in enumerate(zip((1, 0, 0.5, 0), (0.5, None, 1.0, 1.7), strict=True))
    ]
    groups = [make_group(*rollouts), *multi_turn()]
    trainer = start(loss=clipped_loss())
    stats = check_update(trainer, groups, model_folder, temperature=0.8)
    uniform = [make_group(*(dataclasses.replace(r, temperature=None) for r in group.rollouts)) for group in groups]
    assert abs(loss_and_norm(model_folder, uniform, temperature=0.8)[0] - stats.loss) > 0.01

    weights = full_weights(trainer)
    split = start(loss=clipped_loss(), max_tokens_per_micro_batch=30)
    assert split.update(packed(groups, 0.8)).loss == pytest.approx(stats.loss, abs=1e-6)
    for name, tensor in split.parameters():
        torch.testing.assert_close(tensor, weights[name], atol=1e-6, rtol=1e-5)
    many = [*groups] * 4
    whole = start(loss=clipped_loss()).update(packed(many, 0.8))
    monkeypatch.setattr(logprob_head, "MAX_CHUNK_LOGITS", 64 * 48)  # 64 tokens a chunk
    chunked = start(loss=clipped_loss()).update(packed(many, 0.8))
    assert whole.num_trained_tokens > 3 * 64
    assert (chunked.loss, chunked.entropy) == pytest.approx((whole.loss, whole.entropy), abs=1e-6)
    assert chunked.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)


def test_one_temperature_named_by_every_rollout_is_that_of_the_run(start: Any) -> None:
    """Bit for bit, and without a tensor of temperatures."""
    named, unnamed = multi_turn(temperature=0.7), multi_turn()
    first, second = start(loss=clipped_loss()), start(loss=clipped_loss())
    assert first.update(packed(named, 1.0)) == second.update(packed(unnamed, 0.7))
