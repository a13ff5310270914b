"""`reward=numeric`: 1 if the answer's number equals the ground truth's, else 0."""

from __future__ import annotations

from dataclasses import dataclass

from atropos_exp.errors import UserError
from atropos_exp.parts.reward.base import PooledReward
from atropos_exp.parts.reward.numbers import final_number
from atropos_exp.types import Prompt


@dataclass(frozen=True, kw_only=True)
class Numeric(PooledReward):
    """Compares what follows "####", stands in \\boxed{...}, or else the last number of the answer."""

    tolerance: float
    require_marker: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.tolerance < 1:
            raise UserError(f"reward.tolerance is {self.tolerance}; expected a small number in [0, 1)")

    def __call__(self, answer: str, prompt: Prompt) -> float:
        """Raises ValueError if the ground truth is not a number."""
        expected = final_number(prompt.ground_truth, require_marker=False)
        if expected is None:
            raise ValueError(f"ground truth {prompt.ground_truth!r} of prompt {prompt.prompt_id!r} has no number")
        got = final_number(answer, require_marker=self.require_marker)
        return float(got is not None and got.close_to(expected, self.tolerance))
