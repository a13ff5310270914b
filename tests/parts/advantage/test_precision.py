"""Rewards that lie close together are told apart, and rewards that do not get the numbers of verl."""

from __future__ import annotations

import numpy as np
import pytest

from tests.parts.advantage.test_advantage import ALL, of


@pytest.mark.parametrize("base", [1e8, -1e8, 1e12, 0.0])
@pytest.mark.parametrize("name", ALL)
def test_a_shift_of_all_rewards_changes_nothing(name: str, base: float) -> None:
    """In float32 the rewards of the first group and those of the second would be equal to one another at 1e8."""
    plain = [of(0.0, 1.0, 3.0, lengths=[3, 1, 2]), of(64.0, 0.0, 0.0, lengths=[2, 5, 1])]
    shifted = [
        of(*(base + rollout.reward for rollout in one.rollouts), lengths=[r.num_trained for r in one.rollouts])
        for one in plain
    ]
    for ours, expected in zip(ALL[name](shifted), ALL[name](plain), strict=True):
        assert expected.any()
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("opo", "reinforce_plus_plus_baseline")])
def test_where_float32_holds_the_differences_the_numbers_are_verl_s_to_the_last_bit(name: str) -> None:
    import torch
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    rewards = np.random.default_rng(0).uniform(-1.0, 1.0, size=(6, 16))
    (theirs, _) = get_adv_estimator_fn(ALL[name].verl_name)(
        token_level_rewards=torch.tensor(rewards.reshape(-1, 1), dtype=torch.float32),
        response_mask=torch.ones(96, 1),
        index=np.repeat(np.arange(6), 16).astype(object),
        **ALL[name].verl_settings(),
    )
    ours = np.concatenate(ALL[name]([of(*map(float, row)) for row in rewards]))
    np.testing.assert_array_equal(ours, np.asarray(theirs)[:, 0])
