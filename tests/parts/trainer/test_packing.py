"""Micro-batch plans and packed attention, against dense attention of each sequence alone."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from atropos_exp.errors import UserError
from atropos_exp.parts.trainer.attention import packed_attention
from atropos_exp.parts.trainer.packing import Packing, plan_micro_batches, split_balanced


def test_bins_are_balanced_and_complete() -> None:
    lengths = [random.Random(4).randint(1, 100) for _ in range(200)]
    bins = split_balanced(lengths, 7)
    assert sorted(index for indices in bins for index in indices) == list(range(200))
    loads = [sum(lengths[index] for index in indices) for indices in bins]
    assert max(loads) - min(loads) <= 100
    assert split_balanced([5, 4, 3, 3, 3], 2) == [[0, 3], [1, 2, 4]]  # by hand: 5 | 4, 4+3, 5+3, 7+3


def test_ranks_get_equally_many_micro_batches_within_budget() -> None:
    lengths = [100, 90, 7, 6, 5, 5, 5, 3, 2]
    plan = plan_micro_batches(lengths, dp_size=3, max_tokens=100)
    assert len({len(rank) for rank in plan}) == 1
    assert sorted(i for rank in plan for micro in rank for i in micro) == list(range(9))
    assert all(sum(lengths[i] for i in micro) <= 100 for rank in plan for micro in rank)
    alone = plan_micro_batches([4], dp_size=2, max_tokens=4)
    assert sorted(alone) == [[[]], [[0]]]  # a rank without sequences still takes part
    with pytest.raises(UserError, match="101 tokens"):
        plan_micro_batches([101], dp_size=1, max_tokens=100)


@pytest.mark.parametrize("lengths", [(5, 5, 5), (1, 9, 4, 17, 2, 16)])
@pytest.mark.parametrize("sliding_window", [None, 3])
def test_sequences_attend_to_themselves_only(lengths: tuple[int, ...], sliding_window: int | None) -> None:
    torch.manual_seed(0)
    total, heads, kv_heads, size = sum(lengths), 4, 2, 8
    query = torch.randn(1, heads, total, size, requires_grad=True)
    key, value = (torch.randn(1, kv_heads, total, size, requires_grad=True) for _ in range(2))
    packing = Packing(lengths=lengths, device=torch.device("cpu"), sp_size=1)
    output, _ = packed_attention(
        None, query, key, value, None, packing=packing, scaling=0.3, sliding_window=sliding_window
    )
    assert output.shape == (1, total, heads, size)

    expected = torch.empty(total, heads, size)
    borders = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    for first, last in pairwise(borders):
        for t in range(first, last):
            start = first if sliding_window is None else max(first, t + 1 - sliding_window)
            for head in range(heads):
                keys, values = key[0, head // 2, start : t + 1], value[0, head // 2, start : t + 1]
                expected[t, head] = torch.softmax(keys @ query[0, head, t] * 0.3, 0) @ values
    torch.testing.assert_close(output[0], expected, atol=1e-6, rtol=1e-5)

    weight = torch.randn_like(expected)
    actual = torch.autograd.grad((output[0] * weight).sum(), (query, key, value))
    wanted = torch.autograd.grad((expected * weight).sum(), (query, key, value))
    for ours, theirs in zip(actual, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_padding_stays_below_the_tokens() -> None:
    lengths = (1000, *[14] * 300, *[3] * 50)
    packing = Packing(lengths=lengths, device=torch.device("cpu"), sp_size=1)
    padded = sum(num_rows * length for num_rows, length, _ in packing.buckets)
    assert padded < 2 * sum(lengths)
