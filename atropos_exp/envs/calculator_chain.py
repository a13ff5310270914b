"""The task of the calculator environment: a chain of sums, with a calculator that answers between the turns.

The policy reads "12+34=" and writes either a number, its answer to that sum, or an expression such as "10+30+6", which
the calculator evaluates for it. After an answer the calculator puts the right result into the next sum, "46+21=", so
one mistake does not spoil the rest and every episode of a group faces the same sums.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from atropos_exp.processes.startup import load_own

_NUMBER = re.compile(r"\s*(-?\d{1,18})\s*\.?\s*")
_EXPRESSION = re.compile(r"\s*(\d{1,18}(?:\s*[+-]\s*\d{1,18})+)\s*=?\s*")
LOWEST, HIGHEST = 10, 99  # of the operands and of every result


@dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """A chain of sums. The operands (a, b, c, ...) stand for a+b, (a+b)+c, ..."""

    operands: tuple[int, ...]

    @property
    def num_sums(self) -> int:
        """The number of sums in the chain."""
        return len(self.operands) - 1

    def question(self, index: int) -> str:
        """Sum number `index`, as the policy reads it."""
        return question(sum(self.operands[: index + 1]), self.operands[index + 1])

    def result(self, index: int) -> int:
        """The right result of sum number `index`."""
        return sum(self.operands[: index + 2])


def question(left: int, right: int) -> str:
    """The sum as the policy reads it: "12+34=" for 12 and 34."""
    return f"{left}+{right}="


def draw_chain(seed: int, num_sums: int, *, held_out: bool) -> Chain:
    """A random chain with operands and results of two digits. With `held_out`, every sum in it is one that no run
    trains on (see `data_prep.arithmetic`); without, none is."""
    load_own("data_prep")
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
        self.answered: list[bool] = []  # for each answered sum: whether the answer was right
        self.turn_sums: list[int] = []  # for each turn of the policy: the sum it worked on

    @property
    def num_right(self) -> int:
        """How many sums were answered right."""
        return sum(self.answered)

    @property
    def by_sum(self) -> list[bool]:
        """For each sum of the chain whether it was answered right; one that was not reached counts as wrong."""
        return [*self.answered, *[False] * (self.chain.num_sums - len(self.answered))]

    def reply(self, text: str) -> str | None:
        """The calculator's answer to the policy's turn; None when the chain is finished."""
        at = len(self.answered)
        self.turn_sums.append(at)
        expression = _EXPRESSION.fullmatch(text)
        if expression is not None:
            return str(evaluate(expression[1]))
        number = _NUMBER.fullmatch(text)
        self.answered.append(number is not None and int(number[1]) == self.chain.result(at))
        return self.chain.question(at + 1) if at + 1 < self.chain.num_sums else None


def turn_credit(group: Sequence[Dialogue]) -> list[list[float]]:
    """An advantage for each turn of each episode: (x - mean) / std over the group, where x is 1 if the sum that the
    turn worked on came out right, else 0. It is 0 where all episodes are alike."""
    right_GK = np.array([dialogue.by_sum for dialogue in group], dtype=np.float64)
    std_K = right_GK.std(axis=0)
    credit_GK = np.where(std_K > 0, (right_GK - right_GK.mean(axis=0)) / np.where(std_K > 0, std_K, 1.0), 0.0)
    return [[float(row[at]) for at in dialogue.turn_sums] for dialogue, row in zip(group, credit_GK, strict=True)]


def evaluate(expression: str) -> int:
    """The value of a sum or difference of whole numbers, such as "10+30-6"."""
    return sum(int(term) for term in re.findall(r"[+-]?\d+", re.sub(r"\s", "", expression)))
