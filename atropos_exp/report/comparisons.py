"""What a few seeds can tell: means with intervals, paired comparisons with a baseline, shares of variance.

A seed is the unit: two runs of one seed share data order and held-out prompts, so their difference has less noise
than either of them. The prompts of one evaluation are not independent runs and never count as such.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from atropos_exp.parts.eval.estimators import Bounds

ALPHA = 0.05  # share of reports without any real difference that may claim one


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedMean:
    """The mean of one value per seed. `interval` is None with a single seed, which says nothing about others."""

    mean: float
    num: int
    interval: Bounds | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A point against the baseline, over the seeds that both have."""

    seeds: tuple[int, ...]
    difference: float  # mean over seeds of point minus baseline; NaN without a common seed
    interval: Bounds | None  # 95 %, of this comparison alone
    p: float | None  # two-sided, paired t-test; None with fewer than two common seeds
    p_holm: float | None = None  # the same after Holm's correction for all comparisons of the report

    @property
    def significant(self) -> bool:
        """Whether the difference is more than chance explains."""
        return self.p_holm is not None and self.p_holm < ALPHA

    @property
    def word(self) -> str:
        """The verdict in a word or two."""
        if self.p is None:
            return "one seed" if self.seeds else "no seed in common"
        return ("better" if self.difference > 0 else "worse") if self.significant else "not significant"

    @property
    def verdict(self) -> str:
        """The verdict as a sentence."""
        if not self.seeds:
            return "Not comparable: no seed finished in both."
        if self.p is None:
            return "One seed only: it cannot tell a difference from chance."
        if self.significant:
            return f"{self.word.capitalize()} than the baseline, by these {len(self.seeds)} seeds."
        return f"No significant difference over these {len(self.seeds)} seeds."


def seed_mean(values: Sequence[float], *, bounds: Bounds | None = None) -> SeedMean:
    """Return the mean of one value per seed with Student's 95 % interval, cut at `bounds`.

    seed_mean([0.8, 0.9])  # mean 0.85, interval (0.21, 1.49)
    seed_mean([0.8, 0.9], bounds=(0.0, 1.0))  # an accuracy: interval (0.21, 1.0)
    """
    if not len(values):
        raise ValueError("seed_mean: there is no value")
    mean, num = float(np.mean(values)), len(values)
    if num < 2:
        return SeedMean(mean=mean, num=num, interval=None)
    half = _t_quantile(num - 1) * float(np.std(values, ddof=1)) / math.sqrt(num)
    least, most = bounds or (-math.inf, math.inf)
    return SeedMean(mean=mean, num=num, interval=(max(least, mean - half), min(most, mean + half)))


def compare(
    baseline: Mapping[int, float], others: Sequence[Mapping[int, float]], *, resolution: float = 0.0
) -> list[Comparison]:
    """Compare each of `others` (seed -> value) with `baseline`, paired by seed; p-values corrected together (Holm,
    1979).

    `resolution`: the smallest step between two values, 1 / prompts for an accuracy. Differences that happen to be
    equal on every seed do not prove that there is no noise, so their deviation counts as at least that of rounding
    both values to the step: resolution / sqrt(6). With 0, equal differences prove nothing (p = 1).
    """
    found = [_paired(baseline, other, resolution) for other in others]
    corrected = holm([one.p for one in found])
    return [replace(one, p_holm=p_holm) for one, p_holm in zip(found, corrected, strict=True)]


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return Holm's step-down adjusted p-values; None stays None and does not count as a test."""
    order = sorted((p, at) for at, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, at) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[at] = largest
    return adjusted


def variance_shares(levels: Mapping[str, Sequence[object]], values: Sequence[float]) -> dict[str, float]:
    """Return the share of the variance of `values` that each key's levels account for (its main effect).

    `levels[key][i]` is the setting of run i. In a complete grid the shares of all keys and of what is left
    (interactions and seeds) add up to 1; with runs missing they overlap and do not. {} if there is no variance.
    """
    array = np.asarray(values, dtype=np.float64)
    total = float(np.sum((array - array.mean()) ** 2)) if len(array) else 0.0
    if total <= 1e-18:
        return {}
    shares = {}
    for key, settings in levels.items():
        between = 0.0
        for setting in dict.fromkeys(map(repr, settings)):
            chosen = array[np.array([repr(item) == setting for item in settings])]
            between += len(chosen) * float(chosen.mean() - array.mean()) ** 2
        shares[key] = between / total
    return shares


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation of two equally long sequences; None if either does not vary."""
    from scipy.stats import spearmanr  # a second to import, and only reports of sweeps need it

    if min(float(np.ptp(values)) if len(values) else 0.0 for values in (x, y)) == 0.0:
        return None
    return float(spearmanr(x, y).statistic)


def _t_quantile(df: int) -> float:
    """The t with P(|T| <= t) = 0.95: 12.706 with one degree of freedom."""
    from scipy.special import stdtrit

    return float(stdtrit(df, (1 + 0.95) / 2))


def _paired(baseline: Mapping[int, float], other: Mapping[int, float], resolution: float) -> Comparison:
    """Without the correction for other comparisons."""
    from scipy.special import stdtr

    seeds = tuple(sorted(baseline.keys() & other.keys()))
    differences, num = np.array([other[seed] - baseline[seed] for seed in seeds]), len(seeds)
    mean = float(differences.mean()) if num else math.nan
    if num < 2:
        return Comparison(seeds=seeds, difference=mean, interval=None, p=None)
    deviation = max(float(differences.std(ddof=1)), resolution / math.sqrt(6))
    if deviation < 1e-12:
        return Comparison(seeds=seeds, difference=mean, interval=None, p=1.0)
    error = deviation / math.sqrt(num)
    half = _t_quantile(num - 1) * error
    p = float(2 * stdtr(num - 1, -abs(mean / error)))  # two-sided
    return Comparison(seeds=seeds, difference=mean, interval=(mean - half, mean + half), p=p)
