"""Where each prompt stands in the stream."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from atropos_exp.parts.data.mix import Mix, apportion, permutation


def stream(mix: Mix, start: int, count: int) -> list[tuple[int, int]]:
    sources, rows = mix.at(start, count)
    return list(zip(sources.tolist(), rows.tolist(), strict=True))


def test_one_source_gives_every_row_once_an_epoch_in_another_order() -> None:
    mix = Mix([50], None, seed=3)
    first, second = stream(mix, 0, 50), stream(mix, 50, 50)
    assert sorted(first) == sorted(second) == [(0, row) for row in range(50)]
    assert first != second
    assert first != stream(Mix([50], None, seed=4), 0, 50)


def test_without_weights_an_epoch_is_every_row_of_every_source() -> None:
    mix = Mix([7, 30, 1], None, seed=0)
    for epoch in range(3):
        expected = [(0, row) for row in range(7)] + [(1, row) for row in range(30)] + [(2, 0)]
        assert sorted(stream(mix, 38 * epoch, 38)) == expected


def test_weights_give_exact_counts_in_every_epoch_and_even_use_of_each_source() -> None:
    mix = Mix([10, 90], [3.0, 1.0], seed=1)  # epochs of 100: 75 from the small source, 25 from the large one
    for epoch in range(4):
        assert Counter(source for source, _ in stream(mix, 100 * epoch, 100)) == {0: 75, 1: 25}
    used = Counter(stream(mix, 0, 360 * 10))  # 2700 of 10 rows, 900 of 90 rows: whole passes of both
    assert {used[0, row] for row in range(10)} == {270}
    assert {used[1, row] for row in range(90)} == {10}


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.05, 20), min_size=4, max_size=4),
    weighted=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=60, deadline=None)
def test_every_prefix_holds_its_share_to_within_one_prompt_per_source(
    sizes: list[int], weights: list[float], weighted: bool, seed: int
) -> None:
    mix = Mix(sizes, weights[: len(sizes)] if weighted else None, seed)
    length = sum(sizes)
    assert sum(mix.shares) == length and min(mix.shares) >= 1
    sources, rows = mix.at(0, 3 * length)
    assert all(0 <= row < sizes[source] for source, row in zip(sources, rows, strict=True))
    so_far = np.cumsum(sources[:, None] == np.arange(len(sizes)), axis=0)
    expected = np.arange(1, 3 * length + 1)[:, None] * np.asarray(mix.shares) / length
    assert np.abs(so_far - expected).max() <= len(sizes)


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3), seed=st.integers(0, 99), cut=st.data())
@settings(max_examples=60, deadline=None)
def test_any_cut_of_the_stream_is_the_same_stream(sizes: list[int], seed: int, cut: st.DataObject) -> None:
    total = 4 * sum(sizes)
    whole = stream(Mix(sizes, None, seed), 0, total)
    start = cut.draw(st.integers(0, total))
    assert stream(Mix(sizes, None, seed), start, total - start) == whole[start:]


def test_apportion_rounds_to_the_largest_remainder() -> None:
    assert apportion(10, [1, 1, 1]) == [4, 3, 3]
    assert apportion(100, [0.5, 0.25, 0.25]) == [50, 25, 25]
    assert apportion(7, [5.0, 3.0, 2.0]) == [4, 2, 1]  # 3.5, 2.1, 1.4
    assert apportion(5, [1000.0, 1.0, 1.0]) == [3, 1, 1]  # never none


def test_the_permutation_is_pinned() -> None:
    """Runs resume under a newer NumPy: Philox 4x64 words, sorted, must stay what they were."""
    words = np.random.Philox(key=[7, 0x6174726F706F73], counter=[0, 0, 2, 5]).random_raw(6)
    assert permutation(7, 2, 5, 6).tolist() == sorted(range(6), key=lambda place: int(words[place]))
    assert permutation(0, 0, 0, 8).tolist() == [3, 4, 7, 6, 0, 2, 1, 5]
