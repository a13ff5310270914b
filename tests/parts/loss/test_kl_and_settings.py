"""The KL term by hand, and settings that are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from atropos_exp.config.build import build
from atropos_exp.errors import UserError
from atropos_exp.parts.loss.advantage_weighted_sft import AdvantageWeightedSFT
from atropos_exp.parts.loss.cispo import CISPO
from atropos_exp.parts.loss.dr_grpo import DrGRPO
from atropos_exp.parts.loss.gspo import GSPO
from atropos_exp.parts.loss.ppo_clip import PPOClip
from tests.helpers.paths import CONF

Evaluate = Callable[..., tuple[float, Any, dict[str, float]]]
RandomData = Callable[..., dict[str, Any]]
NO_KL: dict[str, Any] = {"kl_coef": 0.0, "kl_estimator": "k3"}


@pytest.mark.parametrize(
    ("estimator", "token_kl", "token_gradient"),
    [
        # log ratio policy / reference = log 2: k1 = log 2, k2 = log(2)^2 / 2, k3 = 1/2 - 1 + log 2
        ("k1", np.log(2), 1.0),
        ("k2", np.log(2) ** 2 / 2, np.log(2)),
        ("k3", np.log(2) - 0.5, 0.5),
        ("k3_unclamped", np.log(2) - 0.5, 0.5),
        ("k1+", np.log(2), np.log(2)),
        ("k3+", np.log(2) - 0.5, np.log(2)),
    ],
)
def test_kl_to_the_reference(evaluate: Evaluate, estimator: str, token_kl: float, token_gradient: float) -> None:
    data = {
        "logprobs": np.log([[0.5, 0.5, 0.1]]),
        "old": np.log([[0.5, 0.5, 0.1]]),
        "reference": np.log([[0.25, 0.5, 0.9]]),
        "advantages": np.zeros((1, 3)),
        "mask": np.array([[1.0, 1.0, 0.0]]),
    }
    loss = AdvantageWeightedSFT(agg_mode="token_mean", kl_coef=0.1, kl_estimator=estimator)
    value, gradient, stats = evaluate(loss, data)
    assert value == pytest.approx(0.1 * token_kl / 2, abs=1e-9)  # the second token agrees, the third is padding
    agreeing = 1.0 if estimator == "k1" else 0.0  # the trap of k1: it pushes even where the policies agree
    np.testing.assert_allclose(gradient, [[0.05 * token_gradient, 0.05 * agreeing, 0.0]], atol=1e-9)
    assert stats["reference_kl"] == pytest.approx(token_kl / 2)
    assert stats["policy_loss"] == pytest.approx(0.0)


@pytest.mark.parametrize(("estimator", "token_kl", "pull"), [("k3", 10.0, 0.0), ("k3_unclamped", 16.0855, -19.0855)])
def test_k3_has_no_gradient_where_verl_clamps_it(
    evaluate: Evaluate, estimator: str, token_kl: float, pull: float
) -> None:
    """A token 3 nats less likely than to the reference: exp(3) - 1 - 3, with the derivative 1 - exp(3)."""
    data = {
        "logprobs": np.array([[-4.0]]), "old": np.array([[-4.0]]), "reference": np.array([[-1.0]]),
        "advantages": np.zeros((1, 1)), "mask": np.ones((1, 1)),
    }  # fmt: skip
    loss = AdvantageWeightedSFT(agg_mode="token_mean", kl_coef=1.0, kl_estimator=estimator)
    value, gradient, stats = evaluate(loss, data)
    assert value == pytest.approx(token_kl, abs=1e-4)
    assert stats["reference_kl"] == pytest.approx(token_kl, abs=1e-4)
    np.testing.assert_allclose(gradient, [[pull]], atol=1e-4)


def test_kl_is_averaged_like_the_loss_but_reported_per_token(evaluate: Evaluate, random_data: RandomData) -> None:
    data = random_data(2) | {"advantages": np.zeros((6, 9))}
    logprobs, reference, mask = data["logprobs"], data["reference"], data["mask"]
    k1 = logprobs - reference
    loss = AdvantageWeightedSFT(agg_mode="seq_mean_token_sum", kl_coef=2.0, kl_estimator="k1")
    value, _, stats = evaluate(loss, data)
    assert value == pytest.approx(2.0 * (k1 * mask).sum() / len(mask), rel=1e-6)
    assert stats["reference_kl"] == pytest.approx((k1 * mask).sum() / mask.sum(), rel=1e-6)


def test_kl_coef_needs_a_reference(evaluate: Evaluate, random_data: RandomData) -> None:
    loss = AdvantageWeightedSFT(agg_mode="token_mean", kl_coef=0.1, kl_estimator="k3")
    with pytest.raises(AssertionError, match="reference"):
        evaluate(loss, random_data(0) | {"reference": None})


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: AdvantageWeightedSFT(agg_mode="token-mean", **NO_KL), "agg_mode"),
        (lambda: AdvantageWeightedSFT(agg_mode="token_mean", kl_coef=-0.1, kl_estimator="k3"), "kl_coef"),
        (lambda: AdvantageWeightedSFT(agg_mode="token_mean", kl_coef=0.1, kl_estimator="full"), "kl_estimator"),
        (lambda: GSPO(agg_mode="token_mean", clip_low=1.2, clip_high=0.2, **NO_KL), "clip_low"),
        (lambda: CISPO(agg_mode="token_mean", clip_low=0.2, clip_high=float("nan"), **NO_KL), "clip_high"),
        (lambda: PPOClip(agg_mode="token_mean", clip_low=0.2, clip_high=0.2, dual_clip=1.0, **NO_KL), "dual_clip"),
        (lambda: DrGRPO(scale_factor=0, clip_low=0.2, clip_high=0.2, dual_clip=3.0, **NO_KL), "scale_factor"),
    ],
)
def test_settings_out_of_range_are_named(make: Callable[[], object], name: str) -> None:
    with pytest.raises(UserError, match=f"^{name}: got .*, expected"):
        make()


def test_shipped_yaml_and_fields_agree() -> None:
    for path in sorted((CONF / "loss").glob("*.yaml")):
        node = OmegaConf.merge({"max_response_length": 64}, {"loss": OmegaConf.load(path)}).loss
        built = build(node, "loss")
        if path.stem == "dr_grpo":
            assert built == DrGRPO(scale_factor=64, clip_low=0.2, clip_high=0.2, dual_clip=3.0, **NO_KL)
