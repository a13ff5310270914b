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
    batch = pack([group(first, second)], [np.array([0.5, -0.5], np.float32)], temperature=0.7, version=0)
    assert batch.token_ids_S.tolist() == [5, 6, 7, 8, 9, 4]
    assert batch.lengths_N.tolist() == [4, 2]
    assert batch.trained_S.tolist() == [False, True, False, True, False, True]
    assert batch.advantages_S.tolist() == [0.0, 0.5, 0.0, 0.5, 0.0, -0.5]
    assert batch.behaviour_logprobs_S.tolist() == [0.0, -0.5, 0.0, -0.25, 0.0, 0.0]
    assert batch.has_behaviour_N.tolist() == [True, False]
    assert batch.fresh_N.tolist() == [True, False]
    assert batch.num_trained_tokens == 3
    np.testing.assert_array_equal(batch.temperature_N, np.float32([0.7, 0.7]))
    assert not batch.has_reference_N.any() and not batch.reference_logprobs_S.any() and not batch.supervised_N.any()


def test_environment_advantages_are_used_verbatim_and_a_zeroed_rollout_gets_none():
    own = rollout([1, 2, 3], [0, 1, 1], 0.0, advantages=np.array([9.0, 2.0, -3.0], np.float32))
    assert token_advantages(own, 0.0).tolist() == [0.0, 2.0, -3.0]
    zeroed = rollout([1, 2], [0, 1], 0.0, zero_advantage=True)
    assert token_advantages(zeroed, 5.0).tolist() == [0.0, 0.0]


def test_what_a_sequence_brings_along_is_its_own():
    own = rollout(
        [5, 6, 7], [0, 1, 0], 1.0, temperature=0.25, reference_logprobs=np.array([9.0, -2.0, 9.0], np.float32)
    )
    other = rollout([8, 9], [0, 1], 0.0, logprobs=[9.0, -1.0])
    batch = pack([group(own, other)], [np.array([1.0, -1.0], np.float32)], temperature=1.5, version=0)
    assert batch.temperature_N.tolist() == [0.25, 1.5]
    assert batch.reference_logprobs_S.tolist() == [0.0, -2.0, 0.0, 0.0, 0.0]
    assert batch.has_reference_N.tolist() == [True, False]
    assert batch.behaviour_logprobs_S.tolist() == [0.0, 0.0, 0.0, 0.0, -1.0]


def test_a_supervised_sequence_has_advantage_one_and_forgets_how_it_was_sampled():
    example = rollout(
        [1, 2, 3], [0, 1, 0], -5.0, logprobs=[0, -1, 0], temperature=0.5, supervised=True,
        reference_logprobs=np.array([0.0, -2.0, 0.0], np.float32),
    )  # fmt: skip
    judged = rollout([4, 5], [0, 1], 1.0, logprobs=[0, -0.5])
    batch = pack([group(example, judged)], [np.array([0.0, 0.75], np.float32)], temperature=0.5, version=0)
    assert batch.supervised_N.tolist() == [True, False]
    assert batch.advantages_S.tolist() == [0.0, 1.0, 0.0, 0.0, 0.75]
    assert batch.temperature_N.tolist() == [1.0, 0.5]
    assert batch.has_behaviour_N.tolist() == [False, True] and batch.has_reference_N.tolist() == [False, False]
    assert batch.behaviour_logprobs_S.tolist() == [0.0, 0.0, 0.0, 0.0, -0.5]
    assert not batch.reference_logprobs_S.any()


def test_examples_alone_are_signal_unless_zeroed():
    example, silent = rollout([1, 2], [0, 1], 1.0, supervised=True), rollout([1, 3], [0, 1], 1.0)
    batch = pack([group(example), group(silent)], [np.zeros(1, np.float32)] * 2, temperature=1.0, version=0)
    assert batch is not None and batch.advantages_S.tolist() == [0.0, 1.0, 0.0, 0.0]
    zeroed = rollout([1, 2], [0, 1], 1.0, supervised=True, zero_advantage=True)
    assert token_advantages(zeroed, 3.0).tolist() == [0.0, 0.0]
    assert pack([group(zeroed), group(silent)], [np.zeros(1, np.float32)] * 2, temperature=1.0, version=0) is None


def test_a_batch_without_signal_is_no_batch():
    silent = group(rollout([1, 2], [0, 1], 1.0), rollout([1, 3], [0, 1], 1.0))
    assert pack([silent], [np.zeros(2, np.float32)], temperature=1.0, version=0) is None
    assert pack([], [], temperature=1.0, version=0) is None


def test_advantages_must_match_the_rollouts():
    two = group(rollout([1, 2], [0, 1], 1.0), rollout([1, 3], [0, 1], 0.0))
    with pytest.raises(ValueError, match="got 1 for 2"):
        pack([two], [np.ones(1, np.float32)], temperature=1.0, version=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": float("nan")}, "reward must be finite"),
        ({"logprobs": [0.0, float("inf")]}, "logprobs must be finite"),
        ({"logprobs": [0.0]}, "got 1 entries for 2 tokens"),
        ({"trained": [0, 0]}, "at least one trained token"),
        ({"trained": [1, 1]}, "first token"),
        ({"reference_logprobs": [0.0, float("nan")]}, "reference_logprobs must be finite"),
        ({"reference_logprobs": [0.0, 0.0, 0.0]}, "reference_logprobs must align .* got 3 entries for 2 tokens"),
        ({"advantages": [0.0, -float("inf")]}, "advantages must be finite"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0; got 0"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"supervised": True, "advantages": [0.0, 2.0]}, "advantages must be None"),
    ],
)
def test_a_rollout_refuses_what_would_poison_a_batch(change, message):
    facts = {"token_ids": [1, 2], "trained": [0, 1], "reward": 1.0} | change
    for name in ("advantages", "reference_logprobs"):
        if name in facts:
            facts[name] = np.array(facts[name], np.float32)
    with pytest.raises(ValueError, match=message):
        rollout(**facts)
