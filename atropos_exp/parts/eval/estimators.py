"""Confidence intervals and pass@k for held-out evaluation."""

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Bounds = tuple[float, float]


def wilson_interval(*, mean: float, num: float) -> Bounds:
    """95 % score interval of a proportion `mean` seen in `num` independent trials (Wilson 1927).

    Unlike the normal interval it stays inside [0, 1] and keeps its width at 0 and 1. Without trials it is (0, 1).
    Example: 8 right of 10, `wilson_interval(mean=0.8, num=10)`, gives (0.49, 0.94).
    """
    if not 0.0 <= mean <= 1.0:
        raise ValueError(f"wilson_interval: mean must lie in [0, 1]; got {mean}")
    if num <= 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.975)
    shrink = 1 + z * z / num
    centre = (mean + z * z / (2 * num)) / shrink
    half = z / shrink * math.sqrt(mean * (1 - mean) / num + z * z / (4 * num * num))
    # the exact bound at 0 and 1 is the mean itself; rounding must not put it on the wrong side
    return min(mean, max(0.0, centre - half)), max(mean, min(1.0, centre + half))


def pass_at_k(*, num_correct: NDArray[np.integer], num_samples: int, k: int) -> NDArray[np.float64]:
    """The chance [N] that at least one of `k` samples of a problem is correct, from counts [N] among `num_samples`.

    The unbiased estimator 1 - C(n - c, k) / C(n, k) of Chen et al. 2021, arXiv:2107.03374. Example: 1 correct of 4
    samples gives 0.5 for k = 2.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass_at_k: k must lie in 1..num_samples ({num_samples}); got {k}")
    counts = np.asarray(num_correct)
    if counts.size and (counts.min() < 0 or counts.max() > num_samples):
        raise ValueError(f"pass_at_k: counts must lie in 0..{num_samples}; got {counts.min()}..{counts.max()}")
    whole = math.comb(num_samples, k)
    by_count = np.array([1 - math.comb(num_samples - c, k) / whole for c in range(num_samples + 1)])
    estimates: NDArray[np.float64] = by_count[counts]
    return estimates


def mean_interval(values: NDArray[np.floating], problems: NDArray[np.integer] | None = None) -> Bounds:
    """95 % interval of the mean of values [N] in [0, 1], such as one answer or one pass@k estimate per row.

    `problems` [N] numbers the problem of each row, since rows of the same problem are not independent; None: all
    differ. Example: six problems, each of which is there 32 times, give the interval of six.

    Wilson's interval with an effective number of trials, mean (1 - mean) / variance of the mean. That variance is the
    cluster-robust one, G / (G - 1) sum_g (sum of deviations in problem g)^2 / N^2 (Liang and Zeger 1986). Values
    between 0 and 1 vary less than coin tosses do, so the number is at least Kish's, N^2 / sum_g n_g^2, which is N if
    all problems differ; equal values do not show their variance, so they count as coin tosses.
    """
    if len(values) == 0:
        return 0.0, 1.0
    # rounding may carry a mean of ones a hair beyond 1
    mean = min(1.0, max(0.0, float(np.mean(values, dtype=np.float64))))
    _, group = np.unique(np.arange(len(values)) if problems is None else problems, return_inverse=True)
    sizes = np.bincount(group)
    num = len(values) ** 2 / float((sizes.astype(np.float64) ** 2).sum())
    sums = np.bincount(group, weights=np.asarray(values, np.float64) - mean)
    variance = float((sums**2).sum()) / len(values) ** 2 * len(sizes) / max(1, len(sizes) - 1)
    if variance * len(values) > 1e-12:
        num = max(num, mean * (1 - mean) / variance)
    return wilson_interval(mean=mean, num=num)
