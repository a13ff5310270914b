"""Each reward against a table of answers, friendly and not."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import pytest
import yaml

from atropos_exp.config.build import build
from atropos_exp.errors import UserError
from atropos_exp.parts.reward.exact import Exact
from atropos_exp.parts.reward.math_verify import MathVerify
from atropos_exp.parts.reward.numeric import Numeric
from atropos_exp.parts.reward.reasoning_gym import ReasoningGym
from atropos_exp.parts.reward.reward_score import SAFE, RewardScore
from atropos_exp.types import Prompt
from tests.helpers.paths import CONF

RUN: dict[str, Any] = {"num_workers": 1, "timeout_seconds": 5.0}
EXACT: dict[str, Any] = {"extract": None, "last_line": False, "ignore_case": False, **RUN}
NUMERIC = Numeric(tolerance=1e-6, require_marker=False, **RUN)
MARKED = Numeric(tolerance=1e-6, require_marker=True, **RUN)
MATH = MathVerify(float_rounding=6, require_boxed=False, **RUN)


def prompt(ground_truth: str, data_source: str = "test", **extra_info: Any) -> Prompt:
    return Prompt(
        prompt_id="test/0",
        data_source=data_source,
        text="?",
        token_ids=np.zeros(1, dtype=np.int32),
        ground_truth=ground_truth,
        extra_info=extra_info,
    )


@pytest.mark.parametrize(
    ("settings", "answer", "expected", "score"),
    [
        ({}, "42", "42", 1),
        ({}, "  42\n", "42", 1),
        ({}, "4 2", "42", 0),
        ({}, "a \t b", "a b", 1),
        ({}, "４２", "42", 1),  # full-width digits
        ({}, "cafe\u0301", "caf\u00e9", 1),
        ({}, "42.", "42", 0),
        ({}, "Yes", "yes", 0),
        ({"ignore_case": True}, "STRASSE", "straße", 1),
        ({}, "", "42", 0),
        ({}, "42 or 43", "42", 0),
        ({"last_line": True}, "let me think\n42\n\n", "42", 1),
        ({"last_line": True}, "42\nno, 43", "42", 0),
        ({"last_line": True}, "\n \n", "42", 0),
        ({"extract": r"<a>(.*?)</a>"}, "<a>1</a> wait <a> 42 </a>", "42", 1),
        ({"extract": r"<a>(.*?)</a>"}, "42", "42", 0),
        ({"extract": r"[A-D]"}, "A, B or C? C", "C", 1),
        ({"extract": r"x(\d)?"}, "x", "1", 0),  # the group took no part
    ],
)
def test_exact(settings: dict[str, Any], answer: str, expected: str, score: float) -> None:
    assert Exact(**{**EXACT, **settings})(answer, prompt(expected)) == score


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("42", "42", 1),
        ("The answer is 42.", "42", 1),
        ("42.0", "42", 1),
        ("042", "42", 1),
        ("41", "42", 0),
        ("", "42", 0),
        ("forty-two", "42", 0),
        ("12, no, 42", "42", 1),
        ("42, no, 12", "42", 0),
        # thousands
        ("1,042", "1042", 1),
        ("$1,234,567.50", "1234567.5", 1),
        ("1{,}234", "1234", 1),
        ("1\\,234", "1234", 1),
        ("12,34", "34", 1),  # not a thousands separator: two numbers
        ("1,2345", "12345", 0),
        # signs
        ("-5", "-5", 1),
        ("\u22125", "-5", 1),
        ("5", "-5", 0),
        ("-$5", "-5", 1),
        ("$-5$", "-5", 1),
        ("10-5", "5", 1),  # a difference, not minus five
        ("10-5", "-5", 0),
        ("+7", "7", 1),
        # fractions
        ("1/2", "0.5", 1),
        ("1 / 2", "0.5", 1),
        ("\\frac{1}{2}", "1/2", 1),
        ("-\\dfrac{3}{4}", "-0.75", 1),
        ("\\frac12", "0.5", 1),
        ("\\frac{-1}{2}", "-1/2", 1),
        ("1 1/2", "1.5", 1),
        ("2\\frac{3}{4}", "2.75", 1),
        ("1/3", "0.3333333", 1),
        ("0.33", "1/3", 0),
        ("1/0", "0", 0),
        ("0/5", "0", 1),
        # percent
        ("50%", "50%", 1),
        ("50%", "0.5", 1),
        ("50\\%", "50", 1),
        ("0.5", "50%", 1),
        ("0.5%", "50%", 0),
        ("5%", "50", 0),
        # decimals and exponents
        (".5", "0.5", 1),
        ("1e3", "1000", 1),
        ("1.5E-3", "0.0015", 1),
        ("0.1000001", "0.1", 1),
        ("0.10001", "0.1", 0),
        ("1000000.5", "1000000", 1),  # relative tolerance
        # units, markup
        ("**42**", "42", 1),
        ("$42$", "42", 1),
        ("42 apples", "42", 1),
        ("42kg", "42", 1),
        ("42 cm^2", "42", 1),  # an exponent is no answer
        ("42 cm²", "42", 1),
        ("H2O", "2", 0),  # nor part of a word
        ("\\sqrt{2}", "2", 0),
        # markers
        ("3 + 4 #### 7", "7", 1),
        ("#### 7\nSo 8 apples", "7", 1),
        ("#### 7 #### 8", "8", 1),
        ("####7", "7", 1),
        ("#### none, so 7?", "7", 1),
        ("7 ####", "7", 0),
        ("\\boxed{7}", "7", 1),
        ("so \\boxed{x = 7}, not 8", "7", 1),
        ("\\boxed{7} and \\boxed{8}", "8", 1),
        ("\\boxed{\\frac{1}{2}}", "0.5", 1),
        ("\\boxed{7, 8}", "8", 0),  # hedging
        ("\\boxed{}", "7", 0),
        ("7 \\boxed{", "7", 0),
        ("\\boxed{7", "7", 0),  # cut off: it may have gone on as 72
        ("#### 7 or \\boxed{8}", "8", 1),
        ("\\boxed{8} #### 7", "7", 1),
        # the ground truth may be a whole solution
        ("72", "48/2 = 24 and 48+24 = 72\n#### 72", 1),
        # hostile
        ("nan", "42", 0),
        ("inf", "42", 0),
        ("9" * 5000, "42", 0),
        ("1e999999999", "42", 0),
        ("1e-999999999", "0", 0),
        ("1/1e400", "0", 1),
        ("٤٢", "42", 0),  # other digits
        ("4\u200b2", "42", 0),
    ],
)
def test_numeric(answer: str, expected: str, score: float) -> None:
    assert NUMERIC(answer, prompt(expected)) == score


@pytest.mark.parametrize(("answer", "score"), [("42", 0), ("#### 42", 1), ("\\boxed{42}", 1), ("42 ####", 0)])
def test_numeric_may_require_a_marker(answer: str, score: float) -> None:
    assert MARKED(answer, prompt("42")) == score


@pytest.mark.parametrize(
    "answer",
    ["1," * 50_000, "1 " * 50_000, "-" * 100_000, "\\frac{" * 20_000, "\\boxed{" * 20_000, "1/" * 50_000, "9" * 200_000,
     "1e" * 50_000, "$" * 100_000, "####" * 30_000, "1,234" * 20_000, "\\boxed{5 " + "a" * 50_000 + "!}",
     "#### 5 " + "ab." * 30_000 + "?", "\\text{" * 20_000],
    ids=lambda answer: answer[:6],
)  # fmt: skip
def test_numeric_takes_linear_time(answer: str) -> None:
    start = time.process_time()
    NUMERIC(answer, prompt("42"))
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("\\boxed{\\frac{1}{2}}", "0.5", 1),
        ("so it is $\\frac{2}{4}$", "\\frac{1}{2}", 1),
        ("\\boxed{-q+p}", "p - q", 1),
        ("\\boxed{2\\sqrt2}", "\\sqrt{8}", 1),
        ("\\boxed{[-2, 7]}", "x \\in [-2,7]", 1),
        ("\\boxed{\\text{Evelyn}}", "\\text{Evelyn}", 1),
        ("\\boxed{50\\%}", "50\\%", 1),
        ("\\boxed{(2, 1)}", "(1,2)", 0),
        ("\\boxed{3} or \\boxed{4}", "3", 0),
        ("\\boxed{6, 7}", "6", 0),
        ("no idea", "42", 0),
        ("", "42", 0),
        ("\\boxed{\\frac{1}{}", "42", 0),
        ("\\boxed{__import__('os').abort()}", "42", 0),
    ],
)
def test_math_verify(answer: str, expected: str, score: float) -> None:
    assert MATH(answer, prompt(expected)) == score


def test_math_verify_may_require_a_box() -> None:
    strict = MathVerify(float_rounding=6, require_boxed=True, **RUN)
    assert strict("42", prompt("42")) == 0.0 and strict("\\boxed{42}", prompt("42")) == 1.0


@pytest.mark.parametrize("reward", [NUMERIC, MATH, Exact(**EXACT)])
def test_a_prompt_without_a_usable_ground_truth_is_an_error_not_a_zero(reward: Any) -> None:
    with pytest.raises(ValueError, match="ground truth"):
        reward("42", prompt(""))


@pytest.mark.parametrize(
    ("source", "answer", "expected", "score"),
    [
        ("openai/gsm8k", "so #### 1,042", "1042", 1),
        ("openai/gsm8k", "so 1042", "1042", 0),
        ("lighteval/MATH", "\\boxed{\\frac12}", "\\frac{1}{2}", 1),
        ("HuggingFaceH4/MATH-500", "\\boxed{3}", "2", 0),
        ("math_dapo", "Answer: 34", "34", 1),
        ("aime2024", "Answer: 33", "34", -1),
    ],
)
def test_reward_score(source: str, answer: str, expected: str, score: float) -> None:
    assert RewardScore(**RUN)(answer, prompt(expected, source)) == score


@pytest.mark.parametrize(
    "source", ["numina_cn_k12", "numina_olympiads", "codecontests", "apps", "codeforces", "taco", "my_data", ""]
)
def test_reward_score_refuses_what_verl_would_evaluate_or_does_not_know(source: str) -> None:
    with pytest.raises(UserError, match=f"data_source '{source}'"):
        RewardScore(**RUN)("1", prompt("1", source))


def test_reward_score_never_loads_an_evaluating_scorer() -> None:
    RewardScore(**RUN).warm_up()
    for source in (*SAFE, "aime2025"):
        RewardScore(**RUN)("#### 1", prompt("1", source))
    loaded = {name.rpartition(".")[2] for name in sys.modules if name.startswith("verl.utils.reward_score.")}
    assert loaded == {"gsm8k", "math_reward", "math_dapo"}


def reasoning_prompt(task: str) -> tuple[Prompt, str]:
    import reasoning_gym

    entry = reasoning_gym.create_dataset(task, size=1, seed=7)[0]
    return prompt(str(entry["answer"]), f"reasoning_gym/{task}", task=task, entry=json.dumps(entry)), entry["answer"]


@pytest.mark.parametrize("task", ["chain_sum", "spell_backward", "letter_counting", "syllogism", "number_sequence"])
def test_reasoning_gym(task: str) -> None:
    reward = ReasoningGym(require_tag=False, **RUN)
    one, gold = reasoning_prompt(task)
    assert reward(f"I think <answer>wrong</answer>... <answer>\n{gold}\n</answer> done", one) == 1.0
    assert reward(gold, one) == 1.0
    assert reward(f"<answer>{gold} wrong</answer>", one) < 1.0
    assert reward("", one) < 0.1
    assert ReasoningGym(require_tag=True, **RUN)(gold, one) == 0.0


def test_reasoning_gym_needs_its_own_data() -> None:
    reward = ReasoningGym(require_tag=False, **RUN)
    with pytest.raises(UserError, match="extra_info keys"):
        reward("1", prompt("1"))
    with pytest.raises(UserError, match="no_such_task"):
        reward("1", prompt("1", task="no_such_task", entry="{}"))


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: Exact(**{**EXACT, "extract": "("}), "extract"),
        (lambda: Exact(**{**EXACT, "num_workers": 0}), "num_workers"),
        (lambda: Exact(**{**EXACT, "timeout_seconds": float("nan")}), "timeout_seconds"),
        (lambda: Numeric(tolerance=-1.0, require_marker=False, **RUN), "tolerance"),
        (lambda: MathVerify(float_rounding=-1, require_boxed=False, **RUN), "float_rounding"),
    ],
)
def test_settings_out_of_range_are_named(make: Any, key: str) -> None:
    with pytest.raises(UserError, match=f"^{key}: got .*, expected"):
        make()


def test_shipped_yaml_and_fields_agree() -> None:
    paths = sorted((CONF / "reward").glob("*.yaml"))
    assert [path.stem for path in paths] == ["exact", "math_verify", "numeric", "reasoning_gym", "reward_score"]
    for path in paths:
        node = yaml.safe_load(path.read_text())
        assert set(build(node, "reward").model_fields_set) == set(node) - {"_target_"}, path
