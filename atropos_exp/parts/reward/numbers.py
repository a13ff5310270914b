"""Exact numbers in text, as people and LaTeX write them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

LONGEST = 400  # digits, or powers of ten; a longer number is no answer, and its arithmetic would take for ever

_DECIMAL = (
    r"(?:(?:[0-9]{1,3}(?:(?:,[0-9]{3})+|(?:\ [0-9]{3})+)(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
)
_NUMBER = re.compile(
    rf"""(?<![\w^])(?P<sign>[-+]?)[$€£]?(?P<sign_after>[-+]?)
    (?:(?P<whole>[0-9]+)\ +(?P<part>[0-9]+)/(?P<parts>[0-9]+)        # 1 1/2
      |(?P<over>{_DECIMAL})\ ?/\ ?(?P<under>{_DECIMAL})              # 1/2
      |(?P<plain>{_DECIMAL})(?:\ ?(?:\\times|\\cdot|[*×·])\ ?10\^\{{?(?P<power>[-+]?[0-9]+)\}}?)?)  # 2 * 10^6
    (?P<percent>\ ?%)?""",
    re.VERBOSE,
)
_FRACTION = re.compile(
    r"(?P<whole>[0-9])?\\[dtc]?frac\s*(?:\{\s*(-?[0-9.,]+)\s*\}\s*\{\s*([0-9.,]+)\s*\}|([0-9])\s*([0-9]))"
)
_NOT_A_VALUE = re.compile(r"(?:\^|_|sqrt(?:\[[^\]]{0,9}\])?)\{?$")  # before it: exponents, indices, roots
_A_FACTOR = re.compile(r"\s?(?:\\(?:sqrt|pi|[dtc]?frac)|√|π|\^|[A-Za-z](?![A-Za-z]))")  # after it: a part of a term
_UNIT = re.compile(r"(?:[\s./]|[A-Za-z°][A-Za-z°.]++(?:\^\{?[0-9]\}?|[²³])?)*+")  # words
_CHARACTERS = str.maketrans({"\u2212": "-", "\u2013": "-", "\u2044": "/", "\u00a0": " ", "\u202f": " ", "\u2009": " "})
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_STEP = re.compile(r"[0-9]+[.)]\s+\S")  # of a numbered heading


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


def after_thoughts(text: str) -> str:
    """What a model says once it has thought: what follows the last </think>. Inside a thought nothing is said."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def final_number(text: str, *, require_marker: bool) -> Number | None:
    """The number that `text` gives as its answer: after the last "####" or in the last box (\\boxed{...}, \\fbox{...}),
    whichever comes later. Without either it is the last number, or None with `require_marker`. None where it cannot be
    told: a box that was cut off, or that holds anything but one number."""
    marked, box = _after_marker(text), last_box(text)
    if marked is not None and (box is None or marked[0] > box[0]):
        return whole_number(marked[1]) or first_number(marked[1])
    if box is not None:
        return None if box[1] is None else whole_number(box[1])
    if require_marker or text.rstrip().endswith("####"):  # cut off
        return None
    return last_number(text)


def whole_number(text: str) -> Number | None:
    """The number that `text` is, up to a name before it (x = 7), a unit after it, and markup. After an equation it is
    the last side. None for anything more: 3\\sqrt{2} is not 3, and 7, 8 is not 8."""
    text = re.split(r"=|\\approx|≈", _plain(_TEXT.sub(r" \1", text)))[-1].strip(" \t\n$*()[]")
    match = _NUMBER.match(text)
    if match is None:
        words = re.match(r"(?:[A-Za-z]{2,}[:\s]+)+", text)
        match = _NUMBER.match(text, words.end()) if words else None
    if match is None or not _is_value(text, match) or not _UNIT.fullmatch(text, match.end()):
        return None
    return _number(match)


def last_number(text: str) -> Number | None:
    """The last number in `text`; None if there is none, if it has no value (1/0), if it is a part of a term (3\\pi), or
    if it is absurdly long."""
    text = _plain(text)
    last = None
    for match in _NUMBER.finditer(text):
        last = match if not _NOT_A_VALUE.search(text[max(0, match.start() - 20) : match.start()]) else last
    return None if last is None or _A_FACTOR.match(text, last.end()) else _number(last)


def first_number(text: str) -> Number | None:
    """The first number in `text`, as in `last_number`."""
    text = _plain(text)
    match = next((match for match in _NUMBER.finditer(text) if _is_value(text, match)), None)
    return None if match is None else _number(match)


def last_boxed(text: str) -> str | None:
    """The content of the last box that is not empty; None if there is none, or if it was cut off."""
    box = last_box(text)
    return None if box is None else box[1]


def last_box(text: str) -> tuple[int, str | None] | None:
    """Where the last box that is not empty begins, and its content: None if it was cut off. Braces are optional."""
    for match in reversed([*_BOX.finditer(text)]):
        if not text.startswith("{", match.end()):
            word = re.match(r"[^\s$]+", text[match.end() :])
            content = word[0] if word else None
        else:
            content = _braced(text, match.end())
        if content is None or content.strip():
            return match.start(), content
    return None


def _after_marker(text: str) -> tuple[int, str] | None:
    """Where the last "####" stands that marks an answer, and the rest of its line. It marks one if a number follows: as
    the whole line, or as its beginning where the text ends with it. All else is a heading of Markdown."""
    for start in reversed([match.start() for match in re.finditer("####(?!#)", text)]):
        line, _, rest = text[start + 4 :].lstrip(" \t").partition("\n")
        if re.match(r"[A-Za-z]{2}", line) or _STEP.match(line):
            continue
        if whole_number(line) is not None or (not rest.strip() and _begins_with_a_number(line)):
            return start, line
    return None


def _begins_with_a_number(line: str) -> bool:
    line = _plain(line).lstrip("$*( ")
    match = _NUMBER.match(line)
    return match is not None and _is_value(line, match)


def _is_value(text: str, match: re.Match[str]) -> bool:
    before = text[max(0, match.start() - 20) : match.start()]
    return not _NOT_A_VALUE.search(before) and not _A_FACTOR.match(text, match.end())


def _braced(text: str, start: int) -> str | None:
    """The text between the brace at `start` and its partner; None without one."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + 1 : place]
    return None


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
            value = _decimal(match["plain"]) * _power_of_ten(match["power"])
    except (ZeroDivisionError, OverflowError):
        return None
    negative = (match["sign"] == "-") != (match["sign_after"] == "-")
    return Number(value=-value if negative else value, percent=match["percent"] is not None)


def _decimal(digits: str) -> Fraction:
    mantissa, _, exponent = digits.replace(",", "").replace(" ", "").lower().partition("e")
    if len(mantissa) > LONGEST:
        raise OverflowError
    return Fraction(mantissa) * _power_of_ten(exponent)


def _power_of_ten(exponent: str | None) -> Fraction:
    if len(exponent or "") > 4 or abs(int(exponent or 0)) > LONGEST:
        raise OverflowError
    return Fraction(10) ** int(exponent or 0)
