"""What the gap between trainer and sampler may be: learned in the first steps, then a warning and the end."""

from __future__ import annotations

import math
from typing import Any

import pytest

from atropos_exp.assembly.gap import GapLimit, coarser
from atropos_exp.errors import WrongSampler


def learned(dtype: str, *first: float, max_gap: float | None = None) -> GapLimit:
    limit = GapLimit(dtype, max_gap=max_gap)
    for step, gap in enumerate(first, 1):
        assert limit.judge(step, gap=gap, num_tokens=100) is None
    return limit


@pytest.mark.parametrize(
    ("limit", "allowed"),
    [
        (learned("float32"), 0.02),
        (learned("bfloat16", 0.05, 0.06), 0.3),  # two steps show nothing yet
        (learned("bfloat16", 0.05, 0.06, 0.04), 0.24),  # four times the largest
        (learned("bfloat16", 0.01, 0.02, 0.01), 0.1),
        (learned("float32", 1e-6, 1e-6, 2e-6), 2e-3),
        (learned("float32", 1e-6, 0.01, 2e-6), 0.02),  # not above the default
        (learned("float16", 0.01, 0.01, 0.01, max_gap=0.5), 0.5),
    ],
)
def test_what_is_allowed(limit: GapLimit, allowed: float) -> None:
    assert limit.allowed == pytest.approx(allowed)
    assert limit.judge(9, gap=allowed * 0.999, num_tokens=100) is None
    said = limit.judge(10, gap=allowed * 1.001, num_tokens=100)
    assert said is not None and "step 10" in said and f"at most {allowed:.3g}" in said and "(version 9)" in said


def test_the_second_step_in_a_row_ends_the_run() -> None:
    limit = learned("bfloat16", 0.01, 0.01, 0.01)
    assert limit.judge(4, gap=0.2, num_tokens=100) is not None
    assert limit.judge(5, gap=0.02, num_tokens=100) is None
    assert limit.judge(6, gap=0.2, num_tokens=100) is not None, "the one before was right again"
    assert limit.judge(7, gap=9.0, num_tokens=31) is None, "too few tokens say nothing, neither good nor bad"
    assert limit.judge(8, gap=math.nan, num_tokens=0) is None
    with pytest.raises(WrongSampler, match=r"step 9: .* by 0.2 nats .* at most 0.1 .* after step 6\..*sync.max_gap"):
        limit.judge(9, gap=0.2, num_tokens=100)


@pytest.mark.parametrize("changes", [{}, {"max_gap": 0.1}])
def test_far_above_one_step_is_enough(changes: dict[str, Any]) -> None:
    limit = learned("bfloat16", 0.01, 0.01, 0.01, **changes)
    assert limit.judge(4, gap=0.499, num_tokens=100) is not None
    limit = learned("bfloat16", 0.01, 0.01, 0.01, **changes)
    with pytest.raises(WrongSampler, match="step 4"):
        limit.judge(4, gap=0.501, num_tokens=100)


def test_the_coarser_side_rounds() -> None:
    assert coarser("float32", "bfloat16") == coarser("bfloat16", "float16") == "bfloat16"
    assert coarser("float32", "float32") == "float32"
