"""Tables of questions and answers, known by the names of their columns. What is guessed is said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from atropos_exp.parts.data.raw import FORMATS, GSM8K, MATH, MATH_INSTRUCTION, RawFormat, boxed_answer, gsm8k_answer

if TYPE_CHECKING:
    import pyarrow as pa

QUESTIONS = ("question", "problem", "prompt")
ANSWERS = ("answer", "solution", "final_answer", "expected_answer", "ground_truth")
MAX_ANSWER_LENGTH = 200  # characters of an answer that is taken as it is


def recognise_table(table: pa.Table, name: str) -> tuple[RawFormat, str] | None:
    """The format of the data set `name`, and a sentence that says how it is read; None if its columns are not known."""
    import pyarrow.compute as pc

    columns = table.column_names
    raw_format = next((one for one in FORMATS if one.columns <= set(columns)), None)
    if raw_format is GSM8K:
        answers = table.column("answer")
        is_text = str(answers.type) in ("string", "large_string")
        if not is_text or not pc.any(pc.match_substring(answers, "####")).as_py():
            raw_format = None  # plain answers
    if raw_format is not None:
        return raw_format, f"its columns {', '.join(sorted(raw_format.columns))} are read as those of {raw_format.name}"
    question = next((one for one in QUESTIONS if one in columns), None)
    answer = next((one for one in ANSWERS if one in columns), None)
    if question is None or answer is None:
        return None
    pair = _pair(question, answer, name)
    rest = [one for one in columns if one not in (question, answer)]
    text = f"guessed from their names: column {question} is the prompt{_asked(question)}, column {answer} the answer"
    return pair, text + (f"; not used: {', '.join(rest)}" if rest else "")


def _pair(question: str, answer: str, name: str) -> RawFormat:
    is_math = question == "problem"

    def convert(raw: Mapping[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
        content = raw[question]
        if not isinstance(content, list):
            content = str(content or "").strip()
            if is_math and content:
                content = f"{content}\n{MATH_INSTRUCTION}"
        return content, _final(raw[answer]), {}

    return RawFormat(
        name="pairs",
        columns=frozenset({question, answer}),
        data_source=MATH.data_source if is_math else name,
        ability="math" if is_math else "",
        no_truth=f"{answer} is no final answer: expected one line of at most {MAX_ANSWER_LENGTH} characters, "
        'or a text with "#### NUMBER" or \\boxed{}',
        convert=convert,
    )


def _asked(question: str) -> str:
    return ", with the request to put the answer into \\boxed{}" if question == "problem" else ", as it stands"


def _final(answer: Any) -> Any:
    """The answer that is compared; lists and structs stay what they are."""
    if not isinstance(answer, str):
        return answer
    text = answer.strip()
    if "####" in text and (number := gsm8k_answer(text)):
        return number
    if "\\boxed" in text:
        return boxed_answer(text)
    return text if len(text) <= MAX_ANSWER_LENGTH and "\n" not in text else None
