"""What the rewards read as the answer: a hundred forms, whose right scores were worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from atropos_exp.parts.reward.exact import Exact
from tests.helpers import answer_forms
from tests.helpers.answer_forms import EXPRESSIONS, MATH, NUMBERS, NUMERIC, RUN, prompt
from tests.helpers.paths import ROOT

EXACT = Exact(extract=None, last_line=False, ignore_case=False, **RUN)


@pytest.mark.parametrize(("answer", "expected", "score"), NUMBERS)
def test_a_hundred_forms_of_a_number(answer: str, expected: str, score: float) -> None:
    assert NUMERIC(answer, prompt(expected)) == score
    if "\\boxed{" in answer and "####" not in answer and "1\\,042" not in answer:
        assert MATH(answer, prompt(expected)) == score


@pytest.mark.parametrize(("answer", "expected", "score"), EXPRESSIONS)
def test_forms_of_an_expression(answer: str, expected: str, score: float) -> None:
    assert MATH(answer, prompt(expected)) == score


def test_the_page_on_rewards_is_what_they_give() -> None:
    page = (ROOT / "docs" / "rewards.md").read_text()
    assert page == answer_forms.PAGE + answer_forms.table() + "\n", (
        "python -m tests.helpers.answer_forms > docs/rewards.md"
    )


@pytest.mark.parametrize("truth", ["3\\sqrt{13}", "2x+1", "10:30", "4, 5", "2^{10}", "1,2,3", "3\\pi"])
def test_a_ground_truth_that_is_no_number_is_refused(truth: str) -> None:
    with pytest.raises(ValueError, match="is not a number; reward=math_verify reads expressions"):
        NUMERIC(truth, prompt(truth))


@pytest.mark.parametrize("reward", [EXACT, NUMERIC, MATH])
def test_a_thought_is_no_answer(reward: Any) -> None:
    assert reward("<think>41</think>42", prompt("42")) == 1
    for answer in ("<think>42", "<think>\\boxed{42}</think>", "<think>42</think>41"):
        assert reward(answer, prompt("42")) == 0
