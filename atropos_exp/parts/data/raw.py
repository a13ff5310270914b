"""Converts rows of well-known raw data sets, recognised by their columns, into verl's schema.

Used by `data.hf_datasets` on the fly and by the builders of `data_prep`, so that both give the same prompts.
Tables of other columns: `pairs.py`. A row without a usable answer gets the ground_truth None, and the schema check then
quarantines it.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

VerlRow = dict[str, Any]  # see schema.py

GSM8K_INSTRUCTION = 'Reason step by step, then write the final answer after "####".'
MATH_INSTRUCTION = "Reason step by step, then write the final answer within \\boxed{}."
HELLASWAG_INSTRUCTION = "Which ending continues the text best? Answer with its letter only."
LETTERS = "ABCD"


@dataclass(frozen=True, kw_only=True, slots=True)
class RawFormat:
    """A raw format, and how its rows are converted."""

    name: str
    columns: frozenset[str]  # a table that has all of them is in this format
    data_source: str  # the name that verl's reward_score knows, where it knows one
    ability: str
    no_truth: str  # why a row has no ground truth
    convert: Callable[[Mapping[str, Any]], tuple[Any, Any, dict[str, Any]]]  # -> question, ground truth, extra_info


def verl_row(raw: Mapping[str, Any], raw_format: RawFormat, *, split: str, index: int) -> VerlRow:
    """`raw` as a row in verl's schema. `index` is its place in the raw split."""
    question, ground_truth, extra = raw_format.convert(raw)
    return make_row(
        data_source=raw_format.data_source, content=question, ability=raw_format.ability,
        ground_truth=ground_truth, split=split, index=index, **extra,
    )  # fmt: skip


def make_row(
    *, data_source: str, content: Any, ability: str, ground_truth: Any, split: str, index: int, **extra: Any
) -> VerlRow:
    """A row in verl's schema, with a rule-based reward. `content` is the user's only message, or a list of messages."""
    return {
        "data_source": data_source,
        "prompt": content if isinstance(content, list) else [{"role": "user", "content": content}],
        "ability": ability,
        "reward_model": {"style": "rule", "ground_truth": ground_truth},
        "extra_info": {"split": split, "index": index, **extra},
    }


def recognise(columns: Collection[str]) -> RawFormat | None:
    """The format all of whose columns are present, or None."""
    return next((one for one in FORMATS if one.columns <= set(columns)), None)


def gsm8k_answer(solution: str) -> str | None:
    """What stands after the last "####", to the end of its line; None if nothing does. A number has no currency and no
    thousands separators: "#### -$1,234.50" gives "-1234.50", "#### x = 3/4" gives "3/4"."""
    _, marker, rest = solution.rpartition("####")
    answer = rest.strip().partition("\n")[0].strip().rstrip(".")
    if not marker or not answer:
        return None
    answer = re.sub(r"^[A-Za-z]\w*\s*=\s*", "", answer)
    if re.fullmatch(r"-?[0-9.]+[eE]\+?[0-9]{1,2}", answer):
        return f"{Decimal(answer):f}"
    number = re.fullmatch(r"(-?)\s*\$?\s*(-?)([0-9]{1,3}(?:[, ][0-9]{3})+|[0-9]+)?(\.[0-9]+)?\s*\$?", answer)
    if number is None or not (number[3] or number[4]):
        return answer
    return f"{number[1] or number[2]}{re.sub('[, ]', '', number[3] or '0')}{number[4] or ''}"


def boxed_answer(solution: str) -> str | None:
    r"""The content of the last \boxed{...} or \fbox{...}, or the word after \boxed; None if there is none."""
    start = max(solution.rfind("\\boxed"), solution.rfind("\\fbox"))
    if start < 0:
        return None
    rest = solution[start:].split("boxed" if solution.startswith("\\boxed", start) else "fbox", 1)[1]
    if not rest.lstrip().startswith("{"):
        word = rest.strip().split("$")[0].split()  # "\boxed 3$": the braces are optional in TeX
        return word[0] if word else None
    rest = rest.lstrip()
    depth = 0
    for position, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[1:position].strip() or None
    return None  # an unclosed brace


def _gsm8k(raw: Mapping[str, Any]) -> tuple[str, str | None, dict[str, Any]]:
    question, solution = str(raw["question"] or "").strip(), str(raw["answer"] or "")
    content = f"{question}\n{GSM8K_INSTRUCTION}" if question else ""
    return content, gsm8k_answer(solution), {"question": question, "answer": solution}


def _math(raw: Mapping[str, Any]) -> tuple[str, str | None, dict[str, Any]]:
    problem, solution = str(raw["problem"] or "").strip(), str(raw["solution"] or "")
    content = f"{problem}\n{MATH_INSTRUCTION}" if problem else ""
    subject = str(raw.get("type") or raw.get("subject") or "")
    extra = {"solution": solution, "level": str(raw.get("level") or ""), "subject": subject}
    final = raw.get("answer")
    return content, boxed_answer(solution) or (final if final is None else str(final).strip()), extra


def _hellaswag(raw: Mapping[str, Any]) -> tuple[str, str | None, dict[str, Any]]:
    endings = [_clean(ending) for ending in raw["endings"] or []]
    context = _clean(f"{raw['ctx_a'] or ''} {(raw['ctx_b'] or '').capitalize()}")
    label = str(raw["label"] if raw["label"] is not None else "").strip()
    usable = context and len(endings) == len(LETTERS) and label in ("0", "1", "2", "3")
    choices = "\n".join(f"{letter}. {ending}" for letter, ending in zip(LETTERS, endings, strict=False))
    content = f"{_clean(raw['activity_label'] or '')}: {context}\n\n{choices}\n\n{HELLASWAG_INSTRUCTION}"
    extra = {"label": label, "source_id": str(raw.get("source_id") or ""), "endings": endings}
    return (content if context else ""), (LETTERS[int(label)] if usable else None), extra


def _clean(text: str) -> str:
    """The text without WikiHow's marks: "[title]" ends a sentence, "[step]" and "[substeps]" mean nothing."""
    text = re.sub(r"\[.*?\]", "", text.replace(" [title]", ". "))
    return re.sub(r"\s+", " ", text).strip()


GSM8K = RawFormat(
    name="gsm8k",
    columns=frozenset({"question", "answer"}),
    data_source="openai/gsm8k",
    ability="math",
    no_truth='answer has no "#### NUMBER"',
    convert=_gsm8k,
)
MATH = RawFormat(
    name="math",
    columns=frozenset({"problem", "solution"}),
    data_source="DigitalLearningGmbH/MATH-lighteval",
    ability="math",
    no_truth="solution has no \\boxed{}, and there is no answer",
    convert=_math,
)
HELLASWAG = RawFormat(
    name="hellaswag",
    columns=frozenset({"activity_label", "ctx_a", "ctx_b", "endings", "label"}),
    data_source="Rowan/hellaswag",
    ability="commonsense",
    no_truth="it has not four endings and a label of 0 to 3",
    convert=_hellaswag,
)
FORMATS = (HELLASWAG, MATH, GSM8K)
