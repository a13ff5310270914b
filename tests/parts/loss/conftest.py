"""Runs a policy loss on arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from atropos_exp.interfaces import PolicyLoss

Array = np.ndarray[Any, np.dtype[np.float64]]
Data = dict[str, Any]  # name -> [N, R], or None


def _evaluate(
    loss: PolicyLoss, data: Data, *, num_tokens: int = 0, num_sequences: int = 0, dp_size: int = 1
) -> tuple[float, Array, dict[str, float]]:
    """Loss, gradient [N, R] and statistics."""
    mask = data["mask"]
    tensors = {
        name: None if data.get(name) is None else torch.tensor(data[name], dtype=torch.float64)
        for name in ("logprobs", "old", "advantages", "importance", "reference")
    }
    logprobs, old, advantages = tensors["logprobs"], tensors["old"], tensors["advantages"]
    logprobs.requires_grad_()
    value, stats = loss(
        logprobs_NR=logprobs,
        old_logprobs_NR=old,
        advantages_NR=advantages,
        mask_NR=torch.tensor(mask, dtype=torch.bool),
        importance_NR=tensors["importance"],
        reference_logprobs_NR=tensors["reference"],
        supervised_NR=None if data.get("supervised") is None else torch.tensor(data["supervised"], dtype=torch.bool),
        num_tokens=num_tokens or int(mask.sum()),
        num_sequences=num_sequences or len(mask),
        dp_size=dp_size,
    )
    value.backward()
    return value.item(), logprobs.grad.numpy(), stats


def _random_data(seed: int, num_sequences: int = 6, width: int = 9) -> Data:
    """Off-policy enough that every kind of clipping occurs."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, width + 1, num_sequences)
    shape = (num_sequences, width)
    old = -rng.exponential(1.0, shape)
    return {
        "mask": (np.arange(width) < lengths[:, None]).astype(np.float64),
        "logprobs": old + rng.normal(0, 0.6, shape),
        "old": old,
        "advantages": np.repeat(rng.normal(0, 1, (num_sequences, 1)), width, axis=1),
        "importance": rng.uniform(0.1, 2.0, shape),
        "reference": old + rng.normal(0, 0.4, shape),
    }


@pytest.fixture
def evaluate() -> Callable[..., tuple[float, Array, dict[str, float]]]:
    return _evaluate


@pytest.fixture
def random_data() -> Callable[..., Data]:
    return _random_data
