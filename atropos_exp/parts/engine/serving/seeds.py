"""Keys of randomness: one for each row of a request, whatever else the engine samples at the same time."""

import numpy as np
from numpy.typing import NDArray

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64's increment: 2^64 divided by the golden ratio


def mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every input bit moves every output bit."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def row_keys(seed: int, prompt_index_N: NDArray[np.int64], sample_index_N: NDArray[np.int64]) -> NDArray[np.uint64]:
    """One 64-bit key per row [N], a hash of the seed, the row's prompt and its place among that prompt's samples."""
    keys = np.full(len(prompt_index_N), seed & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64)
    for part in (prompt_index_N, sample_index_N):
        keys = mix((keys + GOLDEN) ^ mix(part.astype(np.uint64) + GOLDEN))
    return keys


def request_keys(seed: int, num_prompts: int, num_samples: int, *, first_prompt: int) -> NDArray[np.uint64]:
    """`row_keys` of all rows of a request, the samples of a prompt side by side. `first_prompt`: the place of its first
    prompt in the call of which it is a part, so that each row's key does not depend on how the call was split."""
    prompt_N = first_prompt + np.repeat(np.arange(num_prompts), num_samples)
    return row_keys(seed, prompt_N, np.tile(np.arange(num_samples), num_prompts))
