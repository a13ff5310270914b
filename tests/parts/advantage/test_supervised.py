"""Supervised rollouts stand beside the comparison: they get no advantage and move nobody else's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hydra.utils import get_class
from omegaconf import OmegaConf

from atropos_exp.types import Finish, Rollout, RolloutGroup
from tests.helpers.paths import CONF

ADVANTAGES = CONF / "advantage"
NAMES = sorted(path.stem for path in ADVANTAGES.glob("*.yaml"))


def estimator(name: str, normalization: str) -> Any:
    values = OmegaConf.load(ADVANTAGES / f"{name}.yaml")
    target = values.pop("_target_")
    return get_class(target)(**{**values, "normalization": normalization})


def rollout(reward: float, length: int = 2, **more: Any) -> Rollout:
    """`length` trained tokens after a prompt of one."""
    return Rollout(
        token_ids=np.arange(length + 1, dtype=np.int32),
        trained=np.arange(length + 1) > 0,
        logprobs=None,
        reward=reward,
        finish=Finish.STOP,
        policy_version=0,
        **more,
    )


def group(*rollouts: Rollout) -> RolloutGroup:
    return RolloutGroup(prompt_id="p", source="atropos", rollouts=rollouts)


@pytest.mark.parametrize("normalization", ["none", "batch"])
@pytest.mark.parametrize("name", NAMES)
def test_the_others_are_compared_as_if_it_were_not_there(name: str, normalization: str) -> None:
    estimate = estimator(name, normalization)
    judged = [rollout(1.0, 3), rollout(0.0, 5), rollout(0.25, 2)]
    other = group(rollout(2.0, 4), rollout(0.0, 1))
    alone, expected = estimate([group(*judged), other])
    examples = [rollout(1000.0, 50, supervised=True), rollout(-7.0, 60, supervised=True)]
    among = group(examples[0], judged[0], judged[1], examples[1], judged[2])
    mixed, second, whole = estimate([among, other, group(*examples)])
    assert alone.any()
    np.testing.assert_array_equal(mixed, [0.0, alone[0], alone[1], 0.0, alone[2]])
    np.testing.assert_array_equal(second, expected)
    assert whole.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", NAMES)
def test_too_few_to_compare(name: str) -> None:
    estimate = estimator(name, "none")
    lonely = group(rollout(3.0), rollout(0.0, supervised=True))
    equal = group(rollout(1.0), rollout(1.0), rollout(0.0, supervised=True))
    for advantages in estimate([lonely, equal, group(rollout(1e30, supervised=True))]):
        assert not advantages.any()


def test_by_hand() -> None:
    # mean 1/2, unbiased standard deviation sqrt(1/2): +-0.5 / 0.70711
    (advantages,) = estimator("grpo", "none")([group(rollout(1.0), rollout(9.0, supervised=True), rollout(0.0))])
    np.testing.assert_allclose(advantages, [0.70710578, 0.0, -0.70710578], atol=1e-5)
