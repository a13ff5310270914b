"""Exact numbers in text, as people and LaTeX write them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

LONGEST = 400  # digits, or powers of ten; a longer number is no answer, and its arithmetic would take for ever

_DECIMAL = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
_NUMBER = re.compile(
    rf"""(?<!\w)(?P<sign>[-+]?)[$€£]?(?P<sign_after>[-+]?)
    (?:(?P<whole>[0-9]+)\ +(?P<part>[0-9]+)/(?P<parts>[0-9]+)        # 1 1/2
      |(?P<over>{_DECIMAL})\ ?/\ ?(?P<under>{_DECIMAL})              # 1/2
      |(?P<plain>{_DECIMAL}))
    (?P<percent>\ ?%)?""",
    re.VERBOSE,
)
_FRACTION = re.compile(
    r"(?P<whole>[0-9])?\\[dtc]?frac\s*(?:\{\s*(-?[0-9.,]+)\s*\}\s*\{\s*([0-9.,]+)\s*\}|([0-9])\s*([0-9]))"
)
_NOT_A_VALUE = re.compile(r"(?:\^|_|sqrt(?:\[[^\]]{0,9}\])?)\{?$")  # exponents, indices, roots
_CHARACTERS = str.maketrans({"\u2212": "-", "\u2013": "-", "\u2044": "/", "\u00a0": " ", "\u202f": " "})


@dataclass(frozen=True, kw_only=True, slots=True)
class Number:
    """One number in a text, and whether a percent sign follows it."""

    value: Fraction  # as written: 50 for "50%"
    percent: bool

    def close_to(self, expected: Number, tolerance: float) -> bool:
        """Whether both are equal within `tolerance`, which is absolute below 1 and relative above. A percentage equals
        its value and its hundredth (50% = 50 = 0.5), unless both are percentages."""
        mine, theirs = [self.value], [expected.value]
        if self.percent != expected.percent:
            (mine if self.percent else theirs).append((self if self.percent else expected).value / 100)
        return any(abs(a - b) <= Fraction(tolerance) * max(Fraction(1), abs(b)) for a in mine for b in theirs)


def last_number(text: str) -> Number | None:
    """The last number in `text`; None if there is none, if it has no value (1/0), or if it is absurdly long."""
    text = _plain(text)
    last = None
    for match in _NUMBER.finditer(text):
        last = match if _is_value(text, match) else last
    return None if last is None else _number(last)


def first_number(text: str, *, only: bool = False) -> Number | None:
    """The first number in `text`, as in `last_number`. With `only`, None also if other numbers follow."""
    text = _plain(text)
    matches = (match for match in _NUMBER.finditer(text) if _is_value(text, match))
    first = next(matches, None)
    if first is None or (only and next(matches, None) is not None):
        return None
    return _number(first)


def _is_value(text: str, match: re.Match[str]) -> bool:
    return not _NOT_A_VALUE.search(text[max(0, match.start() - 20) : match.start()])


def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{...}; None if there is none."""
    start = text.rfind("\\boxed{")
    return None if start < 0 else _braced(text, start + len("\\boxed"))


def final_number(text: str, *, require_marker: bool) -> Number | None:
    """The number that `text` gives as its answer: the one after the last "####" or in the last \\boxed{...}, whichever
    comes later. Without either it is the last number, or None with `require_marker`. A box with several gives None."""
    hashes, boxed = text.rfind("####"), last_boxed(text)
    if hashes > text.rfind("\\boxed{"):
        return first_number(text[hashes + len("####") :].lstrip().partition("\n")[0])
    if boxed is not None:
        return first_number(boxed, only=True)
    return None if require_marker else last_number(text)


def _braced(text: str, start: int) -> str:
    """The text between the brace at `start` and its partner, or to the end of the text without one."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + 1 : place]
    return text[start + 1 :]


def _plain(text: str) -> str:
    """`text` with LaTeX's notations of numbers as plain text."""
    text = text.translate(_CHARACTERS)
    text = re.sub(r"\\[!,;: ]", "", text.replace("{,}", ",")).replace("\\$", "$").replace("\\%", "%")

    def fraction(match: re.Match[str]) -> str:
        over, under = (match[2], match[3]) if match[2] else (match[4], match[5])
        return f"{match['whole']} {over}/{under}" if match["whole"] else f"{over}/{under}"

    return _FRACTION.sub(fraction, text)


def _number(match: re.Match[str]) -> Number | None:
    try:
        if match["whole"] and int(match["part"][:LONGEST]) < int(match["parts"][:LONGEST]):
            value = _decimal(match["whole"]) + _decimal(match["part"]) / _decimal(match["parts"])
        elif match["whole"]:  # two numbers next to each other: the second one counts
            value = _decimal(match["part"]) / _decimal(match["parts"])
        elif match["over"]:
            value = _decimal(match["over"]) / _decimal(match["under"])
        else:
            value = _decimal(match["plain"])
    except (ZeroDivisionError, OverflowError):
        return None
    negative = (match["sign"] == "-") != (match["sign_after"] == "-")
    return Number(value=-value if negative else value, percent=match["percent"] is not None)


def _decimal(digits: str) -> Fraction:
    mantissa, _, exponent = digits.replace(",", "").lower().partition("e")
    if len(mantissa) > LONGEST or len(exponent) > 4 or abs(int(exponent or 0)) > LONGEST:
        raise OverflowError
    return Fraction(mantissa) * Fraction(10) ** int(exponent or 0)
