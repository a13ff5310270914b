"""TODO."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    pass


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every input bit moves every output bit."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def row_keys(seed: int, prompt_index_N: NDArray[np.int64], sample_index_N: NDArray[np.int64]) -> NDArray[np.uint64]:
    """One 64-bit key per row [N]."""
    keys = np.full(len(prompt_index_N), seed & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64)
    for part in (prompt_index_N, sample_index_N):
        keys = _mix((keys + _GOLDEN) ^ _mix(part.astype(np.uint64) + _GOLDEN))
    return keys
