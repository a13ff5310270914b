"""Reads the page of a sweep, and works out by scipy what it has to say."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any

import numpy as np
from scipy import stats


class Text(HTMLParser):
    """The words of a page, and the JSON that its charts are drawn from."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.data: Any = None
        self._skip = ""
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._skip = "data" if dict(attrs).get("id") == "data" else tag if tag in ("script", "style") else ""

    def handle_data(self, data: str) -> None:
        if self._skip == "data":
            self.data = json.loads(data)
        elif not self._skip:
            self.words.append(data)
        self._skip = "" if self._skip == "data" else self._skip

    def handle_endtag(self, tag: str) -> None:
        self._skip = ""


def expected_comparison(base: np.ndarray, other: np.ndarray, *, prompts: int) -> tuple[list[str], float]:
    """What the table says of two points with one final accuracy per seed, `base` the baseline: a text for each point
    and one for the difference; and its p-value. `prompts`: that an accuracy is the mean of."""
    num = len(base)
    rows = []
    for values in (base, other):
        half = stats.t.ppf(0.975, num - 1) * stats.sem(values)
        low, high = max(0.0, values.mean() - half), min(1.0, values.mean() + half)
        rows.append(f"{num} of {num} {values.mean():.3g} [{low:.3g}, {high:.3g}]")
    differences = other - base
    # differences that are all equal count as the rounding noise of 1 / prompts, never as certainty
    deviation = max(differences.std(ddof=1), (1 / prompts) / 6**0.5)
    error = deviation / num**0.5
    p = 2 * stats.t.sf(abs(differences.mean()) / error, num - 1)
    half = stats.t.ppf(0.975, num - 1) * error
    mean, low, high = (
        _signed(value) for value in (differences.mean(), differences.mean() - half, differences.mean() + half)
    )
    return [*rows, f"{mean} [{low}, {high}] {p:.2g}"], p


def _signed(value: float) -> str:
    return "0" if value == 0 else f"{value:+.3g}".replace("-", "−")
