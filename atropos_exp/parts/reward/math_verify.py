"""`reward=math_verify`: 1 if the answer is mathematically equal to the ground truth (library math-verify), else 0."""

import logging
import re
from typing import Annotated, Any

from pydantic import Field

from atropos_exp.parts.reward.base import PooledReward
from atropos_exp.parts.reward.numbers import after_thoughts, last_box, last_boxed, last_number
from atropos_exp.types import Prompt

_EMPTY_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{\s*\}")
_PERCENT = re.compile(r"%[\s$.]*$")
_PERCENT_SIGN = re.compile(r"\\?%")


class MathVerify(PooledReward):
    """Reads LaTeX, preferring \\boxed{...}, and plain expressions. What cannot be read scores 0. A percentage equals
    its value and its hundredth, unless both are percentages."""

    float_rounding: Annotated[int, Field(ge=0, le=100)]  # decimals
    require_boxed: bool

    def warm_up(self) -> None:
        import math_verify

        math_verify.verify(self._parse("\\boxed{1}")[0], self._parse("\\frac{2}{2}")[0], timeout_seconds=None)

    def __call__(self, answer: str, prompt: Prompt) -> float:
        """Raises ValueError if the ground truth cannot be read."""
        answer = _EMPTY_BOX.sub("", after_thoughts(answer)).replace("\\fbox", "\\boxed")
        box = last_box(answer)
        if (box is None and self.require_boxed) or (box is not None and box[1] is None):  # cut off
            return 0.0
        boxed = None if box is None else box[1]
        if boxed is not None and prompt.ground_truth and _letters(boxed) == _letters(prompt.ground_truth):
            return 1.0
        gold, gold_percent = self._parse(f"\\boxed{{{prompt.ground_truth}}}")
        if not gold:
            raise ValueError(f"ground truth {prompt.ground_truth!r} of prompt {prompt.prompt_id!r} cannot be read")
        got, got_percent = self._parse(answer)
        if self._equal(gold, got):
            return 1.0
        if gold_percent == got_percent:
            return 0.0
        return float(self._equal(_hundredth(gold), got) if gold_percent else self._equal(gold, _hundredth(got)))

    def _equal(self, gold: list[Any], got: list[Any]) -> bool:
        import math_verify

        return bool(
            math_verify.verify(
                gold, got, float_rounding=self.float_rounding, timeout_seconds=None, raise_on_error=False
            )
        )

    def _parse(self, text: str) -> tuple[list[Any], bool]:
        """What math-verify reads, and whether it is a percentage. Signs of percent are taken away: latex2sympy cannot
        read them with the antlr that Hydra needs."""
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

        # the pool limits the time, so the library's own limit (a signal) is off, which it would warn about
        logging.getLogger("math_verify").setLevel(logging.ERROR)
        config = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
        boxed = last_boxed(text)
        number = last_number(text)
        percent = _PERCENT.search(boxed) is not None if boxed else number is not None and number.percent
        found: list[Any] = parse(_PERCENT_SIGN.sub("", text), extraction_config=config, parsing_timeout=None)
        return found, percent


def _hundredth(found: list[Any]) -> list[Any]:
    """A percentage as the number that it is; math-verify gives it in sympy and as text."""
    return [one / 100 for one in found if not isinstance(one, str)]


def _letters(text: str) -> str:
    """`text` without white space, for a first, cheap comparison."""
    return "".join(text.split())
