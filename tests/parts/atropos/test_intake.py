"""From raw groups to typed ones, completed from a real ledger; every drop under its name, and no other harm."""

from __future__ import annotations

import math
from typing import Any

import pytest

from atropos_exp.metrics import summarize
from atropos_exp.parts.atropos.intake import Intake
from atropos_exp.types import Finish, RolloutGroup, StepFacts, SyncStats
from tests.helpers.ledger_book import Book

STOP = 5
PROMPT = [1, 2]
SYNC = SyncStats(
    policy_version=0, num_tensors=0, num_bytes=0, seconds=0.0, proof_seconds=0.0, seconds_by_part={},
    canary_gap_max=0.0, canary_gap_mean=0.0, canary_gap_allowed=0.0, digests_compared=0,
)  # fmt: skip


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
        "max_response": 8,
    }
    return Intake(book, **{**settings, **changes})


def accept(border: Intake, raws: list[Any], policy_version: int) -> list[Any]:
    return border.accept([border.read(raw) for raw in raws], policy_version=policy_version)


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
    [found] = accept(intake(book), [group([3, STOP], [9, 9])], 7)
    assert [rollout.policy_version for rollout in found.rollouts] == [4, 6]
    assert [rollout.finish for rollout in found.rollouts] == [Finish.STOP, Finish.STOP]
    assert [rollout.reward for rollout in found.rollouts] == [0.0, 1.0]
    assert (found.source, found.prompt_id) == ("atropos", "atropos/0/book-0")
    assert [rollout.temperature for rollout in found.rollouts] == [1.0, 1.0]


def test_missing_logprobs_come_from_the_ledger(book: Book) -> None:
    book.sampled(PROMPT, [3, STOP], logprob=-0.75)
    book.sampled(PROMPT, [9, 9], logprob=-1.25)
    border = intake(book)
    [found] = accept(border, [group([3, STOP], [9, 9], logprob=None)], 0)
    assert [rollout.logprobs.tolist() for rollout in found.rollouts] == [[0, 0, -0.75, -0.75], [0, 0, -1.25, -1.25]]
    assert border.counters["logprobs_from_ledger"] == 2


def test_logprobs_that_the_sampler_did_not_give_are_corrected(book: Book) -> None:
    book.sampled(PROMPT, [3, STOP], logprob=-0.5)
    book.sampled(PROMPT, [9, 9], logprob=-0.9)
    border = intake(book)
    [found] = accept(border, [group([3, STOP], [9, 9], logprob=-0.5)], 0)
    assert found.rollouts[1].logprobs.tolist() == pytest.approx([0, 0, -0.9, -0.9])
    assert border.counters["logprobs_corrected"] == 1


def test_equal_completions_of_different_weights_are_told_apart_by_their_logprobs(book: Book) -> None:
    for version in (4, 5):
        book.sampled(PROMPT, [3, STOP], version=version, logprob=-version / 8)
        book.sampled(PROMPT, [9, 9], version=version, logprob=-version / 8)
    border = intake(book)
    raws = [group([3, STOP], [9, 9], logprob=-version / 8) for version in (4, 5, 4)]
    accepted = accept(border, raws, 5)
    assert [[rollout.policy_version for rollout in found.rollouts] for found in accepted] == [[4, 4], [5, 5]]
    assert border.counters["groups_dropped_doubled"] == 1, "the third is the first again, though the second fits too"
    assert border.counters["logprobs_corrected"] == 0


def test_what_nobody_knows_is_trained_as_on_policy_and_counted(book: Book) -> None:
    border = intake(book)
    [found] = accept(border, [group([3, STOP], [9, 9], logprob=None)], 7)
    assert [rollout.policy_version for rollout in found.rollouts] == [7, 7]
    assert [rollout.logprobs for rollout in found.rollouts] == [None, None]
    assert border.counters["rollouts_of_unknown_version"] == border.counters["rollouts_without_logprobs"] == 2
    assert found.prompt_id.startswith("atropos/0/") and len(found.prompt_id) > 20


def test_a_gateway_that_is_down_costs_versions_not_groups(book: Book) -> None:
    book.is_down = True
    border = intake(book)
    [found] = accept(border, [group([3, STOP], [9, 9])], 7)
    assert found.rollouts[0].logprobs.tolist() == [0, 0, -0.5, -0.5]
    assert border.counters["ledger_failures"] == 1


def test_the_temperature_is_the_sampler_s(book: Book) -> None:
    book.sampled(PROMPT, [3, STOP], temperature=0.7)
    book.sampled(PROMPT, [9, 9], temperature=0.7)
    [found] = accept(intake(book), [group([3, STOP], [9, 9])], 0)
    assert [rollout.temperature for rollout in found.rollouts] == [0.7, 0.7]


def test_two_temperatures_in_one_sequence_are_refused(book: Book) -> None:
    book.sampled(PROMPT, [3], temperature=0.7)
    book.sampled([*PROMPT, 3], [4, STOP], temperature=1.0)
    border = intake(book)
    assert accept(border, [group([3, 4, STOP], logprob=None)], 0) == []
    assert border.dropped_rollouts == {"mixed_temperature": 1}


def test_a_doubled_group_is_dropped_and_an_equal_one_sampled_again_is_not(book: Book) -> None:
    border = intake(book)
    for _ in range(2):
        book.sampled(PROMPT, [3, STOP])
        book.sampled(PROMPT, [9, 9])
    raw = group([3, STOP], [9, 9])
    accepted = accept(border, [raw, raw, raw], 0)
    assert [found.prompt_id for found in accepted] == ["atropos/0/book-2", "atropos/0/book-0"]
    assert border.dropped_rollouts == {"doubled": 2}
    assert border.counters["groups_dropped_doubled"] == 1


def test_without_a_ledger_entry_an_equal_group_with_equal_logprobs_counts_as_doubled(book: Book) -> None:
    border = intake(book)
    raw = group([3, STOP], [9, 9])
    assert len(accept(border, [raw], 0)) == 1
    assert len(accept(border, [raw], 1)) == 0
    assert border.dropped_rollouts == {"doubled": 2}
    assert len(accept(border, [{**raw, "scores": [5.0, 1.0]}], 1)) == 1, "another reward: another group"
    assert len(accept(border, [group([3, STOP], [9, 9], logprob=-0.25)], 1)) == 1, "sampled again, by other weights"


def test_without_logprobs_equal_groups_may_have_been_sampled_twice(book: Book) -> None:
    """Short answers that were tokenised again are often equal."""
    border = intake(book)
    raw = group([3, STOP], [9, 9], logprob=None)
    assert len(accept(border, [raw, raw], 1)) == 2
    assert border.counters["groups_repeated"] == 1


def test_examples_to_imitate_come_in_every_epoch(book: Book) -> None:
    book.sampled(PROMPT, [3, STOP])
    book.sampled(PROMPT, [9, 9])
    border = intake(book, max_version_lag=0)
    known, unknown = group([3, STOP], [9, 9]), group([4, STOP], [8, 8], logprob=None)
    for policy_version in (0, 7):
        raws = [{**raw, "group_overrides": {"sft": True}} for raw in (known, unknown)]
        assert len(accept(border, raws, policy_version)) == 2
    assert border.dropped_rollouts == {} and border.counters["rollouts_of_unknown_version"] == 0


def test_a_group_that_came_in_part_before_is_counted(book: Book) -> None:
    for tokens in ([3, STOP], [9, 9], [8, 8]):
        book.sampled(PROMPT, tokens)
    border = intake(book)
    assert len(accept(border, [group([3, STOP], [9, 9]), group([3, STOP], [8, 8])], 0)) == 2
    assert border.counters["rollouts_returned_before"] == 1


def test_stale_groups_are_dropped_when_they_are_to_be_trained(book: Book) -> None:
    """Four batches that were fetched at once are trained one after the other, and grow old meanwhile."""
    border = intake(book, max_version_lag=1)
    batches = []
    for tag in (11, 12, 13, 14):
        book.sampled(PROMPT, [tag, STOP], version=5)
        book.sampled(PROMPT, [tag, 9], version=5)
        batches.append(accept(border, [group([tag, STOP], [tag, 9])], 5))
    trained = [border.not_stale(batch, policy_version=5 + at) for at, batch in enumerate(batches)]
    assert [len(groups) for groups in trained] == [1, 1, 0, 0], "lags 0, 1, 2 and 3"
    assert border.counters["groups_dropped_stale"] == 2 and border.counters["groups_accepted"] == 2
    assert border.dropped_rollouts == {"stale": 4}
    assert "sampled 2 versions ago (atropos.max_version_lag=1)" in border.examples["stale"]


def test_a_group_of_unknown_version_is_not_new(book: Book) -> None:
    book.sampled(PROMPT, [3, STOP], version=7)
    raw = group([3, STOP], [9, 9])
    bounded = intake(book, max_version_lag=0)
    assert accept(bounded, [raw], 7) == []
    assert bounded.dropped_rollouts == {"unknown_version": 2}
    assert "the gateway has sampled 1 of its 2 sequences" in bounded.examples["unknown_version"]
    free = intake(book)
    [found] = accept(free, [raw], 7)
    assert free.counters["rollouts_of_unknown_version"] == 1
    values = summarize(StepFacts(step=8, groups=[found], advantages=[], sync=SYNC, evaluation={}, seconds={})).values
    assert (values["policy/version_lag_max"], values["rollout/of_unknown_version"]) == (0.0, 1.0)
    alone = summarize(
        StepFacts(step=9, groups=[RolloutGroup(prompt_id="p", source="atropos", rollouts=found.rollouts[1:])],
                  advantages=[], sync=SYNC, evaluation={}, seconds={})
    )  # fmt: skip
    assert math.isnan(alone.values["policy/version_lag_mean"]), "no lag is known, so none is reported"


@pytest.mark.parametrize(
    ("prompt", "completion", "finish"),
    [
        (PROMPT, [3, STOP], Finish.STOP),  # the model's own end
        (PROMPT, [3, 4, 6], Finish.STOP),  # a stop string, or a limit of the environment's own
        (PROMPT, [3] * 8, Finish.LENGTH),  # max_response_length
        (PROMPT, [3] * 7 + [STOP], Finish.STOP),
        ([1] * 9, [3] * 3, Finish.LENGTH),  # nothing more fits
        ([1] * 9, [3] * 2, Finish.STOP),
    ],
)
def test_an_answer_is_cut_by_a_limit_of_the_run_alone(
    prompt: list[int], completion: list[int], finish: Finish, book: Book
) -> None:
    raw = {"tokens": [prompt + completion], "masks": [[-100] * len(prompt) + completion], "scores": [1.0]}
    [found] = accept(intake(book), [raw], 0)
    assert found.rollouts[0].finish is finish


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
    mixed = accept(border, [bad[0], good[0], bad[1], bad[2], good[1], bad[3], bad[4], good[2]], 0)
    assert [[rollout.logprobs[-1] for rollout in found.rollouts] for found in mixed] == [
        pytest.approx([-tag / 10, -tag / 20]) for tag in tags
    ]
    assert border.dropped_rollouts == {"token_id": 2, "lengths": 2, "multimodal": 2, "malformed": 1, "mask_value": 2}
    assert border.counters["groups_received"] == 8
    assert border.counters["groups_accepted"] == 3


def test_a_group_of_another_size_is_compared_as_it_is(book: Book) -> None:
    border = intake(book)
    accepted = accept(border, [group([3]), group([3, 4], [4], [6])], 0)
    assert [len(found.rollouts) for found in accepted] == [1, 3]
    assert border.counters["groups_of_other_size"] == 2


def test_what_an_environment_could_not_score_is_counted_and_the_rest_of_its_group_stays(book: Book) -> None:
    book.sampled(PROMPT, [3, STOP], version=2)
    book.sampled(PROMPT, [4, STOP], version=2)
    border = intake(book, max_version_lag=0)
    some = group([3, STOP], [4, STOP], [], overrides=[None, {"dropped": "error:KeyError"}, {"dropped": "timeout"}])
    none = group([5, STOP], overrides=[{"dropped": "timeout"}])
    [found] = accept(border, [some, none], 2)
    assert [rollout.token_ids.tolist() for rollout in found.rollouts] == [[*PROMPT, 3, STOP]]
    assert border.dropped_rollouts == {"error:KeyError": 1, "timeout": 2, "unscored": 0}
    assert border.counters["groups_dropped_unscored"] == border.counters["groups_accepted"] == 1


def test_special_treatment_reaches_the_rollouts(book: Book) -> None:
    overrides = [{"set_advantage_to_zero": True}, {"sft": True}]
    raw = group([3, STOP], [9, 9], overrides=overrides, ref_logprobs=[[0, 0, -1, -2], [0, 0, -3, -4]], novelty=1)
    border = intake(book)
    [found] = accept(border, [raw], 0)
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
        accept(border, [group([3], [60]), {**group([3], [4]), "scores": [1.0]}], 0)
    dropped = [record.message for record in caplog.records if "is dropped" in record.message]
    assert len(dropped) == 2
    assert "token_id: sequence 1 has token ids 1..60; expected 0..49" in dropped[0]
