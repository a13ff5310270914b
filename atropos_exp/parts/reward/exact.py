"""`reward=exact`: 1 if the answer is the ground truth letter by letter, else 0."""

import re
import unicodedata
from typing import Annotated

from pydantic import AfterValidator

from atropos_exp.errors import UserError
from atropos_exp.parts.reward.base import PooledReward
from atropos_exp.parts.reward.numbers import after_thoughts
from atropos_exp.types import Prompt


def _compiles(pattern: str | None) -> str | None:
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise UserError(f"got {pattern!r}, expected a regular expression: {error}") from error
    return pattern


class Exact(PooledReward):
    """Equality up to Unicode form (NFKC) and white space, of the whole answer or a part of it."""

    extract: Annotated[str | None, AfterValidator(_compiles)]
    last_line: bool
    ignore_case: bool

    def __call__(self, answer: str, prompt: Prompt) -> float:
        """Raises ValueError if the prompt has no ground truth."""
        expected = self._normalise(prompt.ground_truth)
        if not expected:
            raise ValueError(f"prompt {prompt.prompt_id!r} has no ground truth")
        part = self._part(after_thoughts(answer))
        return float(part is not None and self._normalise(part) == expected)

    def _part(self, answer: str) -> str | None:
        """What is compared: the last match of `extract` (its first group, if any), or the last line with text."""
        if self.extract is not None:
            matches = list(re.finditer(self.extract, answer))
            if not matches:
                return None
            return matches[-1][1] if matches[-1].re.groups else matches[-1][0]
        if self.last_line:
            return next((line for line in reversed(answer.splitlines()) if line.strip()), "")
        return answer

    def _normalise(self, text: str) -> str:
        text = " ".join(unicodedata.normalize("NFKC", text).split())
        return text.casefold() if self.ignore_case else text
