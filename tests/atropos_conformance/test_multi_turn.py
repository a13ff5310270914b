"""Two runs of a real environment with tools between the turns: the update, computed again from what was trained.

Which tokens the policy said is known from the chat template alone: those after <|assistant|>, up to <|end|>.
"""

from __future__ import annotations

import signal
from typing import Any

import numpy as np
import pytest

from tests.atropos_conformance import expected, trainer
from tests.atropos_conformance.expected import IGNORED, SENTINEL, Group
from tests.atropos_conformance.programs import START_SECONDS, Run

ASSISTANT, END = 4, 1  # of the chat template of the model `tiny`
TEMPERATURE = 1.5  # so that answers differ
STEPS = 4  # with something to learn from
SECONDS = 240.0
LONGEST_TURN = 8  # tokens, as `Request` has it
EQUAL = 5e-4
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


class Played:
    """The steps of a run that there was something to learn from, at least one of them from older weights."""

    def __init__(self, started: Any, name: str, **options: Any) -> None:
        run: Run = started.run(
            name,
            steps=1_000_000,
            multi_turn=True,
            temperature=TEMPERATURE,
            keeps_weights=True,
            learning_rate=3e-4,
            **options,
        )
        run.wait_for_steps(1, START_SECONDS)
        run.wait_until(lambda: self._is_enough(run.steps()), "steps to learn from", SECONDS)
        run.process.send_signal(signal.SIGTERM)
        assert run.wait(60) == 0, run.output
        self.folder = run.folder
        self.steps = [step for step in run.steps() if step.losses][: STEPS + 1] + self._older(run.steps())[:1]
        self.groups = [[as_sent(group) for group in step.groups] for step in self.steps]

    def expect(self, **options: Any) -> list[dict[str, float]]:
        return [
            expected.update(groups, weights=trainer.weights(self.folder, step.step), **options)
            for groups, step in zip(self.groups, self.steps, strict=True)
        ]

    def check(self, **wrong: Any) -> None:
        """Each update came to what it must; what is `wrong` would have come to something else in at least one."""
        for step, right in zip(self.steps, self.expect(), strict=True):
            assert step.losses["policy"] == pytest.approx(right["policy"], rel=EQUAL, abs=2e-5), step.step
            assert step.losses["grad_norm"] == pytest.approx(right["grad_norm"], rel=EQUAL, abs=1e-5), step.step
        if wrong:
            found = np.array([step.losses["grad_norm"] for step in self.steps])
            others = np.array([other["grad_norm"] for other in self.expect(**wrong)])
            assert (np.abs(others - found) > 10 * EQUAL * found).any()

    def _is_enough(self, steps: list[Any]) -> bool:
        first = [step for step in steps if step.losses][: STEPS + 1]
        by_turn = [one for step in first for group in step.groups for one in group if one.advantages is not None]
        varied = any(map(differ_between_turns, by_turn)) or not by_turn
        return len(first) >= STEPS and bool(self._older(steps)) and varied

    @staticmethod
    def _older(steps: list[Any]) -> list[Any]:
        """Those with rollouts of weights before the newest, and something to learn from them."""
        return [
            step
            for step in steps
            if step.losses
            and step.losses["grad_norm"] > 0.01
            and any(one.policy_version < step.step - 1 for group in step.groups for one in group)
        ]


@pytest.fixture(scope="module")
def by_score(started: Any) -> Played:
    return Played(started, "by_score")


@pytest.fixture(scope="module")
def by_turn(started: Any) -> Played:
    return Played(started, "by_turn", environment_arguments={"token_advantages": True})


def said_by_policy(tokens: list[int]) -> list[bool]:
    """Everything after the template's <|assistant|>, up to <|end|> or the limit of a turn."""
    room, said = 0, []
    for token in tokens:
        said.append(room > 0)
        if room:
            room = 0 if token == END else room - 1
        elif token == ASSISTANT:
            room = LONGEST_TURN
    return said


def as_sent(group: list[Any]) -> Group:
    """As ScoredData again, with masks by the template."""
    masks = [
        [token if mine else IGNORED for token, mine in zip(one.tokens, said_by_policy(one.tokens), strict=True)]
        for one in group
    ]
    return {
        "tokens": [one.tokens for one in group],
        "masks": masks,
        "generation_params": {"temperature": group[0].temperature or TEMPERATURE},
        "scores": [one.reward for one in group],
        "advantages": [one.advantages for one in group] if group[0].advantages is not None else None,
        "inference_logprobs": [
            [value if label != IGNORED else SENTINEL for value, label in zip(one.logprobs, row, strict=True)]
            for one, row in zip(group, masks, strict=True)
        ],
    }


def turns(trained: list[bool]) -> int:
    return int((np.diff([0, *map(int, trained)]) == 1).sum())


def differ_between_turns(one: Any) -> bool:
    return len({value for value, trained in zip(one.advantages, one.trained, strict=True) if trained}) > 1


def test_masks_are_interleaved(by_score: Played) -> None:
    """environment with tools: trained: what the policy said, nothing else."""
    everyone = [one for step in by_score.steps for group in step.groups for one in group]
    assert max(turns(one.trained) for one in everyone) >= 2
    assert all(one.trained == said_by_policy(one.tokens) for one in everyone)


def test_loss_and_gradient_are_those_of_an_independent_computation(by_score: Played) -> None:
    """its loss and gradient norm: as plain transformers give them."""
    by_score.check()


def test_training_on_tool_tokens_would_give_other_numbers(by_score: Played) -> None:
    """tool tokens trained: would be noticed."""
    by_score.check(wrong="tool_tokens")


def test_unshifted_labels_would_give_other_numbers(by_score: Played) -> None:
    """no shift: would be noticed."""
    by_score.check(wrong="unshifted")


def test_older_rollouts_are_weighed(by_score: Played) -> None:
    """rollouts one update old: importance weights explain the loss."""
    lags = [step.step - 1 - one.policy_version for step in by_score.steps for group in step.groups for one in group]
    assert max(lags) >= 1
    by_score.check(cap=None)


def test_token_advantages_reach_the_loss(by_turn: Played) -> None:
    """token-level advantages: explain the loss; scores do not."""
    everyone = [one for step in by_turn.steps for group in step.groups for one in group]
    assert all(one.advantages is not None for one in everyone)
    assert any(differ_between_turns(one) for one in everyone)
    by_turn.check(wrong="no_advantages")
