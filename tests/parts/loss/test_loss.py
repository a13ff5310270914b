"""Policy losses against formulas written out in float64 numpy, and their gradients against finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from atropos_exp.parts.loss.advantage_weighted_sft import AdvantageWeightedSFT
from atropos_exp.parts.loss.cispo import CISPO
from atropos_exp.parts.loss.dr_grpo import DrGRPO
from atropos_exp.parts.loss.gspo import GSPO
from atropos_exp.parts.loss.ppo_clip import PPOClip

Array = np.ndarray[Any, np.dtype[np.float64]]
Data = dict[str, Any]  # name -> [N, R], or None
Evaluate = Callable[..., tuple[float, Array, dict[str, float]]]
RandomData = Callable[..., Data]

NO_KL: dict[str, Any] = {"kl_coef": 0.0, "kl_estimator": "k3"}
SFT = AdvantageWeightedSFT(agg_mode="token_mean", **NO_KL)
PPO = PPOClip(agg_mode="token_mean", clip_low=0.2, clip_high=0.3, dual_clip=3.0, **NO_KL)
DR_GRPO = DrGRPO(scale_factor=10, clip_low=0.2, clip_high=0.3, dual_clip=3.0, **NO_KL)
GSPO_LOSS = GSPO(agg_mode="seq_mean_token_mean", clip_low=0.05, clip_high=0.06, **NO_KL)
CISPO_LOSS = CISPO(agg_mode="token_mean", clip_low=1.0, clip_high=0.3, **NO_KL)
ALL = {"sft": SFT, "ppo": PPO, "dr_grpo": DR_GRPO, "gspo": GSPO_LOSS, "cispo": CISPO_LOSS}


def aggregate(mode: str, losses: Array, mask: Array, scale: float = 1.0) -> float:
    """The averages, from their names."""
    sums, lengths = (losses * mask).sum(1), mask.sum(1)
    return {
        "token_mean": lambda: sums.sum() / lengths.sum(),
        "token_sum": lambda: sums.sum(),
        "seq_mean_token_sum": lambda: sums.mean(),
        "seq_mean_token_mean": lambda: (sums / lengths).mean(),
        "norm": lambda: sums.mean() / scale,
    }[mode]()


def ppo_tokens(data: Data, low: float = 0.2, high: float = 0.3, dual: float = 3.0) -> Array:
    """Token by token with branches, as the papers state it."""
    logprobs, old, advantages = data["logprobs"], data["old"], data["advantages"]
    out = np.zeros_like(logprobs)
    for i, j in np.ndindex(*logprobs.shape):
        ratio, advantage = np.exp(logprobs[i, j] - old[i, j]), advantages[i, j]
        objective = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
        out[i, j] = -(max(objective, dual * advantage) if advantage < 0 else objective)
    return out


def numeric_gradient(function: Callable[[Array], float], at: Array) -> Array:
    gradient = np.zeros_like(at)
    for index in np.ndindex(*at.shape):
        step = np.zeros_like(at)
        step[index] = 1e-6
        gradient[index] = (function(at + step) - function(at - step)) / 2e-6
    return gradient


def test_advantage_weighted_sft_is_minus_advantage_times_logprob_in_value_and_gradient(evaluate: Evaluate) -> None:
    data = {
        "logprobs": np.array([[-1.0, -2.0, -0.5], [-3.0, 0.0, 0.0]]),
        "old": np.zeros((2, 3)),
        "advantages": np.array([[2.0, 2.0, 2.0], [-1.0, -1.0, -1.0]]),
        "mask": np.array([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]),
    }
    value, gradient, stats = evaluate(SFT, data)
    # 2 * (1 + 2 + 0.5) - 1 * 3 = 4, over 4 tokens
    assert value == pytest.approx(1.0, abs=1e-12)
    np.testing.assert_allclose(gradient, [[-0.5, -0.5, -0.5], [0.25, 0.0, 0.0]], atol=1e-12)
    assert stats == {
        "policy_loss": pytest.approx(1.0), "supervised_loss": 0.0, "clip_fraction": 0.0, "reference_kl": 0.0
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ratio", "advantage", "token_loss", "gradient", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, 0.0),  # on policy
        (1.25, 2.0, -2.5, -2.5, 0.0),  # inside the upper bound 1.3
        (1.5, 2.0, -2.6, 0.0, 1.0),  # above it: 1.3 * 2, no gradient
        (0.5, 2.0, -1.0, -1.0, 0.0),  # below the lower bound, but it should grow
        (0.9, -2.0, 1.8, 1.8, 0.0),
        (0.5, -2.0, 1.6, 0.0, 1.0),  # below 0.8: 0.8 * 2, no gradient
        (1.5, -2.0, 3.0, 3.0, 0.0),  # too likely and bad: full gradient
        (4.0, -2.0, 6.0, 0.0, 1.0),  # the dual clip: 3 * 2, no gradient
    ],
)
def test_ppo_clip_token_by_token(
    evaluate: Evaluate, ratio: float, advantage: float, token_loss: float, gradient: float, clipped: float
) -> None:
    data = {
        "logprobs": np.array([[np.log(ratio) - 1.0]]),
        "old": np.array([[-1.0]]),
        "advantages": np.array([[advantage]]),
        "mask": np.ones((1, 1)),
    }
    value, grad, stats = evaluate(PPO, data)
    assert value == pytest.approx(token_loss, abs=1e-9)
    assert grad[0, 0] == pytest.approx(gradient, abs=1e-9)
    assert stats["clip_fraction"] == pytest.approx(clipped)


@pytest.mark.parametrize("mode", ["token_mean", "token_sum", "seq_mean_token_sum", "seq_mean_token_mean"])
@pytest.mark.parametrize("seed", range(3))
def test_ppo_clip_equals_the_branching_formula(
    evaluate: Evaluate, random_data: RandomData, mode: str, seed: int
) -> None:
    data = random_data(seed)
    loss = PPOClip(agg_mode=mode, clip_low=0.2, clip_high=0.3, dual_clip=3.0, **NO_KL)
    expected = aggregate(mode, ppo_tokens(data) * data["importance"], data["mask"])
    assert evaluate(loss, data)[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_dr_grpo_divides_token_sums_by_a_constant(evaluate: Evaluate, random_data: RandomData, seed: int) -> None:
    data = random_data(seed) | {"importance": None}
    mask = data["mask"]
    assert evaluate(DR_GRPO, data)[0] == pytest.approx(aggregate("norm", ppo_tokens(data), mask, 10), rel=1e-6)
    wide = {name: None if v is None else np.pad(v, ((0, 0), (0, 5))) for name, v in data.items()}
    assert evaluate(DR_GRPO, wide)[0] == pytest.approx(evaluate(DR_GRPO, data)[0], rel=1e-6)  # not by the width


@pytest.mark.parametrize("seed", range(3))
def test_gspo_clips_the_geometric_mean_ratio_of_a_sequence(
    evaluate: Evaluate, random_data: RandomData, seed: int
) -> None:
    data = random_data(seed) | {"importance": None}
    old, advantages, mask = data["old"], data["advantages"], data["mask"]

    def formula(logprobs: Array) -> float:
        ratios = np.exp(((logprobs - old) * mask).sum(1) / mask.sum(1))
        objective = np.minimum(ratios * advantages[:, 0], np.clip(ratios, 0.95, 1.06) * advantages[:, 0])
        return float(-objective.mean())

    value, gradient, _ = evaluate(GSPO_LOSS, data)
    assert value == pytest.approx(formula(data["logprobs"]), rel=1e-6)
    # verl writes the ratio per token with a straight-through gradient: the sequence gradient, spread evenly
    np.testing.assert_allclose(gradient, numeric_gradient(formula, data["logprobs"]), atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_cispo_keeps_the_gradient_of_clipped_tokens(evaluate: Evaluate, random_data: RandomData, seed: int) -> None:
    data = random_data(seed)
    logprobs, old, advantages = data["logprobs"], data["old"], data["advantages"]
    mask, importance = data["mask"], data["importance"]
    ratios = np.exp(logprobs - old)
    weights = np.minimum(ratios, 1.3) * importance * advantages * mask / mask.sum()
    value, gradient, stats = evaluate(CISPO_LOSS, data)
    assert value == pytest.approx(-(weights * logprobs).sum(), rel=1e-6)
    np.testing.assert_allclose(gradient, -weights, rtol=1e-6, atol=1e-9)
    assert stats["clip_fraction"] == pytest.approx(((ratios > 1.3) * mask).sum() / mask.sum())


@pytest.mark.parametrize("name", ["sft", "ppo", "dr_grpo"])  # the other two hold a factor fixed: tested above
def test_gradients_equal_finite_differences(evaluate: Evaluate, random_data: RandomData, name: str) -> None:
    data = random_data(7)
    logprobs = data["logprobs"]
    _, gradient, _ = evaluate(ALL[name], data)

    def value(at: Array) -> float:
        return evaluate(ALL[name], data | {"logprobs": at})[0]

    np.testing.assert_allclose(gradient, numeric_gradient(value, logprobs), atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_on_policy_every_loss_has_the_reinforce_gradient(
    evaluate: Evaluate, random_data: RandomData, name: str
) -> None:
    data = random_data(3)
    data = data | {"old": data["logprobs"], "importance": None}
    mask, advantages = data["mask"], data["advantages"]
    per_token = {
        "dr_grpo": mask / len(mask) / 10,
        "gspo": mask / mask.sum(1, keepdims=True) / len(mask),
    }.get(name, mask / mask.sum())
    np.testing.assert_allclose(evaluate(ALL[name], data)[1], -advantages * per_token, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_importance_weights_scale_value_and_gradient(evaluate: Evaluate, random_data: RandomData, name: str) -> None:
    data = random_data(11)
    plain = evaluate(ALL[name], data | {"importance": None})
    ones = evaluate(ALL[name], data | {"importance": np.ones((6, 9))})
    half = evaluate(ALL[name], data | {"importance": np.full((6, 9), 0.5)})
    assert ones[0] == pytest.approx(plain[0], rel=1e-12)
    assert half[0] == pytest.approx(plain[0] / 2, rel=1e-12)
    np.testing.assert_allclose(half[1], plain[1] / 2, rtol=1e-12)
    weights = np.ones((6, 9))
    weights[2] = 0.0  # silences one sequence
    assert not evaluate(ALL[name], data | {"importance": weights})[1][2].any()


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("name", ALL)
def test_micro_batches_and_ranks_add_up_to_the_mini_batch(
    evaluate: Evaluate, random_data: RandomData, name: str, kl_coef: float
) -> None:
    loss = type(ALL[name])(**{**vars(ALL[name]), "kl_coef": kl_coef})
    data = random_data(5)
    mask = data["mask"]
    tokens = int(mask.sum())
    whole_value, whole_gradient, whole_stats = evaluate(loss, data)
    ranks = [[[0, 3], [1]], [[5], [2], [4]]]  # two ranks with their micro-batches
    value, gradient, stats = 0.0, np.zeros_like(whole_gradient), dict.fromkeys(whole_stats, 0.0)
    for micro_batches in ranks:
        for which in micro_batches:
            rows = {name: values[which] for name, values in data.items()}
            part = evaluate(loss, rows, num_tokens=tokens, num_sequences=6, dp_size=2)
            value += part[0] / 2
            gradient[which] += part[1] / 2
            stats = {key: stats[key] + part[2][key] / 2 for key in stats}
    assert value == pytest.approx(whole_value, rel=1e-6)
    np.testing.assert_allclose(gradient, whole_gradient, rtol=1e-6, atol=1e-12)
    assert stats == pytest.approx(whole_stats, rel=1e-6)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_padding_is_never_read(evaluate: Evaluate, random_data: RandomData, name: str, garbage: float) -> None:
    data = random_data(9)
    mask = data["mask"]
    dirty = {key: v if v is None or key == "mask" else np.where(mask > 0, v, garbage) for key, v in data.items()}
    clean_value, clean_gradient, clean_stats = evaluate(ALL[name], data)
    value, gradient, stats = evaluate(ALL[name], dirty)
    assert value == clean_value and stats == clean_stats
    np.testing.assert_array_equal(gradient, clean_gradient)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ALL)
def test_gpu_equals_cpu(random_data: RandomData, name: str) -> None:
    data = random_data(4)

    def on(device: str) -> tuple[float, dict[str, float]]:
        tensors = {k: torch.tensor(v, dtype=torch.float32, device=device) for k, v in data.items()}
        value, stats = ALL[name](
            logprobs_NR=tensors["logprobs"],
            old_logprobs_NR=tensors["old"],
            advantages_NR=tensors["advantages"],
            mask_NR=tensors["mask"].bool(),
            importance_NR=tensors["importance"],
            reference_logprobs_NR=tensors["reference"],
            supervised_NR=None,
            num_tokens=30,
            num_sequences=6,
            dp_size=1,
        )
        return value.item(), stats

    (cpu, cpu_stats), (gpu, gpu_stats) = on("cpu"), on("cuda")
    assert gpu == pytest.approx(cpu, rel=1e-5)
    assert gpu_stats == pytest.approx(cpu_stats, rel=1e-5)
