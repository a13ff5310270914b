"""From raw groups to typed ones, completed from a real ledger; every drop under its name, and no other harm."""

from __future__ import annotations

from typing import Any

import pytest

from atropos_exp.parts.atropos.intake import Intake
from atropos_exp.types import Finish
from tests.helpers.ledger_book import Book

STOP = 5
PROMPT = [1, 2]


@pytest.fixture
def book() -> Book:
    return Book()


def intake(book: Book, **changes: Any) -> Intake:
    settings: dict[str, Any] = {
        "vocab_size": 50,
        "max_tokens": 12,
        "group_size": 2,
        "stop_token_ids": (STOP,),
        "max_version_lag": None,
    }
    return Intake(book, **{**settings, **changes})


def group(*completions: list[int], logprob: float | None = -0.5, **changes: Any) -> dict[str, Any]:
    count = len(PROMPT)
    logprobs = None if logprob is None else [[1.0] * count + [logprob] * len(tokens) for tokens in completions]
    return {
        "tokens": [PROMPT + tokens for tokens in completions],
        "masks": [[-100] * count + tokens for tokens in completions],
        "scores": [float(at) for at in range(len(completions))],
        "inference_logprobs": logprobs,
        "env_id": 0,
        **changes,
    }


def test_versions_come_from_the_ledger(book: Book) -> None:
    book.sampled(PROMPT, [3, STOP], version=4)
    book.sampled(PROMPT, [9, 9], version=6)
    [found] = intake(book).accept([group([3, STOP], [9, 9])], policy_version=7)
    assert [rollout.policy_version for rollout in found.rollouts] == [4, 6]
    assert [rollout.finish for rollout in found.rollouts] == [Finish.STOP, Finish.LENGTH]
    assert [rollout.reward for rollout in found.rollouts] == [0.0, 1.0]
    assert (found.source, found.prompt_id) == ("atropos", "atropos/0/book-0")
    assert [rollout.temperature for rollout in found.rollouts] == [1.0, 1.0]


def test_missing_logprobs_come_from_the_ledger(book: Book) -> None:
    book.sampled(PROMPT, [3, STOP], logprob=-0.75)
    book.sampled(PROMPT, [9, 9], logprob=-1.25)
    border = intake(book)
    [found] = border.accept([group([3, STOP], [9, 9], logprob=None)], policy_version=0)
    assert [rollout.logprobs.tolist() for rollout in found.rollouts] == [[0, 0, -0.75, -0.75], [0, 0, -1.25, -1.25]]
    assert border.counters["logprobs_from_ledger"] == 2


def test_logprobs_that_the_sampler_did_not_give_are_corrected(book: Book) -> None:
    book.sampled(PROMPT, [3, STOP], logprob=-0.5)
    book.sampled(PROMPT, [9, 9], logprob=-0.9)
    border = intake(book)
    [found] = border.accept([group([3, STOP], [9, 9], logprob=-0.5)], policy_version=0)
    assert found.rollouts[1].logprobs.tolist() == pytest.approx([0, 0, -0.9, -0.9])
    assert border.counters["logprobs_corrected"] == 1


def test_equal_completions_of_different_weights_are_told_apart_by_their_logprobs(book: Book) -> None:
    for version in (4, 5):
        book.sampled(PROMPT, [3, STOP], version=version, logprob=-version / 8)
        book.sampled(PROMPT, [9, 9], version=version, logprob=-version / 8)
    border = intake(book)
    raws = [group([3, STOP], [9, 9], logprob=-version / 8) for version in (4, 5, 4)]
    accepted = border.accept(raws, policy_version=5)
    assert [[rollout.policy_version for rollout in found.rollouts] for found in accepted] == [[4, 4], [5, 5]]
    assert border.counters["groups_dropped_doubled"] == 1, "the third is the first again, though the second fits too"
    assert border.counters["logprobs_corrected"] == 0


def test_what_nobody_knows_is_trained_as_on_policy_and_counted(book: Book) -> None:
    border = intake(book)
    [found] = border.accept([group([3, STOP], [9, 9], logprob=None)], policy_version=7)
    assert [rollout.policy_version for rollout in found.rollouts] == [7, 7]
    assert [rollout.logprobs for rollout in found.rollouts] == [None, None]
    assert border.counters["rollouts_of_unknown_version"] == border.counters["rollouts_without_logprobs"] == 2
    assert found.prompt_id.startswith("atropos/0/") and len(found.prompt_id) > 20


def test_a_gateway_that_is_down_costs_versions_not_groups(book: Book) -> None:
    book.is_down = True
    border = intake(book)
    [found] = border.accept([group([3, STOP], [9, 9])], policy_version=7)
    assert found.rollouts[0].logprobs.tolist() == [0, 0, -0.5, -0.5]
    assert border.counters["ledger_failures"] == 1


def test_the_temperature_is_the_sampler_s(book: Book) -> None:
    book.sampled(PROMPT, [3, STOP], temperature=0.7)
    book.sampled(PROMPT, [9, 9], temperature=0.7)
    [found] = intake(book).accept([group([3, STOP], [9, 9])], policy_version=0)
    assert [rollout.temperature for rollout in found.rollouts] == [0.7, 0.7]


def test_two_temperatures_in_one_sequence_are_refused(book: Book) -> None:
    book.sampled(PROMPT, [3], temperature=0.7)
    book.sampled([*PROMPT, 3], [4, STOP], temperature=1.0)
    border = intake(book)
    assert border.accept([group([3, 4, STOP], logprob=None)], policy_version=0) == []
    assert border.dropped_rollouts == {"mixed_temperature": 1}


def test_a_doubled_group_is_dropped_and_an_equal_one_sampled_again_is_not(book: Book) -> None:
    border = intake(book)
    for _ in range(2):
        book.sampled(PROMPT, [3, STOP])
        book.sampled(PROMPT, [9, 9])
    raw = group([3, STOP], [9, 9])
    accepted = border.accept([raw, raw, raw], policy_version=0)
    assert [found.prompt_id for found in accepted] == ["atropos/0/book-2", "atropos/0/book-0"]
    assert border.dropped_rollouts == {"doubled": 2}
    assert border.counters["groups_dropped_doubled"] == 1


def test_without_a_ledger_entry_an_equal_group_counts_as_doubled(book: Book) -> None:
    border = intake(book)
    raw = group([3, STOP], [9, 9])
    assert len(border.accept([raw], policy_version=0)) == 1
    assert len(border.accept([raw], policy_version=1)) == 0
    assert len(border.accept([{**raw, "scores": [5.0, 1.0]}], policy_version=1)) == 1, "another reward: another group"


def test_stale_groups_are_dropped_if_asked_for(book: Book) -> None:
    for version in (2, 5):
        book.sampled(PROMPT, [3, STOP], version=version)
        book.sampled(PROMPT, [9, 9], version=5)
    border = intake(book, max_version_lag=2)
    raw = group([3, STOP], [9, 9])
    assert len(border.accept([raw], policy_version=5)) == 1, "the newest completion that fits is taken first"
    assert len(border.accept([raw], policy_version=5)) == 0
    assert border.counters["groups_dropped_stale"] == 1


def test_a_bad_group_changes_nothing_of_its_neighbours(book: Book) -> None:
    tags = (11, 12, 13)
    for tag in tags:
        book.sampled(PROMPT, [tag, STOP], logprob=-tag / 10)
        book.sampled(PROMPT, [tag, 9], logprob=-tag / 20)
    good = [group([tag, STOP], [tag, 9], logprob=None) for tag in tags]
    bad = [
        group([3], [60]),
        {**group([3], [4]), "scores": [1.0]},
        {**group([3], [4]), "images": ["x"]},
        "nonsense",
        {**group([3], [4]), "masks": [[-100, -100, 1], [-100, -100, 1]]},
    ]
    border = intake(book)
    mixed = border.accept([bad[0], good[0], bad[1], bad[2], good[1], bad[3], bad[4], good[2]], policy_version=0)
    assert [[rollout.logprobs[-1] for rollout in found.rollouts] for found in mixed] == [
        pytest.approx([-tag / 10, -tag / 20]) for tag in tags
    ]
    assert border.dropped_rollouts == {"token_id": 2, "lengths": 2, "multimodal": 2, "malformed": 1, "mask_value": 2}
    assert border.counters["groups_received"] == 8
    assert border.counters["groups_accepted"] == 3


def test_a_group_of_another_size_is_compared_as_it_is(book: Book) -> None:
    border = intake(book)
    accepted = border.accept([group([3]), group([3, 4], [4], [6])], policy_version=0)
    assert [len(found.rollouts) for found in accepted] == [1, 3]
    assert border.counters["groups_of_other_size"] == 2


def test_special_treatment_reaches_the_rollouts(book: Book) -> None:
    overrides = [{"set_advantage_to_zero": True}, {"sft": True}]
    raw = group([3, STOP], [9, 9], overrides=overrides, ref_logprobs=[[0, 0, -1, -2], [0, 0, -3, -4]], novelty=1)
    border = intake(book)
    [found] = border.accept([raw], policy_version=0)
    first, second = found.rollouts
    assert (first.zero_advantage, first.supervised, second.zero_advantage, second.supervised) == (
        True,
        False,
        False,
        True,
    )
    assert first.reference_logprobs.tolist() == [0, 0, -1, -2]
    assert border.counters["unknown_fields"] == 1


def test_one_line_is_logged_for_each_kind_of_trouble(book: Book, caplog: pytest.LogCaptureFixture) -> None:
    border = intake(book)
    for _ in range(3):
        border.accept([group([3], [60]), {**group([3], [4]), "scores": [1.0]}], policy_version=0)
    dropped = [record.message for record in caplog.records if "is dropped" in record.message]
    assert len(dropped) == 2
    assert "token_id: sequence 1 has token ids 1..60; expected 0..49" in dropped[0]
