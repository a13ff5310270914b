"""One line of the doctor: what was examined, its state, and what to do about it."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum


class Level(IntEnum):
    """How bad a line is. The value is the program's exit code if nothing is worse."""

    ok = 0
    warn = 1
    fail = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """What was found. `remedy` says what to do; it is empty if nothing need be done."""

    level: Level
    topic: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.level.name:<4}  {self.topic:<12}  {self.text}"
        return f"{text}\n{'':20}-> {self.remedy}" if self.remedy else text


def ok(topic: str, text: str) -> Line:
    """Return a line without trouble."""
    return Line(level=Level.ok, topic=topic, text=text)


def warn(topic: str, text: str, remedy: str) -> Line:
    """Return a line about something that may harm a run."""
    return Line(level=Level.warn, topic=topic, text=text, remedy=remedy)


def fail(topic: str, text: str, remedy: str) -> Line:
    """Return a line about something that prevents a run."""
    return Line(level=Level.fail, topic=topic, text=text, remedy=remedy)


def split_remedy(message: str) -> tuple[str, str]:
    """Split a message of the form "what is wrong; what to do", as UserErrors have it, into its two halves."""
    what, separator, remedy = message.strip().rpartition("; ")
    return (what, remedy) if separator else (message.strip(), "see the message")


def worst(lines: Sequence[Line]) -> int:
    """Return the exit code: 0 if all is well, 1 with warnings, 2 if something fails."""
    return int(max((line.level for line in lines), default=Level.ok))


def counts(lines: Sequence[Line]) -> str:
    """Return the number of lines by level, such as "12 ok, 1 warn, 0 fail"."""
    return ", ".join(f"{sum(line.level is level for line in lines)} {level.name}" for level in Level)
