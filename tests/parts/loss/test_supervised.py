"""Supervised rows: cross-entropy under the same denominators, while the other rows' loss stays what it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from atropos_exp.parts.loss.advantage_weighted_sft import AdvantageWeightedSFT
from atropos_exp.parts.loss.cispo import CISPO
from atropos_exp.parts.loss.dr_grpo import DrGRPO
from atropos_exp.parts.loss.gspo import GSPO
from atropos_exp.parts.loss.ppo_clip import PPOClip

Array = np.ndarray[Any, np.dtype[np.float64]]
Evaluate = Callable[..., tuple[float, Array, dict[str, float]]]
RandomData = Callable[..., dict[str, Any]]

KL: dict[str, Any] = {"kl_coef": 0.3, "kl_estimator": "k3"}
BOUNDS: dict[str, float] = {"clip_low": 0.2, "clip_high": 0.3}
MODES = ("token_mean", "token_sum", "seq_mean_token_sum", "seq_mean_token_mean")
LOSSES: dict[str, Any] = {f"ppo {mode}": PPOClip(agg_mode=mode, dual_clip=3.0, **BOUNDS, **KL) for mode in MODES} | {
    "dr_grpo": DrGRPO(scale_factor=10, dual_clip=3.0, **BOUNDS, **KL),
    "gspo": GSPO(agg_mode="seq_mean_token_mean", **BOUNDS, **KL),
    "cispo": CISPO(agg_mode="token_mean", **BOUNDS, **KL),
    "advantage_weighted_sft": AdvantageWeightedSFT(agg_mode="token_mean", **KL),
}
EXAMPLES = np.array([False, True, False, False, True, False])


def share_of_a_token(name: str, mask: Array) -> Array:
    """[N, R] what one token's cost counts in the loss, from the name of the average."""
    lengths, num = mask.sum(1, keepdims=True), len(mask)
    return {
        "ppo token_sum": mask,
        "ppo seq_mean_token_sum": mask / num,
        "ppo seq_mean_token_mean": mask / lengths / num,
        "gspo": mask / lengths / num,
        "dr_grpo": mask / num / 10,
    }.get(name, mask / mask.sum())


def with_examples(data: dict[str, Any]) -> dict[str, Any]:
    """Rows of EXAMPLES are supervised, with advantage 1."""
    rows = EXAMPLES[:, None]
    supervised = np.broadcast_to(rows, data["mask"].shape)
    return data | {"supervised": supervised, "advantages": np.where(rows, 1.0, data["advantages"])}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient(evaluate: Evaluate, random_data: RandomData, name: str, seed: int) -> None:
    loss, data = LOSSES[name], with_examples(random_data(seed))
    mask, share = data["mask"], share_of_a_token(name, data["mask"])
    value, gradient, stats = evaluate(loss, data)
    counts = {"num_tokens": int(mask.sum()), "num_sequences": len(mask)}
    others = {key: None if v is None else v[~EXAMPLES] for key, v in data.items() if key != "supervised"}
    other_value, other_gradient, other_stats = evaluate(loss, others, **counts)

    cross_entropy = -(data["logprobs"] * share)[EXAMPLES].sum()
    assert stats["supervised_loss"] == pytest.approx(cross_entropy, rel=1e-6)
    assert value == pytest.approx(other_value + cross_entropy, rel=1e-6)
    np.testing.assert_allclose(gradient[EXAMPLES], -share[EXAMPLES], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(gradient[~EXAMPLES], other_gradient, rtol=1e-6, atol=1e-12)
    for key in ("policy_loss", "clip_fraction", "reference_kl"):
        assert stats[key] == pytest.approx(other_stats[key], rel=1e-6, abs=1e-12), key
    assert other_stats["supervised_loss"] == 0.0


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -1e30])
def test_how_an_example_was_sampled_is_never_read(
    evaluate: Evaluate, random_data: RandomData, name: str, garbage: float
) -> None:
    data = with_examples(random_data(4))
    rows, padding = EXAMPLES[:, None], data["mask"] == 0
    dirty = data | {key: np.where(rows, garbage, data[key]) for key in ("old", "importance", "reference")}
    dirty |= {key: np.where(padding, garbage, dirty[key]) for key in ("logprobs", "advantages", "importance")}
    clean_value, clean_gradient, clean_stats = evaluate(LOSSES[name], data)
    value, gradient, stats = evaluate(LOSSES[name], dirty)
    assert value == clean_value and stats == clean_stats
    np.testing.assert_array_equal(gradient, clean_gradient)


@pytest.mark.parametrize("name", LOSSES)
def test_only_examples(evaluate: Evaluate, random_data: RandomData, name: str) -> None:
    data = random_data(6) | {"advantages": np.ones((6, 9)), "supervised": np.ones((6, 9), dtype=bool)}
    share = share_of_a_token(name, data["mask"])
    value, gradient, stats = evaluate(LOSSES[name], data)
    assert value == pytest.approx(-(data["logprobs"] * share).sum(), rel=1e-6)
    np.testing.assert_allclose(gradient, -share, rtol=1e-6, atol=1e-12)
    assert (stats["policy_loss"], stats["clip_fraction"], stats["reference_kl"]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("name", LOSSES)
def test_no_example_is_the_same_as_no_flag(evaluate: Evaluate, random_data: RandomData, name: str) -> None:
    data = random_data(8)
    value, gradient, stats = evaluate(LOSSES[name], data)
    flagged = evaluate(LOSSES[name], data | {"supervised": np.zeros((6, 9), dtype=bool)})
    assert (value, stats) == (flagged[0], flagged[2])
    np.testing.assert_array_equal(gradient, flagged[1])


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_and_ranks_add_up(evaluate: Evaluate, random_data: RandomData, name: str) -> None:
    data = with_examples(random_data(5))
    tokens = int(data["mask"].sum())
    whole_value, whole_gradient, whole_stats = evaluate(LOSSES[name], data)
    value, gradient, stats = 0.0, np.zeros_like(whole_gradient), dict.fromkeys(whole_stats, 0.0)
    for which in ([0, 3], [1], [5], [2], [4]):  # some with examples only, some without
        rows = {key: values[which] for key, values in data.items()}
        part = evaluate(LOSSES[name], rows, num_tokens=tokens, num_sequences=6, dp_size=2)
        value += part[0] / 2
        gradient[which] += part[1] / 2
        stats = {key: stats[key] + part[2][key] / 2 for key in stats}
    assert value == pytest.approx(whole_value, rel=1e-6)
    np.testing.assert_allclose(gradient, whole_gradient, rtol=1e-6, atol=1e-12)
    assert stats == pytest.approx(whole_stats, rel=1e-6, abs=1e-12)
