"""Intervals and comparisons against scipy, and on planted data: what is there is found, what is not is not claimed."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from atropos_exp.report.comparisons import compare, holm, rank_correlation, seed_mean, variance_shares

NUM_SIMULATIONS = 1000


def test_an_interval_over_seeds_is_scipys() -> None:
    values = [0.71, 0.64, 0.8, 0.69]
    found = seed_mean(values)
    expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert found.mean == pytest.approx(0.71)
    assert found.interval == pytest.approx(expected)
    assert seed_mean([0.5]).interval is None
    assert seed_mean([0.0, 1.0], bounds=(0.0, 1.0)).interval == (0.0, 1.0)


def test_a_paired_comparison_is_scipys() -> None:
    random = np.random.default_rng(3)
    baseline = dict(enumerate(random.normal(0.6, 0.1, 5)))
    others = [{seed: value + random.normal(0.02, 0.03) for seed, value in baseline.items()} for _ in range(4)]
    found = compare(baseline, others)
    for one, other in zip(found, others, strict=True):
        expected = stats.ttest_rel(list(other.values()), list(baseline.values()))
        assert one.p == pytest.approx(expected.pvalue, rel=1e-9)
        assert one.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))
    raw = [one.p or 0.0 for one in found]
    by_hand = {at: min(1.0, factor * p) for factor, (p, at) in zip((4, 3, 2, 1), sorted(
        (p, at) for at, p in enumerate(raw)), strict=True)}  # fmt: skip
    running = np.maximum.accumulate([by_hand[at] for _, at in sorted((p, at) for at, p in enumerate(raw))])
    assert sorted(one.p_holm or 0.0 for one in found) == pytest.approx(list(running))


def test_holm_by_hand() -> None:
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert holm([]) == []


def test_no_difference_is_claimed_at_most_at_the_stated_rate() -> None:
    """Four points that are all the baseline, five seeds with noise of their own: any claim at all is false."""
    random = np.random.default_rng(11)
    false_claims = 0
    for _ in range(NUM_SIMULATIONS):
        common = random.normal(0.6, 0.1, 5)  # what a seed does to every point
        points = [dict(enumerate(common + random.normal(0.0, 0.03, 5))) for _ in range(5)]
        false_claims += any(one.significant for one in compare(points[0], points[1:]))
    # 5 %, with three standard deviations of counting 1,000 times
    assert false_claims <= 1000 * 0.05 + 3 * (1000 * 0.05 * 0.95) ** 0.5
    assert false_claims >= 5, "a test that never claims anything has no power either"


def test_a_real_difference_is_found() -> None:
    """0.1 against noise of 0.02 on five seeds, though the seeds themselves differ by 0.1; the others are equal."""
    random = np.random.default_rng(12)
    found = wrong = 0
    for _ in range(NUM_SIMULATIONS):
        common = random.normal(0.6, 0.1, 5)
        points = [dict(enumerate(common + random.normal(0.0, 0.02, 5))) for _ in range(4)]
        points.append(dict(enumerate(common + 0.1 + random.normal(0.0, 0.02, 5))))
        results = compare(points[0], points[1:])
        found += results[-1].significant and results[-1].difference > 0
        wrong += any(one.significant for one in results[:-1])
    assert found > 950
    assert wrong <= 1000 * 0.05 + 3 * (1000 * 0.05 * 0.95) ** 0.5


def test_equal_differences_prove_nothing_by_themselves() -> None:
    """Two seeds, eight prompts, one prompt more each time: the spread is below what eight prompts can show."""
    base, other = {0: 0.5, 1: 0.625}, {0: 0.625, 1: 0.75}
    (coarse,) = compare(base, [other], resolution=1 / 8)
    assert coarse.p == pytest.approx(2 * stats.t.sf(0.125 / (0.125 / 6**0.5 / 2**0.5), 1))
    assert not coarse.significant
    (none,) = compare(base, [other])
    assert (none.p, none.significant) == (1.0, False)


def test_verdicts_are_plain() -> None:
    base = {0: 0.5, 1: 0.6, 2: 0.55}
    one, nothing, apart = compare(base, [{0: 0.9}, dict(base), {7: 0.5}])
    assert one.verdict == "One seed only: it cannot tell a difference from chance."
    assert nothing.verdict == "No significant difference over these 3 seeds."
    assert apart.verdict == "Not comparable: no seed finished in both."
    (better,) = compare(base, [{0: 0.8, 1: 0.91, 2: 0.84}])
    assert better.verdict == "Better than the baseline, by these 3 seeds."


def test_only_common_seeds_count() -> None:
    (found,) = compare({0: 0.5, 1: 0.6, 2: 0.7}, [{1: 0.7, 2: 0.9, 3: 0.1}])
    assert found.seeds == (1, 2)
    assert found.difference == pytest.approx(0.15)


def test_shares_of_variance_of_a_grid() -> None:
    a, b = [0, 0, 1, 1], ["x", "y", "x", "y"]
    values = [1.0, 2.0, 5.0, 6.0]  # 4 a + 1 b: sums of squares 16 and 1
    assert variance_shares({"a": a, "b": b}, values) == pytest.approx({"a": 16 / 17, "b": 1 / 17})
    assert variance_shares({"a": a}, [1.0] * 4) == {}


def test_rank_correlation_is_scipys() -> None:
    x, y = [1e-5, 1e-4, 1e-3, 1e-2, 1e-2], [0.2, 0.5, 0.4, 0.9, 0.9]
    assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert rank_correlation([1.0, 1.0], [0.1, 0.2]) is None
