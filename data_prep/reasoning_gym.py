"""Procedural reasoning tasks of the reasoning_gym library (Stojanovski et al. 2025, https://arxiv.org/abs/2505.24760).

python -m data_prep.reasoning_gym --out outputs/data/reasoning_gym --tasks chain_sum,syllogism
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, model_validator

from atropos_exp.errors import UserError
from atropos_exp.parts.data.raw import VerlRow, make_row
from data_prep.builder import AS_RUN, Builder, Draft, argument, ground_truth

if TYPE_CHECKING:
    from atropos_exp.interfaces import Reward

INSTRUCTION = "Give only the final answer, between <answer> and </answer>."
# One of each kind: arithmetic, algebra, counting, text, graph, logic, lists. All are quick to generate.
TASKS = (
    "chain_sum", "simple_equations", "letter_counting", "word_sequence_reversal", "family_relationships", "syllogism",
    "number_filtering",
)  # fmt: skip


class ReasoningGymTasks(Builder):
    """Tasks of different kinds, in equal shares and in turn; each entry is scored by its own task's scorer."""

    NAME: ClassVar[str] = "reasoning_gym"
    VERSION: ClassVar[int] = 1
    MAX_UNSCORABLE: ClassVar[float] = 0.0
    MAY_HANG: ClassVar[bool] = False

    tasks: list[str] = Field(default_factory=lambda: list(TASKS), description="names of the library's tasks")
    options: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="by task, options of the library's generator: how hard it is"
    )
    num_train: int = argument(2100, "training entries over all tasks, before duplicates are dropped", le=10**8)
    num_test: int = argument(210, "held-out entries over all tasks, before duplicates are dropped", le=10**8)
    seed: int = argument(0, "of the entries", ge=0, le=2**31 - 1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise UserError(f"tasks: got {self.tasks}, expected different names of reasoning_gym's tasks")
        if unused := sorted(set(self.options) - set(self.tasks)):
            raise UserError(f"options: {', '.join(unused)}: not among the tasks {', '.join(self.tasks)}")
        for name, count in (("num_train", self.num_train), ("num_test", self.num_test)):
            if count < len(self.tasks):
                raise UserError(f"{name}: got {count}, expected at least {len(self.tasks)}, one of each task")
        return self

    def draft(self) -> Draft:
        """Test entries come first of each task's stream, train entries after them."""
        import importlib.metadata

        shares = {
            split: _shares(total, len(self.tasks))
            for split, total in (("test", self.num_test), ("train", self.num_train))
        }
        columns: dict[str, list[list[dict[str, Any]]]] = {"test": [], "train": []}
        for place, task in enumerate(self.tasks):
            num_test, num_train = shares["test"][place], shares["train"][place]
            entries = _entries(task, num_test + num_train, self.seed, self.options.get(task, {}))
            columns["test"].append(entries[:num_test])
            columns["train"].append(entries[num_test:])
        rows = {
            split: [
                _row(task, entry, split=split, index=index)
                for index, (task, entry) in enumerate(self._in_turn(entries))
            ]
            for split, entries in columns.items()
        }
        version = importlib.metadata.version("reasoning-gym")
        return Draft(train=rows["train"], test=rows["test"], source=f"reasoning-gym {version}")

    def reward(self) -> Reward:
        from atropos_exp.parts.reward.reasoning_gym import ReasoningGym

        return ReasoningGym(require_tag=True, **AS_RUN)

    def gold(self, row: VerlRow) -> str:
        """The ground truth: the scorer does not see it, it goes by the entry."""
        return f"<answer>{ground_truth(row)}</answer>"

    def wrong(self, row: VerlRow) -> str:
        """The next number, the other truth value, or the answer's letters from last to first."""
        answer = ground_truth(row)
        opposite = {"Yes": "No", "No": "Yes", "True": "False", "False": "True"}
        try:
            other = str(int(answer) + 1)
        except ValueError:
            backward = answer[::-1]
            other = opposite.get(answer, backward if backward != answer else f"{answer}?")
        return f"<answer>{other}</answer>"

    def _in_turn(self, columns: list[list[dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
        """Entry 0 of each task, entry 1 of each task, ..."""
        longest = max(len(entries) for entries in columns)
        return [
            (task, entries[place])
            for place in range(longest)
            for task, entries in zip(self.tasks, columns, strict=True)
            if place < len(entries)
        ]


def _entries(task: str, count: int, seed: int, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    from atropos_exp.config.typed import did_you_mean

    if task not in DATASETS:
        raise UserError(
            f"tasks: reasoning_gym has no task {task!r}; it has {len(DATASETS)}.{did_you_mean(task, DATASETS)}"
        )
    known = {one.name for one in fields(DATASETS[task][1])} - {"seed", "size"}
    if unknown := sorted(set(options) - known):
        raise UserError(f"options.{task}.{unknown[0]}: unknown; expected {', '.join(sorted(known))}")
    try:
        dataset = reasoning_gym.create_dataset(task, size=count, seed=seed, **options)
    except (AssertionError, TypeError, ValueError) as error:  # the library's own checks
        raise UserError(f"options.{task}: {dict(options)} is refused by reasoning_gym: {error}") from error
    return [dataset[index] for index in range(count)]


def _row(task: str, entry: dict[str, Any], *, split: str, index: int) -> VerlRow:
    return make_row(
        data_source=f"reasoning_gym/{task}",
        content=f"{str(entry['question']).strip()}\n{INSTRUCTION}",
        ability="reasoning",
        ground_truth=str(entry["answer"]),
        split=split,
        index=index,
        task=task,
        entry=json.dumps(entry, sort_keys=True),
    )


def _shares(total: int, parts: int) -> list[int]:
    """`total` in whole, nearly equal shares; the first ones get the rest."""
    return [total // parts + (place < total % parts) for place in range(parts)]


if __name__ == "__main__":
    from data_prep.cli import main

    raise SystemExit(main(ReasoningGymTasks))
