"""From logits to tokens: one call per decode step for all rows, each row with its own parameters.

A row's randomness is a counter-based hash of (seed, prompt index, sample index, position in the completion), so
it does not depend on the rows that share the batch. What remains is rounding: matrix products may round
differently in another company, which can only tip a draw that lies within that rounding of the border between
two tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from atropos_exp.parts.engine.serving.seeds import GOLDEN, mix

if TYPE_CHECKING:
    from torch import Tensor

MAX_CDF_ELEMENTS = 1 << 25  # bounds the float64 work space of one step: 256 MiB


def uniforms(keys_N: NDArray[np.uint64], num_positions: int) -> NDArray[np.float64]:
    """[N, num_positions] in [0, 1), one per row and position, on a grid of 2^-52."""
    positions = (np.arange(num_positions, dtype=np.uint64) + np.uint64(1)) * GOLDEN
    bits = mix(keys_N[:, None] + positions[None, :]) >> np.uint64(12)
    return bits.astype(np.float64) * 2.0**-52


def sample_tokens(
    logits_NV: Tensor, *, temperature_N: Tensor, top_p_N: Tensor, top_k_N: Tensor, uniform_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens [N] and their logprobs [N] (float32 nats).

    Logprobs are of softmax(logits / temperature) over the whole vocabulary, before top-k and top-p; a row of
    temperature 0 takes the most likely token and reports its logprob at temperature 1. `top_k` 0 and `top_p` 1
    are off; with both, top-p applies to the renormalised top-k. uniform_N is float64 in [0, 1).
    """
    import torch

    rows = max(1, MAX_CDF_ELEMENTS // logits_NV.shape[1])
    if len(logits_NV) > rows:
        whole = (logits_NV, temperature_N, top_p_N, top_k_N, uniform_N)
        parts = [
            sample_tokens(logits, temperature_N=temperature, top_p_N=top_p, top_k_N=top_k, uniform_N=uniform)
            for logits, temperature, top_p, top_k, uniform in zip(*(x.split(rows) for x in whole), strict=True)
        ]
        return torch.cat([tokens for tokens, _ in parts]), torch.cat([logprobs for _, logprobs in parts])

    greedy_N = temperature_N == 0
    scale_N = torch.where(greedy_N, torch.ones_like(temperature_N), temperature_N)
    logprobs_NV = torch.log_softmax(logits_NV.float() / scale_N[:, None], dim=-1)
    best_N = logprobs_NV.argmax(dim=-1)
    if bool(greedy_N.all()):
        tokens_N = best_N
    else:
        weights_NV = logprobs_NV.exp()
        filtered = ((top_p_N < 1) | ((top_k_N > 0) & (top_k_N < logits_NV.shape[1]))).nonzero()[:, 0]
        if len(filtered):
            # The support is marked in vocabulary order, so that a row draws alike whether or not another filters.
            weights_NV[filtered] *= support(weights_NV[filtered], top_p_N[filtered], top_k_N[filtered])
        cdf_NV = weights_NV.double().cumsum(dim=-1)
        # uniform * total < total on the 2^-52 grid, so the first entry above it has weight.
        drawn_N = torch.searchsorted(cdf_NV, (uniform_N * cdf_NV[:, -1])[:, None], right=True)[:, 0]
        drawn_N = drawn_N.clamp(max=logits_NV.shape[1] - 1)
        # A parallel sum may round out of order; never take a token that has no weight.
        has_weight_N = weights_NV.gather(1, drawn_N[:, None])[:, 0] > 0
        tokens_N = torch.where(greedy_N | ~has_weight_N, best_N, drawn_N)
    return tokens_N, logprobs_NV.gather(1, tokens_N[:, None])[:, 0]


def support(weights_NV: Tensor, top_p_N: Tensor, top_k_N: Tensor) -> Tensor:
    """Bool [N, V]: the tokens that top-k and then top-p leave. Tokens as likely as the last one left stay too, so
    that the answer does not depend on an order among equals."""
    import torch

    vocab_size = weights_NV.shape[1]
    keep_NV = torch.empty_like(weights_NV, dtype=torch.bool)
    limited_N = (top_k_N > 0) & (top_k_N < vocab_size)
    for row_M in (limited_N.nonzero()[:, 0], (~limited_N).nonzero()[:, 0]):
        if not len(row_M):
            continue
        weights_MV, top_p_M = weights_NV[row_M], top_p_N[row_M]
        top_k_M = torch.where(limited_N[row_M], top_k_N[row_M], vocab_size)
        sorted_MK = weights_MV.topk(int(top_k_M.max()), dim=-1).values  # far cheaper than a sort for a small k
        sorted_MK = sorted_MK * (torch.arange(sorted_MK.shape[1], device=row_M.device)[None, :] < top_k_M[:, None])
        before_MK = sorted_MK.cumsum(dim=-1) - sorted_MK  # the mass of likelier tokens
        left_MK = (before_MK < top_p_M[:, None] * sorted_MK.sum(dim=-1, keepdim=True)) & (sorted_MK > 0)
        last_M1 = (left_MK.sum(dim=-1, keepdim=True) - 1).clamp(min=0)
        keep_NV[row_M] = weights_MV >= sorted_MK.gather(1, last_M1)
    return keep_NV
