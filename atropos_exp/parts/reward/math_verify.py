"""`reward=math_verify`: 1 if the answer is mathematically equal to the ground truth (library math-verify), else 0."""

import logging
from typing import Any

from atropos_exp.config.settings import Index
from atropos_exp.parts.reward.base import PooledReward
from atropos_exp.parts.reward.numbers import last_boxed
from atropos_exp.types import Prompt


class MathVerify(PooledReward):
    """Reads LaTeX, preferring \\boxed{...}, and plain expressions. What cannot be read scores 0."""

    float_rounding: Index  # decimals
    require_boxed: bool

    def warm_up(self) -> None:
        import math_verify

        math_verify.verify(self._parse("\\boxed{1}"), self._parse("\\frac{2}{2}"), timeout_seconds=None)

    def __call__(self, answer: str, prompt: Prompt) -> float:
        """Raises ValueError if the ground truth cannot be read."""
        import math_verify

        boxed = last_boxed(answer)
        if boxed is None and self.require_boxed:
            return 0.0
        if boxed is not None and prompt.ground_truth and _letters(boxed) == _letters(prompt.ground_truth):
            return 1.0
        gold = self._parse(f"\\boxed{{{prompt.ground_truth}}}")
        if not gold:
            raise ValueError(f"ground truth {prompt.ground_truth!r} of prompt {prompt.prompt_id!r} cannot be read")
        equal = math_verify.verify(
            gold, self._parse(answer), float_rounding=self.float_rounding, timeout_seconds=None, raise_on_error=False
        )
        return float(equal)

    def _parse(self, text: str) -> list[Any]:
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

        # the pool limits the time, so the library's own limit (a signal) is off, which it would warn about
        logging.getLogger("math_verify").setLevel(logging.ERROR)
        config = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
        found: list[Any] = parse(text, extraction_config=config, parsing_timeout=None)
        return found


def _letters(text: str) -> str:
    """`text` without white space, for a first, cheap comparison."""
    return "".join(text.split())
