"""A hundred forms of an answer, what each reward makes of them, and what two scorers of others do.

    python -m tests.helpers.answer_forms > docs/rewards.md

A test holds the rewards to the column "right", and the page to this file.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from atropos_exp.parts.reward.math_verify import MathVerify
from atropos_exp.parts.reward.numeric import Numeric
from atropos_exp.types import Prompt

RUN: dict[str, Any] = {"num_workers": 1, "timeout_seconds": 5.0}
NUMERIC = Numeric(tolerance=1e-6, require_marker=False, **RUN)
MATH = MathVerify(float_rounding=6, require_boxed=False, **RUN)
# The answer, the ground truth, and whether it is right.
NUMBERS: list[tuple[str, str, int]] = [
    ("42", "42", 1),
    ("The answer is 42.", "42", 1),
    ("The answer is 42!", "42", 1),
    ("42.0", "42", 1),
    ("41", "42", 0),
    ("forty-two", "42", 0),
    ("", "42", 0),
    ("12, no, 42", "42", 1),
    ("42, no, 12", "42", 0),
    ("**42**", "42", 1),
    ("$42$", "42", 1),
    ("42 apples", "42", 1),
    ("42kg", "42", 1),
    ("H2O", "2", 0),
    # marks of an answer
    ("6 * 7 = 42\n#### 42", "42", 1),
    ("####42", "42", 1),
    ("#### $42", "42", 1),
    ("#### **42**", "42", 1),
    ("#### x = 42", "42", 1),
    ("#### 42 apples", "42", 1),
    ("#### 42\nSo 43 is wrong", "42", 1),
    ("#### 41 #### 42", "42", 1),
    ("42 ####", "42", 0),  # cut off
    ("\\boxed{42}", "42", 1),
    ("\\boxed 42", "42", 1),
    ("\\fbox{42}", "42", 1),
    ("\\boxed{41}, no: \\boxed{42}", "42", 1),
    ("\\boxed{42}. In a \\boxed{} as asked.", "42", 1),
    ("\\boxed{42", "42", 0),  # cut off: it may have become 421
    ("so 42, \\boxed{", "42", 0),
    ("\\boxed{x = 42}", "42", 1),
    ("\\boxed{6 \\times 7 = 42}", "42", 1),
    ("\\boxed{42\\text{ cm}}", "42", 1),
    ("\\boxed{42 \\mathrm{cm}^2}", "42", 1),
    ("\\boxed{\\text{42}}", "42", 1),
    ("\\boxed{42, 43}", "43", 0),  # hedging
    ("\\boxed{42 or 43}", "43", 0),
    ("#### 41 or \\boxed{42}", "42", 1),
    ("\\boxed{41} #### 42", "42", 1),
    # headings of Markdown
    ("#### Step 1: count\n5 rows of 4.\n\n#### Step 2: multiply\n5*4 = 20\n\nThe answer is 20.", "20", 1),
    ("#### Step 1\n5*4\n\n#### Final Answer\n20", "20", 1),
    ("5 rows of 4\n\n#### Answer:\n**20**", "20", 1),
    ("#### Step 2: multiply\nThe answer is 20.", "2", 0),
    ("#### 1. Count\nThe answer is 20.", "20", 1),
    ("#### 1. Count\nThe answer is 20.", "1", 0),
    # thoughts
    ("<think>It is 41.</think>The answer is 42.", "42", 1),
    ("<think>It is \\boxed{42}.</think>I do not know.", "42", 0),
    ("<think>perhaps \\boxed{42}, no, let me", "42", 0),
    ("It is 41.</think>\\boxed{42}", "42", 1),
    # parts of an expression
    ("\\boxed{3\\sqrt{2}}", "3", 0),
    ("\\boxed{3\\pi}", "3", 0),
    ("\\boxed{2^{10}}", "2", 0),
    ("\\boxed{3x}", "3", 0),
    ("\\boxed{5!}", "5", 0),
    ("so x = 3\\sqrt{2}", "3", 0),
    ("\\sqrt{2}", "2", 0),
    # thousands and powers of ten
    ("1,042", "1042", 1),
    ("\\boxed{1{,}042}", "1042", 1),
    ("\\boxed{1\\,042}", "1042", 1),
    ("The total is 10 000", "10000", 1),
    ("The total is 10\u202f000", "10000", 1),
    ("$1,234,567.50", "1234567.5", 1),
    ("1,2345", "12345", 0),
    ("1e3", "1000", 1),
    ("\\boxed{1.5 \\times 10^3}", "1500", 1),
    ("The answer is $2 \\cdot 10^{6}$", "2000000", 1),
    # signs
    ("\\boxed{-5}", "-5", 1),
    ("\u22125", "-5", 1),
    ("-$5", "-5", 1),
    ("5", "-5", 0),
    ("10-5", "-5", 0),
    # fractions and decimals
    ("\\boxed{\\frac{1}{2}}", "0.5", 1),
    ("\\boxed{\\frac12}", "1/2", 1),
    ("-\\dfrac{3}{4}", "-0.75", 1),
    ("\\boxed{0.5}", "\\frac{1}{2}", 1),
    ("2\\frac{3}{4}", "2.75", 1),
    (".5", "0.5", 1),
    ("\\boxed{0.33}", "1/3", 0),
    ("\\boxed{1/0}", "0", 0),
    # percentages
    ("\\boxed{25\\%}", "25\\%", 1),
    ("\\boxed{25\\%}", "25", 1),
    ("\\boxed{25}", "25\\%", 1),
    ("\\boxed{0.25}", "25\\%", 1),
    ("\\boxed{\\frac{1}{4}}", "25\\%", 1),
    ("\\boxed{12.50\\%}", "12.5\\%", 1),
    ("\\boxed{30\\%}", "25\\%", 0),
    ("\\boxed{0.5\\%}", "50\\%", 0),
    ("The answer is 25%.", "0.25", 1),
    # hostile
    ("nan", "42", 0),
    ("1e999999999", "42", 0),
    ("9" * 30, "42", 0),
]
EXPRESSIONS: list[tuple[str, str, int]] = [
    ("\\boxed{3\\sqrt2}", "3\\sqrt{2}", 1),
    ("\\boxed{2\\sqrt2}", "\\sqrt{8}", 1),
    ("\\boxed{-q+p}", "p - q", 1),
    ("\\boxed{[-2, 7]}", "x \\in [-2,7]", 1),
    ("\\boxed{(2, 1)}", "(1,2)", 0),
    ("\\boxed{\\{2, 1\\}}", "\\{1,2\\}", 1),
    ("\\boxed{\\text{Evelyn}}", "\\text{Evelyn}", 1),
    ("\\boxed{2^{10}}", "1024", 1),
    ("\\boxed{6, 7}", "6", 0),
    ("\\boxed{3} or \\boxed{4}", "3", 0),
]


def prompt(truth: str) -> Prompt:
    return Prompt(prompt_id="form", data_source="form", text="?", token_ids=np.zeros(1, np.int32), ground_truth=truth)


def of_math_verify(answer: str, truth: str) -> float:
    """math-verify by itself, as its README has it."""
    from math_verify import parse, verify

    return float(
        verify(
            parse(f"\\boxed{{{truth}}}", parsing_timeout=None),
            parse(answer, parsing_timeout=None),
            timeout_seconds=None,
        )
    )


def of_verl(answer: str, truth: str) -> float:
    """verl's scorer for GSM8K, which takes the last number."""
    from verl.utils.reward_score.gsm8k import compute_score

    return float(compute_score(answer, truth, method="flexible"))


def ours(reward: Any, answer: str, truth: str) -> str:
    try:
        return f"{reward(answer, prompt(truth)):g}"
    except ValueError:
        return "refused"


def table() -> str:
    """The rows of the page."""
    MATH.warm_up()
    rows = []
    for answer, truth, right in NUMBERS + EXPRESSIONS:
        shown = answer.replace("\n", " ⏎ ").replace("|", "\\|").replace("\u202f", "(thin space)")
        scores = (ours(NUMERIC, answer, truth), ours(MATH, answer, truth))
        theirs = (f"{of_math_verify(answer, truth):g}", f"{of_verl(answer, truth):g}")
        rows.append(f"| {' | '.join((f'`{shown or chr(32)}`', f'`{truth}`', str(right), *scores, *theirs))} |")
    return "\n".join(rows)


PAGE = """# Rewards

| `reward=` | scores | for |
| --- | --- | --- |
| `numeric` | 1 if the number given as the answer equals the ground truth's | word problems whose answer is one number |
| `math_verify` | 1 if the expression is mathematically equal | mathematics: fractions, roots, sets, intervals |
| `exact` | 1 if the text, or what `reward.extract` finds in it, is the same | multiple choice, formats of your own |
| `reasoning_gym` | what the task's own verifier gives | prompts of `data_prep.reasoning_gym` |
| `reward_score` | what verl's scorer for the data set gives, unchanged | comparison with published verl runs |

What holds for all but `reward_score`, which is verl's own:

- What stands between `<think>` and `</think>` is no answer, and neither is a thought that never ends.
- The last answer counts. `numeric` and `math_verify` take the last box (`\\boxed{...}` or `\\fbox{...}`) that is not
  empty; `numeric` also what follows `####` (not a heading of Markdown), and without either the last number
  (`reward.require_marker=true`, `reward.require_boxed=true`: nothing then).
- An answer that is cut off within its box scores 0: what is missing may change it. Whether an answer without a box was
  cut off cannot be seen in its text; `rollout.mask_truncated=true` takes the cut ones out of the update.
- A part of an expression is not the answer: 3√2 is not 3.
- A percentage equals its value and its hundredth (50 % = 50 = 0.5), unless both are percentages.
- A ground truth that a reward cannot read is an error, and no 0.

## A hundred answers

Written by `python -m tests.helpers.answer_forms`; a test holds both rewards to the third column: `numeric` where the
ground truth is a number, `math_verify` where the answer has a box. Without one it reads what math-verify reads, which
misses some forms, and takes 3 from "3\\sqrt{2}" where no dollar signs are. The last two columns are scorers of others,
on the same text: math-verify by itself, with the antlr that Hydra needs, and verl's for GSM8K in its flexible form.

| answer | ground truth | right | `numeric` | `math_verify` | math-verify | verl's gsm8k |
| --- | --- | --- | --- | --- | --- | --- |
"""

if __name__ == "__main__":
    print(PAGE + table())
