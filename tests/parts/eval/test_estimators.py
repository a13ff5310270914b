from __future__ import annotations

from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

from atropos_exp.parts.eval.estimators import mean_interval, pass_at_k, wilson_interval


def test_wilson_interval_by_hand() -> None:
    # z = 1.959964, n = 10, p = 1/2: centre 1/2, half z / (1 + z²/n) sqrt(1/40 + z²/400) = 0.263409
    low, high = wilson_interval(mean=0.5, num=10)
    assert (low, high) == pytest.approx((0.236593, 0.763407), abs=1e-6)
    # at p = 0 the upper end is z² / (n + z²) = 3.841459 / 13.841459
    assert wilson_interval(mean=0.0, num=10) == pytest.approx((0.0, 0.277533), abs=1e-6)
    assert wilson_interval(mean=1.0, num=10) == pytest.approx((0.722467, 1.0), abs=1e-6)
    # 81 of 263, 95 %: an example with published bounds 0.2553 and 0.3662 (Newcombe 1998, method 3)
    assert wilson_interval(mean=81 / 263, num=263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_wilson_interval_solves_the_score_equation() -> None:
    """Its ends are the p with |mean - p| = z sqrt(p (1 - p) / n)."""
    for mean, num, z in ((0.3, 50, 1.959964), (0.95, 200, 1.959964)):
        for end in wilson_interval(mean=mean, num=num):
            assert abs(mean - end) == pytest.approx(z * (end * (1 - end) / num) ** 0.5, rel=1e-6)


def test_wilson_interval_without_trials_knows_nothing() -> None:
    assert wilson_interval(mean=0.5, num=0) == (0.0, 1.0)
    with pytest.raises(ValueError, match=r"mean must lie in \[0, 1\]; got 1.5"):
        wilson_interval(mean=1.5, num=10)


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample() -> None:
    num_samples = 6
    for correct in range(num_samples + 1):
        samples = [True] * correct + [False] * (num_samples - correct)
        for k in range(1, num_samples + 1):
            subsets = list(combinations(samples, k))
            expected = Fraction(sum(any(subset) for subset in subsets), len(subsets))
            (got,) = pass_at_k(num_correct=np.array([correct]), num_samples=num_samples, k=k)
            assert got == pytest.approx(float(expected), abs=1e-12)


def test_pass_at_k_refuses_what_it_cannot_estimate() -> None:
    with pytest.raises(ValueError, match=r"k must lie in 1..num_samples \(4\); got 5"):
        pass_at_k(num_correct=np.array([1]), num_samples=4, k=5)
    with pytest.raises(ValueError, match=r"counts must lie in 0..4; got 1..7"):
        pass_at_k(num_correct=np.array([1, 7]), num_samples=4, k=2)


def test_mean_interval_covers_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    difficulty = rng.beta(2.0, 1.0, size=(2000, 60))  # chance per problem; mean 2/3
    counts = rng.binomial(8, difficulty)
    covered = 0
    widths = []
    for row in counts:
        low, high = mean_interval(pass_at_k(num_correct=row, num_samples=8, k=1))
        covered += low <= 2 / 3 <= high
        widths.append(high - low)
    assert 0.93 < covered / 2000 < 0.97
    # narrower than coin tosses would be: 60 trials at 2/3 give a width of 0.23
    assert np.mean(widths) < 0.75 * np.subtract(*wilson_interval(mean=2 / 3, num=60)[::-1])


def test_mean_interval_keeps_its_width_when_all_values_agree() -> None:
    assert mean_interval(np.ones(10)) == pytest.approx((0.722467, 1.0), abs=1e-6)
    assert mean_interval(np.zeros(0)) == (0.0, 1.0)
    low, high = mean_interval(np.full(10, 0.1 + 0.2 - 0.3 + 1.0))
    assert low <= 1.0 <= high


def test_copies_of_a_problem_count_once() -> None:
    six, copies = np.array([1.0, 0, 1, 1, 0, 1]), np.repeat(np.arange(6), 32)
    assert mean_interval(np.repeat(six, 32), copies) == pytest.approx(wilson_interval(mean=4 / 6, num=6))
    assert mean_interval(np.ones(192), copies) == pytest.approx(wilson_interval(mean=1.0, num=6))
    assert mean_interval(np.repeat([0.25, 0.75], 8), np.repeat([7, 7], 8)) == wilson_interval(mean=0.5, num=1)
    # by hand: deviations of the groups 3 * 0.25 and -1 * 0.75, variance 2 * (0.5625 + 0.5625) / 16, more than a coin's
    assert mean_interval(np.array([1.0, 1, 1, 0]), np.array([0, 0, 0, 1])) == wilson_interval(mean=0.75, num=16 / 10)


def test_intervals_of_unequal_numbers_of_copies_cover_the_truth_about_95_times_in_100() -> None:
    """Copies are answered alike nine times in ten, as by sampling or by another batch. A plain interval covers less."""
    rng = np.random.default_rng(1)
    problems = np.repeat(np.arange(80), rng.integers(1, 9, size=80))
    covered = plain = 0
    for _ in range(2000):
        own = rng.random(80) < 0.6  # of each problem
        values = np.where(rng.random(len(problems)) < 0.9, own[problems], rng.random(len(problems)) < 0.6).astype(float)
        low, high = mean_interval(values, problems)
        covered += low <= 0.6 <= high
        low, high = mean_interval(values)
        plain += low <= 0.6 <= high
    assert 0.93 < covered / 2000 < 0.97
    assert plain / 2000 < 0.75
