"""Student's t distribution, for intervals and tests over a few seeds. Pure: the standard library only."""

from __future__ import annotations

import math


def t_two_sided(t: float, df: float) -> float:
    """Probability that |T| is at least |t| with `df` degrees of freedom."""
    if df <= 0:
        raise ValueError(f"t_two_sided: df must be above 0; got {df}")
    if math.isinf(t):
        return 0.0
    return _regularised_beta(df / 2, 0.5, df / (df + t * t))


def t_quantile(confidence: float, df: float) -> float:
    """The t with P(|T| <= t) = confidence: 12.706 for 0.95 with one degree of freedom."""
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"t_quantile: confidence must lie in (0, 1); got {confidence}")
    tail = 1.0 - confidence
    low, high = 0.0, 1.0
    while t_two_sided(high, df) > tail:
        low, high = high, high * 2
    for _ in range(200):  # to the last bit: each turn halves the interval
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if t_two_sided(middle, df) > tail else (low, middle)
    return (low + high) / 2


def _regularised_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b), by the continued fraction of Numerical Recipes 6.4 (Lentz's method)."""
    if x <= 0.0 or x >= 1.0:
        return min(1.0, max(0.0, x))
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly, use the symmetry
        return 1.0 - _regularised_beta(b, a, 1.0 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    tiny = 1e-300
    c, d = 1.0, 1.0 - (a + b) * x / (a + 1)
    d = 1.0 / (d if abs(d) > tiny else tiny)
    fraction = d
    for m in range(1, 500):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 + term * d
            d = 1.0 / (d if abs(d) > tiny else tiny)
            c = 1.0 + term / c
            c = c if abs(c) > tiny else tiny
            fraction *= d * c
        if abs(d * c - 1.0) < 1e-15:
            return math.exp(log_front) * fraction / a
    raise AssertionError(f"the continued fraction of I_{x}({a}, {b}) does not converge")
