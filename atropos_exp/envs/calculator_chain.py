"""The task of the calculator environment: a chain of sums, and a calculator that answers between the turns. Pure.

The policy reads "12+34=". What it writes is either a number, its answer to that sum, or an expression such as
"10+30+6", which the calculator works out for it. After an answer the calculator carries its own result on into the
next sum, "46+21=", so one slip does not spoil the rest and every episode of a group faces the same sums.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

_NUMBER = re.compile(r"\s*(-?\d{1,18})\s*\.?\s*")
_EXPRESSION = re.compile(r"\s*(\d{1,18}(?:\s*[+-]\s*\d{1,18})+)\s*=?\s*")
LOWEST, HIGHEST = 10, 99  # of the operands and of every result


@dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """operands (a, b, c, ...): the sums a+b, (a+b)+c, ..."""

    operands: tuple[int, ...]

    @property
    def num_sums(self) -> int:
        return len(self.operands) - 1

    def question(self, index: int) -> str:
        return question(sum(self.operands[: index + 1]), self.operands[index + 1])

    def result(self, index: int) -> int:
        return sum(self.operands[: index + 2])


def question(left: int, right: int) -> str:
    return f"{left}+{right}="


def draw_chain(seed: int, num_sums: int, *, held_out: bool) -> Chain:
    """Two-digit operands and results. `held_out`: made of sums that no run trains on
    (`data_prep.arithmetic`), or of none of them."""
    from data_prep.arithmetic import is_held_out

    random = Random(seed)
    while True:
        operands = [random.randint(LOWEST, HIGHEST - LOWEST * num_sums)]
        for index in range(num_sums):
            left = sum(operands)
            highest = HIGHEST - left - LOWEST * (num_sums - 1 - index)  # leaves room for the sums still to come
            fitting = [right for right in range(LOWEST, highest + 1) if is_held_out(question(left, right)) == held_out]
            if not fitting:
                break
            operands.append(random.choice(fitting))
        else:
            return Chain(operands=tuple(operands))


class Dialogue:
    """The calculator's side of one episode."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.answered: list[bool] = []  # by sum: whether the answer was right
        self.turn_sums: list[int] = []  # by turn of the policy: the sum it worked on

    @property
    def num_right(self) -> int:
        return sum(self.answered)

    @property
    def by_sum(self) -> list[bool]:
        """[num_sums] right or not; one that was not reached is wrong."""
        return [*self.answered, *[False] * (self.chain.num_sums - len(self.answered))]

    def reply(self, text: str) -> str | None:
        """What the calculator says to the policy's turn; None: the chain is done."""
        at = len(self.answered)
        self.turn_sums.append(at)
        expression = _EXPRESSION.fullmatch(text)
        if expression is not None:
            return str(evaluate(expression[1]))
        number = _NUMBER.fullmatch(text)
        self.answered.append(number is not None and int(number[1]) == self.chain.result(at))
        return self.chain.question(at + 1) if at + 1 < self.chain.num_sums else None


def turn_credit(group: Sequence[Dialogue]) -> list[list[float]]:
    """One number per turn of each episode: 1 if the sum it worked on came out right, else 0, less the group's mean and
    divided by its standard deviation for that sum; 0 where all are alike."""
    right_GK = np.array([dialogue.by_sum for dialogue in group], dtype=np.float64)
    std_K = right_GK.std(axis=0)
    credit_GK = np.where(std_K > 0, (right_GK - right_GK.mean(axis=0)) / np.where(std_K > 0, std_K, 1.0), 0.0)
    return [[float(row[at]) for at in dialogue.turn_sums] for dialogue, row in zip(group, credit_GK, strict=True)]


def evaluate(expression: str) -> int:
    """Sums and differences of whole numbers, from left to right."""
    return sum(int(term) for term in re.findall(r"[+-]?\d+", re.sub(r"\s", "", expression)))
