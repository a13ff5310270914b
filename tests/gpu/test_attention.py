"""Packed attention on the GPU against plain attention, sequence by sequence, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from atropos_exp.parts.trainer.attention import packed_attention
from atropos_exp.parts.trainer.packing import Packing

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 5e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}  # |difference| / |expected|


def by_hand(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float, window: int) -> Tensor:
    """[S, heads, D] float64."""
    repeats = query.size(1) // key.size(1)
    key, value = (states.repeat_interleave(repeats, dim=1) for states in (key, value))
    outputs = []
    for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
        steps = torch.arange(len(q), device=q.device)
        distance = steps[:, None] - steps
        hidden = (distance < 0) | (distance >= window)
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -math.inf).softmax(-1), v))
    return torch.cat(outputs)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("lengths", [(1, 130, 7, 64, 2, 200), (96, 96, 96), (513,)], ids=["ragged", "equal", "one"])
@pytest.mark.parametrize(
    ("heads", "key_value_heads", "size", "window"),
    [(14, 2, 64, None), (4, 4, 128, None), (9, 3, 64, 33), (4, 1, 16, None)],
)
def test_output_and_gradients(
    device: str,
    dtype: torch.dtype,
    lengths: tuple[int, ...],
    heads: int,
    key_value_heads: int,
    size: int,
    window: int | None,
) -> None:
    torch.manual_seed(sum(lengths) + heads)
    total, scale = sum(lengths), 0.7 / math.sqrt(size)
    shapes = [(heads, total, size), (key_value_heads, total, size), (key_value_heads, total, size)]
    inputs = [torch.randn(shape, device=device).to(dtype)[None].requires_grad_() for shape in shapes]
    packing = Packing(lengths=lengths, device=torch.device(device), sp_size=1)
    output, _ = packed_attention(None, *inputs, None, packing=packing, scaling=scale, sliding_window=window)
    weight = torch.randn(output.shape, device=device).to(dtype)
    output.backward(weight)

    exact = [states.detach()[0].transpose(0, 1).double().requires_grad_() for states in inputs]
    expected = by_hand(exact[0], exact[1], exact[2], lengths, scale, window or total)
    expected.backward(weight[0].double())
    assert output.shape == (1, total, heads, size) and output.dtype == dtype
    gradients = [states.grad[0].transpose(0, 1) for states in inputs if states.grad is not None]
    wanted = [expected.detach(), *(states.grad for states in exact if states.grad is not None)]
    for ours, theirs in zip([output.detach()[0], *gradients], wanted, strict=True):
        assert float((ours.double() - theirs).norm() / theirs.norm()) < TOLERANCE[dtype]
