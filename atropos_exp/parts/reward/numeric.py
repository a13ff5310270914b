"""`reward=numeric`: 1 if the answer's number equals the ground truth's, else 0."""

from typing import Annotated

from pydantic import Field

from atropos_exp.parts.reward.base import PooledReward
from atropos_exp.parts.reward.numbers import after_thoughts, final_number, whole_number
from atropos_exp.types import Prompt


class Numeric(PooledReward):
    """Compares what follows "####", stands in \\boxed{...}, or else the last number of the answer."""

    tolerance: Annotated[float, Field(ge=0, lt=1)]
    require_marker: bool

    def __call__(self, answer: str, prompt: Prompt) -> float:
        """Raises ValueError if the ground truth is not a number, nor a solution that marks one."""
        expected = whole_number(prompt.ground_truth) or final_number(prompt.ground_truth, require_marker=True)
        if expected is None:
            raise ValueError(
                f"ground truth {prompt.ground_truth!r} of prompt {prompt.prompt_id!r} is not a number; "
                "reward=math_verify reads expressions, reward=exact compares text"
            )
        got = final_number(after_thoughts(answer), require_marker=self.require_marker)
        return float(got is not None and got.close_to(expected, self.tolerance))
