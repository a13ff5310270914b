"""Packing: the numbers written out by hand."""

import numpy as np
import pytest

from atropos_exp.batching import pack, token_advantages
from atropos_exp.types import Finish, Rollout, RolloutGroup


def rollout(token_ids, trained, reward, *, logprobs=None, **more):
    return Rollout(
        token_ids=np.array(token_ids, np.int32),
        trained=np.array(trained, bool),
        logprobs=None if logprobs is None else np.array(logprobs, np.float32),
        reward=reward,
        finish=Finish.STOP,
        policy_version=0,
        **more,
    )


def group(*rollouts):
    return RolloutGroup(prompt_id="p", source="local", rollouts=rollouts)


def test_sequences_lie_end_to_end_and_masks_may_have_holes():
    first = rollout([5, 6, 7, 8], [0, 1, 0, 1], 1.0, logprobs=[0, -0.5, 0, -0.25])
    second = rollout([9, 4], [0, 1], 0.0)
    batch = pack([group(first, second)], [np.array([0.5, -0.5], np.float32)], temperature=0.7)
    assert batch.token_ids_S.tolist() == [5, 6, 7, 8, 9, 4]
    assert batch.lengths_N.tolist() == [4, 2]
    assert batch.trained_S.tolist() == [False, True, False, True, False, True]
    assert batch.advantages_S.tolist() == [0.0, 0.5, 0.0, 0.5, 0.0, -0.5]
    assert batch.behaviour_logprobs_S.tolist() == [0.0, -0.5, 0.0, -0.25, 0.0, 0.0]
    assert batch.has_behaviour_N.tolist() == [True, False]
    assert batch.num_trained_tokens == 3
    assert batch.temperature == 0.7


def test_environment_advantages_are_used_verbatim_and_a_zeroed_rollout_gets_none():
    own = rollout([1, 2, 3], [0, 1, 1], 0.0, advantages=np.array([9.0, 2.0, -3.0], np.float32))
    assert token_advantages(own, 0.0).tolist() == [0.0, 2.0, -3.0]
    zeroed = rollout([1, 2], [0, 1], 0.0, zero_advantage=True)
    assert token_advantages(zeroed, 5.0).tolist() == [0.0, 0.0]


def test_a_batch_without_signal_is_no_batch():
    silent = group(rollout([1, 2], [0, 1], 1.0), rollout([1, 3], [0, 1], 1.0))
    assert pack([silent], [np.zeros(2, np.float32)], temperature=1.0) is None
    assert pack([], [], temperature=1.0) is None


def test_advantages_must_match_the_rollouts():
    two = group(rollout([1, 2], [0, 1], 1.0), rollout([1, 3], [0, 1], 0.0))
    with pytest.raises(ValueError, match="got 1 for 2"):
        pack([two], [np.ones(1, np.float32)], temperature=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": float("nan")}, "reward must be finite"),
        ({"logprobs": [0.0, float("inf")]}, "logprobs must be finite"),
        ({"logprobs": [0.0]}, "got 1 entries for 2 tokens"),
        ({"trained": [0, 0]}, "at least one trained token"),
        ({"trained": [1, 1]}, "first token"),
    ],
)
def test_a_rollout_refuses_what_would_poison_a_batch(change, message):
    facts = {"token_ids": [1, 2], "trained": [0, 1], "reward": 1.0} | change
    with pytest.raises(ValueError, match=message):
        rollout(facts["token_ids"], facts["trained"], facts["reward"], logprobs=facts.get("logprobs"))
