"""Advantage estimators against numbers worked out by hand, and the rules that hold for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from atropos_exp.config.build import build
from atropos_exp.errors import UserError
from atropos_exp.parts.advantage.base import VerlAdvantage
from atropos_exp.parts.advantage.grpo import GRPO
from atropos_exp.parts.advantage.grpo_passk import GRPOPassK
from atropos_exp.parts.advantage.opo import OPO
from atropos_exp.parts.advantage.reinforce_plus_plus_baseline import ReinforcePlusPlusBaseline
from atropos_exp.parts.advantage.rloo import RLOO
from atropos_exp.types import Finish, Rollout, RolloutGroup
from tests.helpers.paths import CONF

PLAIN: dict[str, Any] = {"normalization": "none", "clip": None}
SCALED: dict[str, Any] = {"norm_by_std": True, "epsilon": 1e-6}
ALL: dict[str, VerlAdvantage] = {
    "grpo": GRPO(**SCALED, **PLAIN),
    "dr_grpo": GRPO(norm_by_std=False, epsilon=1e-6, **PLAIN),
    "grpo_passk": GRPOPassK(**SCALED, **PLAIN),
    "rloo": RLOO(**PLAIN),
    "opo": OPO(**PLAIN),
    "reinforce_plus_plus_baseline": ReinforcePlusPlusBaseline(**PLAIN),
}


def rollout(reward: float, length: int = 2, *, zero: bool = False, own: float | None = None) -> Rollout:
    """`length` trained tokens after a prompt of one."""
    return Rollout(
        token_ids=np.arange(length + 1, dtype=np.int32),
        trained=np.arange(length + 1) > 0,
        logprobs=None,
        reward=reward,
        finish=Finish.STOP,
        policy_version=0,
        advantages=None if own is None else np.full(length + 1, own, dtype=np.float32),
        zero_advantage=zero,
    )


def group(*rollouts: Rollout) -> RolloutGroup:
    # all groups share an id and their tokens: only the position in the batch may tell them apart
    return RolloutGroup(prompt_id="same", source="local", rollouts=rollouts)


def of(*rewards: float, lengths: Sequence[int] | None = None) -> RolloutGroup:
    return group(*(rollout(r, n) for r, n in zip(rewards, lengths or [2] * len(rewards), strict=True)))


@pytest.mark.parametrize(
    ("name", "rewards", "lengths", "expected"),
    [
        # mean 1/2, std sqrt(1/3 * 1) = 0.57735 (unbiased): 0.5 / 0.57735
        ("grpo", [1, 0, 0, 1], [1, 2, 3, 4], [0.8660254, -0.8660254, -0.8660254, 0.8660254]),
        ("grpo", [1, 0], [2, 2], [0.7071068, -0.7071068]),
        ("grpo", [3, 1, 2], [2, 2, 2], [1, -1, 0]),
        ("dr_grpo", [1, 0, 0, 1], [1, 2, 3, 4], [0.5, -0.5, -0.5, 0.5]),
        ("dr_grpo", [4, 1, 1], [1, 1, 1], [2, -1, -1]),
        # against the mean of the others: 4 - 1, 1 - 2.5, 1 - 2.5
        ("rloo", [4, 1, 1], [5, 1, 1], [3, -1.5, -1.5]),
        ("rloo", [1, 0], [2, 2], [1, -1]),
        # baseline (1 * 1 + 3 * 0) / 4 = 0.25
        ("opo", [1, 0], [1, 3], [0.75, -0.25]),
        ("opo", [2, 1, 0], [1, 2, 1], [1, 0, -1]),
        # (3 - 2) / std(3, 1, 2) = 1; the rest nothing
        ("grpo_passk", [3, 1, 2], [2, 2, 2], [1, 0, 0]),
        ("grpo_passk", [1, 1, 0], [2, 2, 2], [0, 0, 0]),
        # centred +-0.5 over 1 + 3 tokens: mean (0.5 - 1.5) / 4 = -0.25, squared deviations 0.5625 + 3 * 0.0625
        # = 0.75, variance 0.75 / 3 = 0.25: 0.75 / 0.5 and -0.25 / 0.5
        ("reinforce_plus_plus_baseline", [1, 0], [1, 3], [1.5, -0.5]),
    ],
)
def test_one_group_by_hand(name: str, rewards: list[float], lengths: list[int], expected: list[float]) -> None:
    (advantages,) = ALL[name]([of(*rewards, lengths=lengths)])
    assert advantages.dtype == np.float32
    np.testing.assert_allclose(advantages, expected, atol=3e-6)


def test_groups_are_told_apart_by_position_not_by_id_or_tokens() -> None:
    first, second = ALL["dr_grpo"]([of(1, 0), of(10, 20)])
    assert first.tolist() == [0.5, -0.5] and second.tolist() == [-5.0, 5.0]


def test_reinforce_plus_plus_whitens_over_the_batch() -> None:
    lengths = [1, 2, 3, 4]
    first, second = ALL["reinforce_plus_plus_baseline"]([of(1, 0, lengths=lengths[:2]), of(0, 6, lengths=lengths[2:])])
    centred = np.repeat([0.5, -0.5, -3.0, 3.0], lengths)
    expected = (centred - centred.mean()) / centred.std(ddof=1)
    np.testing.assert_allclose([*first, *second], expected[[0, 1, 3, 6]], rtol=1e-5)


def test_reinforce_plus_plus_equals_verl_on_a_padded_mask() -> None:
    import torch
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    rng = np.random.default_rng(0)
    rewards, lengths = rng.normal(size=(5, 4)).astype(np.float32), rng.integers(1, 30, (5, 4))
    ours = ALL["reinforce_plus_plus_baseline"](
        [of(*map(float, r), lengths=n.tolist()) for r, n in zip(rewards, lengths, strict=True)]
    )
    mask = torch.arange(30) < torch.tensor(lengths.reshape(-1, 1))
    theirs, _ = get_adv_estimator_fn("reinforce_plus_plus_baseline")(
        token_level_rewards=torch.nn.functional.pad(torch.tensor(rewards.reshape(-1, 1)), (0, 29)),
        response_mask=mask,
        index=np.repeat(np.arange(5), 4).astype(object),
    )
    np.testing.assert_allclose(np.concatenate(ours), theirs[:, 0], rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("normalization", ["none", "batch"])
def test_nothing_to_compare_is_exactly_zero_and_disturbs_nobody(name: str, normalization: str) -> None:
    estimator = type(ALL[name])(**{**vars(ALL[name]), "normalization": normalization})
    informative = [of(1, 0, 0, lengths=[1, 5, 2]), of(0.25, 4, lengths=[3, 1])]
    alone = estimator(informative)
    assert all(part.any() for part in alone)
    silent = [
        of(5.0, lengths=[400]),  # one rollout: verl would hand back its raw score
        of(0.3, 0.3, 0.3, lengths=[100, 200, 300]),
        of(0.1 + 0.2, 0.3, 0.1 * 3, lengths=[9, 9, 9]),  # equal but for rounding
        of(1e3 + 1e-10, 1e3, 1e3 * (1 + 1e-13)),
        group(rollout(7.0, 50, own=0.5), rollout(-7.0, 60)),  # brings its own advantages
    ]
    mixed = estimator([silent[0], informative[0], *silent[1:4], informative[1], silent[4]])
    for part in (mixed[0], *mixed[2:5], mixed[6]):
        assert not part.any()
    np.testing.assert_array_equal(mixed[1], alone[0])
    np.testing.assert_array_equal(mixed[5], alone[1])
    for part, one in zip(estimator(silent), silent, strict=True):
        assert part.tolist() == [0.0] * len(one.rollouts) and part.dtype == np.float32
    assert estimator([]) == []


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-8, 1e8, -0.7])
@pytest.mark.parametrize("name", ALL)
def test_float_noise_is_not_amplified(name: str, value: float) -> None:
    noisy = [value * (1 + k * 2e-16) for k in (-1, 0, 1, 0, -1, 1, 1)]
    (advantages,) = ALL[name]([of(*noisy)])
    assert not advantages.any()


def test_small_real_differences_are_kept() -> None:
    (advantages,) = ALL["dr_grpo"]([of(0.5, 0.501)])
    np.testing.assert_allclose(advantages, [-0.0005, 0.0005], rtol=1e-6)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("normalization", ["none", "batch"])
def test_zero_advantage_stays_in_the_baseline_only(name: str, normalization: str) -> None:
    estimator = type(ALL[name])(**{**vars(ALL[name]), "normalization": normalization})
    zeroed = [group(rollout(3, 2, zero=True), rollout(1, 3), rollout(2, 4)), of(0, 1)]
    first, _ = estimator(zeroed)
    assert first[0] == 0.0
    if normalization == "none" and name != "reinforce_plus_plus_baseline":
        with_it, _ = estimator([of(3, 1, 2, lengths=[2, 3, 4]), of(0, 1)])
        np.testing.assert_array_equal(first[1:], with_it[1:])


def test_zero_advantage_and_whitening_by_hand() -> None:
    estimator = GRPO(norm_by_std=False, epsilon=0.0, normalization="batch", clip=None)
    (advantages,) = estimator([group(rollout(3, 9, zero=True), rollout(1, 1), rollout(2, 3))])
    # centred by 2: 1 (does not count), -1 once, 0 three times; mean -0.25, variance (0.5625 + 0.1875) / 3 = 0.25
    np.testing.assert_allclose(advantages, [0.0, -1.5, 0.5], atol=1e-6)
    (lonely,) = ALL["reinforce_plus_plus_baseline"]([group(rollout(3, 9, zero=True), rollout(1, 1))])
    assert lonely.tolist() == [0.0, 0.0]  # one token has no variance


@pytest.mark.parametrize("magnitude", [1.0, 1e3])
@pytest.mark.parametrize("name", [name for name in ALL if name != "grpo_passk"])
def test_whitening_a_residue_is_not_amplified(name: str, magnitude: float) -> None:
    estimator = type(ALL[name])(**{**vars(ALL[name]), "normalization": "batch"})
    # only the middle of each group counts, and it lies on the baseline: nothing but rounding remains
    rewards = [(0.1, 0.4), (0.7, 0.2), (0.123, 0.9)]
    middles = [
        group(rollout(a * magnitude, zero=True), rollout((a + b) / 2 * magnitude), rollout(b * magnitude, zero=True))
        for a, b in rewards
    ]
    assert not np.concatenate(estimator(middles)).any()


def test_batch_normalization_weighs_by_trained_tokens() -> None:
    estimator = GRPO(norm_by_std=False, epsilon=0.0, normalization="batch", clip=None)
    parts = estimator([of(1, 0, lengths=[1, 3]), of(0, 0, 3, lengths=[2, 2, 5])])
    per_token = np.repeat([0.5, -0.5, -1.0, -1.0, 2.0], [1, 3, 2, 2, 5])
    expected = (np.array([0.5, -0.5, -1.0, -1.0, 2.0]) - per_token.mean()) / per_token.std(ddof=1)
    np.testing.assert_allclose(np.concatenate(parts), expected, rtol=1e-5)


def test_clip_comes_last() -> None:
    estimator = GRPO(norm_by_std=False, epsilon=0.0, normalization="none", clip=[-0.5, 1.0])
    assert estimator([of(4, 1, 1)])[0].tolist() == [1.0, -0.5, -0.5]
    whitened = GRPO(norm_by_std=False, epsilon=0.0, normalization="batch", clip=[-0.1, 0.1])
    np.testing.assert_allclose(np.abs(whitened([of(4, 1, 1)])[0]), 0.1, rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(ALL)),
    st.sampled_from(["none", "batch"]),
    st.lists(
        st.lists(st.tuples(st.integers(0, 4), st.integers(1, 6), st.booleans()), min_size=1, max_size=5),
        min_size=1,
        max_size=4,
    ),
    st.randoms(use_true_random=False),
)
def test_permuting_groups_and_rollouts_permutes_advantages(
    name: str, normalization: str, batch: list[list[tuple[int, int, bool]]], random: Any
) -> None:
    if name == "grpo_passk":  # of several best it rewards none, so ties have no order either
        batch = [list(dict.fromkeys(one)) for one in batch]
    estimator = type(ALL[name])(**{**vars(ALL[name]), "normalization": normalization})

    def run(rows: list[list[tuple[int, int, bool]]]) -> list[np.ndarray[Any, Any]]:
        return estimator([group(*(rollout(float(r), n, zero=z) for r, n, z in one)) for one in rows])

    orders = [random.sample(range(len(one)), len(one)) for one in batch]
    outer = random.sample(range(len(batch)), len(batch))
    plain, permuted = run(batch), run([[batch[i][j] for j in orders[i]] for i in outer])
    for i, part in zip(outer, permuted, strict=True):
        np.testing.assert_allclose(part, plain[i][orders[i]], atol=2e-5)
        assert np.isfinite(part).all()


@pytest.mark.parametrize("name", ALL)
def test_results_do_not_alias_and_inputs_are_untouched(name: str) -> None:
    groups = [of(1, 0), of(0, 2), of(1, 1)]
    parts, again = ALL[name](groups), ALL[name](groups)
    kept = [part.copy() for part in parts]
    parts[0][:] = 99.0
    assert [p.tolist() for p in parts[1:]] == [k.tolist() for k in kept[1:]]
    assert [p.tolist() for p in again] == [k.tolist() for k in kept]
    assert groups[0].rewards.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_reward_never_gets_here(bad: float) -> None:
    with pytest.raises(ValueError, match="reward must be finite"):
        rollout(bad)


def test_a_reward_beyond_float32_is_named() -> None:
    with pytest.raises(UserError, match=r"prompt 'same' is 1e\+39"):
        ALL["grpo"]([of(1e39, 0.0)])


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("normalization", "group"),
        ("clip", [1.0]),
        ("clip", [0.1, 1.0]),
        ("clip", [1.0, -1.0]),
        ("clip", [0.0, 0.0]),
        ("epsilon", -1.0),
        ("epsilon", float("nan")),
    ],
)
def test_settings_out_of_range_are_named(setting: str, value: object) -> None:
    with pytest.raises(UserError, match=f"^{setting}: got .*, expected"):
        GRPO(**{**SCALED, **PLAIN, setting: value})


def test_shipped_yaml_and_fields_agree() -> None:
    names = set()
    for path in sorted((CONF / "advantage").glob("*.yaml")):
        assert build(yaml.safe_load(path.read_text()), "advantage") == ALL[path.stem]
        names.add(path.stem)
    assert names == set(ALL)
