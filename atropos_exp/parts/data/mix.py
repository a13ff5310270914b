"""Which prompt stands at which position of the endless stream: a pure function of seed and position.

The stream is divided into epochs as long as all sources together. Within an epoch source s gets an exact number of
places, spread evenly, so that every stretch of the stream holds its share to within about one prompt per source.
Each source is walked in its own order: a fresh permutation whenever all of its prompts have been used.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

_ORDER, _MIX = 0, 1  # separate random streams for the order within a source and for the interleaving


def random_words(seed: int, purpose: int, source: int, epoch: int, count: int) -> NDArray[np.uint64]:
    """`count` uniform 64-bit words, a pure function of the four numbers before it (the generator is Philox)."""
    key = np.array([seed & (2**64 - 1), 0x6174726F706F73], dtype=np.uint64)
    counter = np.array([0, purpose, source, epoch], dtype=np.uint64)  # the last three never overlap: 2**64 blocks each
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def permutation(seed: int, source: int, epoch: int, size: int) -> Ints:
    """A random permutation of range(size), made by sorting random words, so that all versions of NumPy agree on it."""
    return np.argsort(random_words(seed, _ORDER, source, epoch, size), kind="stable").astype(np.int64)


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Divide `total` into whole shares in proportion to `weights`, at least one each, by largest remainder.

    Example: `apportion(10, [2, 1])` gives [7, 3].
    """
    assert total >= len(weights) and all(weight > 0 for weight in weights)
    exact = np.asarray(weights, dtype=np.float64) / float(np.sum(np.asarray(weights, dtype=np.float64))) * total
    shares = np.maximum(np.floor(exact).astype(np.int64), 1)
    by_remainder = np.argsort(-(exact - np.floor(exact)), kind="stable")
    turn = 0
    while shares.sum() < total:
        shares[by_remainder[turn % len(weights)]] += 1
        turn += 1
    while shares.sum() > total:  # only when the minimum of one pushed the sum up
        shares[int(np.argmax(shares))] -= 1
    return [int(share) for share in shares]


class Mix:
    """The stream over sources of `sizes` prompts. `weights` are their relative shares of an epoch; None: one pass over
    everything."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, seed: int) -> None:
        assert sizes and all(size > 0 for size in sizes)
        self.sizes = tuple(sizes)
        self.seed = seed
        self.epoch_length = sum(sizes)
        self.shares = tuple(apportion(self.epoch_length, weights) if weights is not None else sizes)
        self._places = lru_cache(maxsize=2)(self._epoch_places)
        self._permutation = lru_cache(maxsize=2 * len(sizes))(permutation)

    def at(self, start: int, count: int) -> tuple[Ints, Ints]:
        """Source and row within the source of the positions from `start` on, each [count]."""
        positions = np.arange(start, start + count, dtype=np.int64)
        sources, rows = np.empty(count, np.int64), np.empty(count, np.int64)
        for epoch in range(start // self.epoch_length, (start + count - 1) // self.epoch_length + 1 if count else 0):
            inside = positions // self.epoch_length == epoch
            place_sources, place_ranks = self._places(epoch)
            within = positions[inside] - epoch * self.epoch_length
            sources[inside] = place_sources[within]
            rows[inside] = epoch * np.asarray(self.shares)[place_sources[within]] + place_ranks[within]
        for source in np.unique(sources):  # from "the n-th prompt this source ever gave" to a row of it
            mine = sources == source
            passes, places = np.divmod(rows[mine], self.sizes[source])
            picked = np.empty_like(places)
            for one_pass in np.unique(passes):
                here = passes == one_pass
                order = self._permutation(self.seed, int(source), int(one_pass), self.sizes[source])
                picked[here] = order[places[here]]
            rows[mine] = picked
        return sources, rows

    def _epoch_places(self, epoch: int) -> tuple[Ints, Ints]:
        """For the L places of an epoch: the source [L], and how many places of it came before [L]."""
        sources = np.repeat(np.arange(len(self.shares)), self.shares)
        ranks = np.concatenate([np.arange(share) for share in self.shares])
        phases = random_words(self.seed, _MIX, 0, epoch, len(self.shares)).astype(np.float64) / 2.0**64
        keys = (ranks + phases[sources]) / np.asarray(self.shares)[sources]
        order = np.argsort(keys, kind="stable")
        return sources[order], ranks[order]
