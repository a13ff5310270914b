"""Sums and other problems of two numbers, generated at once: "12+34=" with the answer "46".

python -m data_prep.arithmetic --out outputs/data/arithmetic --operations "+-" --digits 2
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from atropos_exp.errors import UserError
from atropos_exp.parts.data.mix import permutation, random_words
from atropos_exp.parts.data.raw import VerlRow, make_row
from data_prep.builder import AS_RUN, Builder, Draft, argument, prompt_text

if TYPE_CHECKING:
    from atropos_exp.interfaces import Reward

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda left, right: left + right,
    "-": lambda left, right: left - right,
    "*": lambda left, right: left * right,
}
HELD_OUT_ONE_IN = 16
Problem = tuple[str, int, int]  # operation, left, right


def is_held_out(question: str) -> bool:
    """Whether the problem is held out. A hash of its text decides, so that no choice of arguments trains on what
    another holds out; the pretraining of the `tiny` model leaves out the same problems.
    """
    return hashlib.blake2b(question.encode(), digest_size=8).digest()[0] % HELD_OUT_ONE_IN == 0


def _question(operation: str, left: int, right: int) -> str:
    return f"{left}{operation}{right}="


class Arithmetic(Builder):
    """Different problems of two operands with exactly `digits` digits each (one digit: 0 to 9)."""

    NAME: ClassVar[str] = "arithmetic"
    VERSION: ClassVar[int] = 1
    MAX_UNSCORABLE: ClassVar[float] = 0.0
    MAY_HANG: ClassVar[bool] = False

    operations: str = argument("+", "any of + - *, without separators")
    digits: int = argument(2, "of each operand, 1 to 9", ge=1, le=9)
    num_train: int = argument(6000, "training problems", ge=1, le=10**8)
    num_test: int = argument(256, "held-out problems: one in sixteen of all is never trained on", ge=1, le=10**8)
    seed: int = argument(0, "of the choice of problems", ge=0, le=2**31 - 1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        unknown = sorted(set(self.operations) - set(OPERATIONS))
        if not self.operations or unknown or len(set(self.operations)) != len(self.operations):
            raise UserError(
                f"operations: got {self.operations!r}, expected each of {' '.join(OPERATIONS)} at most once"
            )
        if self.num_train + self.num_test > self._num_problems:
            raise UserError(
                f"num_train: got {self.num_train} (+ {self.num_test} held out), but there are only "
                f"{self._num_problems} different problems with operations={self.operations!r}, digits={self.digits}"
            )
        return self

    def draft(self) -> Draft:
        train, test = self._problems()
        return Draft(
            train=[self._row(*problem, split="train", index=index) for index, problem in enumerate(train)],
            test=[self._row(*problem, split="test", index=index) for index, problem in enumerate(test)],
            source=f"procedural, {self._num_problems} possible problems",
        )

    def reward(self) -> Reward:
        from atropos_exp.parts.reward.exact import Exact

        return Exact(extract=None, last_line=False, ignore_case=False, **AS_RUN)

    def gold(self, row: VerlRow) -> str:
        """The answer, computed from the prompt's text."""
        match = re.fullmatch(r"(\d+)([+*-])(\d+)=", prompt_text(row))
        assert match, prompt_text(row)
        return str(OPERATIONS[match[2]](int(match[1]), int(match[3])))

    def wrong(self, row: VerlRow) -> str:
        """The answer off by ten, as if a carry had been forgotten."""
        return str(int(self.gold(row)) - 10)

    @property
    def _low(self) -> int:
        return 10 ** (self.digits - 1) if self.digits > 1 else 0

    @property
    def _num_operands(self) -> int:
        return int(10**self.digits - self._low)

    @property
    def _num_problems(self) -> int:
        return len(self.operations) * self._num_operands**2

    def _problems(self) -> tuple[list[Problem], list[Problem]]:
        """Different problems in random order: those to train on, and held-out ones."""
        wanted = self.num_train + self.num_test * HELD_OUT_ONE_IN
        if 4 * wanted > self._num_problems:  # a good part of all: shuffle them all
            numbers = permutation(self.seed, 0, 0, self._num_problems)
            operations, pairs = np.divmod(numbers, self._num_operands**2)
            lefts, rights = np.divmod(pairs, self._num_operands)
            train, test = self._split(np.stack([operations, lefts, rights], axis=1))
        else:
            ranges = np.array([len(self.operations), self._num_operands, self._num_operands], dtype=np.uint64)
            words = np.empty((0, 3), np.uint64)
            train, test, draw = [], [], 0
            while len(train) < self.num_train or len(test) < self.num_test:
                more = random_words(self.seed, 2, 0, draw, 3 * wanted).reshape(wanted, 3)
                words, draw = np.concatenate([words, more]), draw + 1
                train, test = self._split((words % ranges).astype(np.int64))
        if len(train) < self.num_train or len(test) < self.num_test:
            raise UserError(
                f"num_train: got {self.num_train} (+ {self.num_test} held out), but of the {self._num_problems} "
                f"different problems with operations={self.operations!r}, digits={self.digits} {len(train)} are for "
                f"training and {len(test)} held out"
            )
        return train[: self.num_train], test[: self.num_test]

    def _split(self, numbers: NDArray[np.int64]) -> tuple[list[Problem], list[Problem]]:
        """The different problems among rows [N, 3] of (operation, left, right), trainable and held-out ones apart."""
        rows: list[list[int]] = numbers.tolist()
        every = dict.fromkeys((self.operations[one], self._low + left, self._low + right) for one, left, right in rows)
        held_out = {problem: is_held_out(_question(*problem)) for problem in every}
        return [one for one, out in held_out.items() if not out], [one for one, out in held_out.items() if out]

    def _row(self, operation: str, left: int, right: int, *, split: str, index: int) -> VerlRow:
        return make_row(
            data_source=self.NAME,
            content=_question(operation, left, right),
            ability=self.NAME,
            ground_truth=str(OPERATIONS[operation](left, right)),
            split=split,
            index=index,
            operation=operation,
            digits=self.digits,
        )


if __name__ == "__main__":
    from data_prep.cli import main

    raise SystemExit(main(Arithmetic))
