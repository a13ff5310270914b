"""Registering, asking for batches, coming back: one API, three runs that want it, a proxy that watches."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from atropos_exp.parts.atropos.client import AtroposClient, BatchLost
from tests.atropos_conformance import expected, trainer
from tests.atropos_conformance.expected import Group
from tests.atropos_conformance.groups import LONGEST, Maker
from tests.atropos_conformance.programs import START_SECONDS
from tests.atropos_conformance.proxy import Proxy, Seen

FIELDS = {
    "wandb_group": str,
    "wandb_project": str,
    "batch_size": int,
    "max_token_len": int,
    "checkpoint_dir": str,
    "save_checkpoint_interval": int,
    "starting_step": int,
    "num_steps": int,
}
SLOW = 11.0  # seconds: more than the 10 after which other trainers hang up, and lose the batch
IDLE = 4.0
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # the runs that the tests share are started by the first one
PLAIN = (1.0, 0.0, 0.5, 0.25)


@pytest.fixture(scope="module")
def story(started: Any) -> Iterator[SimpleNamespace]:
    """What happened, as numbers and records. The trainer `first` is killed and resumed twice."""
    told = SimpleNamespace(sent=[])
    maker = Maker(trainer.weights(started.folder, 1), vocabulary=trainer.VOCABULARY, seed=5)

    def batch() -> list[Group]:
        groups = [maker.group(PLAIN), maker.group(PLAIN)]
        told.sent.append(groups)
        return groups

    api = started.api()
    told.proxy = proxy = Proxy(api.port)
    started.later(proxy.close)
    api.send(maker.group(PLAIN))  # before any trainer: from now on the API takes registrations and ignores them
    assert not api.is_registered

    told.poisoned_until = time.monotonic()
    first = started.run("first", steps=4, api_url=proxy.url, keeps_weights=True)
    first.wait_until(lambda: api.is_registered, "the trainer registers with the poisoned API", START_SECONDS)
    told.info, told.wandb_info = api.get("/info"), api.get("/wandb_info")
    environment = started.environment(api.url)
    told.environment = environment.registration
    told.idle = time.monotonic()
    time.sleep(IDLE)
    told.busy = time.monotonic()
    environment.send(*batch())
    first.wait_for_steps(1)
    proxy.delay_next_batch = SLOW
    told.slow = time.monotonic()
    environment.send(*batch())
    first.wait_for_steps(2)
    proxy.lose_next_batch = True
    told.lost_at = time.monotonic()
    environment.send(maker.group(PLAIN), maker.group(PLAIN))
    first.wait_until(lambda: not proxy.lose_next_batch, "a batch is lost")
    environment.send(*batch())
    first.wait_for_steps(3)
    first.wait_until(lambda: trainer.saved(first.folder, 3), "step 3 is saved")
    first.kill()

    told.foreign = started.run("second", steps=1, api_url=proxy.url)
    told.foreign_code = told.foreign.wait(START_SECONDS)
    told.still = api.get("/info"), api.get("/wandb_info")

    environment.send(*batch())  # while no trainer is there
    told.resumed = time.monotonic()
    again = started.run("first", steps=4, api_url=proxy.url, keeps_weights=True)
    assert again.wait(START_SECONDS) == 0, again.output
    told.after_resuming = proxy.to("/register", method="POST", after=told.resumed), api.get("/status")["current_step"]

    api.kill()
    api.start()
    told.two_ranks_from = time.monotonic()
    both = started.run("first", steps=6, api_url=proxy.url, keeps_weights=True, num_ranks=2)
    both.wait_until(lambda: api.is_registered, "both ranks", START_SECONDS)
    told.with_two_ranks = proxy.to("/register", method="POST", after=told.two_ranks_from)
    fresh = started.environment(api.url)
    for number in (5, 6):
        fresh.send(*batch())
        both.wait_for_steps(number)
    assert both.wait(60) == 0, both.output
    told.two_ranks_until = time.monotonic()

    third = started.run("third", steps=1, api_url=proxy.url, take_over=True, logs_to_wandb=True)
    third.wait_until(lambda: api.get("/wandb_info") != told.wandb_info, "it takes the API over", START_SECONDS)
    third.wait_until(lambda: api.is_registered, "it registers")
    told.taken_over_info = api.get("/wandb_info")
    started.environment(api.url).send(maker.group(PLAIN), maker.group(PLAIN))
    assert third.wait(60) == 0, third.output
    told.first, told.third, told.api = first, third, api
    yield told


def registrations(requests: list[Seen]) -> list[dict[str, Any]]:
    return [json.loads(one.body) for one in requests]


def test_registration_has_every_field_and_no_null(story: SimpleNamespace) -> None:
    """registration: all eight fields, none of them null."""
    for body in registrations(story.proxy.to("/register", method="POST")):
        assert {name: type(value) for name, value in body.items()} == FIELDS
        assert body["save_checkpoint_interval"] >= 2, "at 1 an environment never saves"
        assert body["num_steps"] >= story.first.request.steps, "environments end at it"


def test_registration_is_verified_and_a_poisoned_api_recovered(story: SimpleNamespace) -> None:
    """API that got data before any trainer:
    its 200 is not trusted: `/info` is checked, the API reset, registered again."""
    early = [one for one in story.proxy.seen if one.at < story.idle]
    paths = [one.path for one in early if one.path in ("/register", "/info", "/wandb_info", "/reset_data")]
    assert paths.count("/register") == 2
    assert paths.count("/reset_data") == 1
    assert paths.index("/reset_data") > paths.index("/register")
    assert "/info" in paths[len(paths) - paths[::-1].index("/register") :], "it looks after the last registration"
    assert story.info["batch_size"] == 8


def test_batch_size_counts_sequences(story: SimpleNamespace) -> None:
    """`batch_size`: sequences, not groups."""
    assert story.info["batch_size"] == 2 * 4


def test_max_token_len_is_one_more_than_the_budget(story: SimpleNamespace) -> None:
    """`max_token_len`: budget + 1, for it is exclusive."""
    assert story.info["max_token_len"] == LONGEST + 1, "an environment drops what is as long or longer"


def test_first_batch_is_asked_for_right_after_registering(story: SimpleNamespace) -> None:
    """start: `/batch` at once, which lets environments in."""
    last = story.proxy.to("/register", method="POST")[1]
    asked = story.proxy.to("/batch", after=last.at)[0]
    assert asked.at - last.at < 2.0
    assert story.environment["status"] == "success", "so that environments can register"


def test_wandb_project_and_group_are_forwarded(story: SimpleNamespace) -> None:
    """W&B: project and group are those that the trainer logs to."""
    assert all(story.wandb_info.values())
    group = "/".join(story.third.folder.parts[-3:])
    assert story.taken_over_info == {"project": "atropos-exp", "group": group}
    (record,) = story.third.folder.rglob("*.wandb")  # what W&B keeps of a run offline
    assert all(name in record.read_bytes() for name in (b"atropos-exp", group.encode()))
    assert story.taken_over_info["group"] != story.wandb_info["group"]


def test_waiting_trainer_neither_hammers_nor_sleeps(story: SimpleNamespace) -> None:
    """no batch yet: pauses grow to at most 2 s."""
    asked = [one.at for one in story.proxy.to("/batch", after=story.idle) if one.at < story.busy]
    gaps = [later - earlier for earlier, later in pairwise(asked)]
    assert 2 <= len(asked) <= 30
    assert max(gaps) < 2.6 and min(gaps[-2:]) > 0.25


def test_slow_batch_is_waited_for(story: SimpleNamespace) -> None:
    """a batch takes 11 s: waited for, and asked for once."""
    slow = next(one for one in story.proxy.to("/batch", after=story.slow) if one.has_batch)
    assert [one for one in story.proxy.to("/batch", after=slow.at + 0.001) if one.at < slow.at + SLOW - 0.5] == []
    assert tokens(story.first.steps()[1]) == sent_tokens(story.sent[1])


def test_lost_answer_is_not_asked_for_again_blindly(story: SimpleNamespace) -> None:
    """a batch is lost on the way: no blind repetition; goes on."""
    lost = next(one for one in story.proxy.to("/batch", after=story.lost_at) if one.has_batch)
    following = [one for one in story.proxy.seen if one.at > lost.at]
    assert following[0].path != "/batch", "first it looks whether the API still knows the run"
    assert tokens(story.first.steps()[2]) == sent_tokens(story.sent[2]), "the run goes on with the next one"


def test_answers_are_asked_for_unpacked(story: SimpleNamespace) -> None:
    """`Accept-Encoding`: `identity`."""
    assert {one.headers.get("accept-encoding") for one in story.proxy.to("/batch")} == {"identity"}


def test_each_update_trains_one_batch_once(story: SimpleNamespace) -> None:
    """updates: one batch each; no group twice."""
    steps = story.first.steps()
    assert [tokens(step) for step in steps] == [sent_tokens(groups) for groups in story.sent]
    ids = [group[0].group_id for step in steps for group in step.groups]
    assert len(ids) == len(set(ids))


def test_foreign_run_is_refused(story: SimpleNamespace) -> None:
    """API of another run: refused with its name, and left alone."""
    assert story.foreign_code == 2
    assert story.wandb_info["group"] in story.foreign.output, "the message says whose it is"
    assert story.still == (story.info, story.wandb_info), "and leaves it alone"


def test_foreign_run_is_taken_over_when_told_to(story: SimpleNamespace) -> None:
    """the same, with permission: reset and taken over."""
    assert trainer.status(story.third.folder) == "finished"
    assert len(story.third.steps()) == 1


def test_resumed_run_adopts_its_own_api_with_what_waits_there(story: SimpleNamespace) -> None:
    """killed and resumed, API still there: adopted; the batch that waited is weighed by its logprobs."""
    registered, api_step = story.after_resuming
    assert registered == [], "the API knows it already"
    assert api_step >= 4
    step = story.first.steps()[3]
    assert tokens(step) == sent_tokens(story.sent[3])
    right = expected.update(story.sent[3], weights=trainer.weights(story.first.folder, 4))
    assert step.losses["grad_norm"] == pytest.approx(right["grad_norm"], rel=2e-4), "weighed by its logprobs"
    assert step.losses["policy"] == pytest.approx(right["policy"], rel=2e-4, abs=2e-6)


def test_resumed_run_registers_with_the_step_it_has_trained(story: SimpleNamespace) -> None:
    """resumed, new API: `starting_step` = trained step."""
    assert [body["starting_step"] for body in registrations(story.with_two_ranks)] == [4]
    assert [body["starting_step"] for body in registrations(story.proxy.to("/register", method="POST"))[:2]] == [0, 0]


def test_one_rank_asks_for_all(story: SimpleNamespace) -> None:
    """several ranks: one of them registers and asks."""
    assert len(story.with_two_ranks) == 1
    asked = [one for one in story.proxy.to("/batch", after=story.two_ranks_from) if one.at < story.two_ranks_until]
    assert sum(one.has_batch for one in asked) == 2
    assert [tokens(step) for step in story.first.steps()[4:]] == [sent_tokens(groups) for groups in story.sent[4:]]


def test_api_of_others_is_not_reset_at_the_end(story: SimpleNamespace) -> None:
    """the end of a run: the API of others is left as it is."""
    resets = [one.at for one in story.proxy.to("/reset_data")]
    assert len(resets) == 2, "the poisoned one, and the one taken over"
    assert story.api.is_registered


def tokens(step: Any) -> list[list[int]]:
    return sorted(one.tokens for group in step.groups for one in group)


def sent_tokens(groups: list[Group]) -> list[list[int]]:
    return sorted(row for group in groups for row in group["tokens"])


def test_silent_read_is_given_up_and_counted(started: Any, story: SimpleNamespace) -> None:
    """a batch never arrives: given up late, counted, not asked for again."""
    # A minute would be too long to wait in a run: the trainer's own client, with a shorter deadline.
    proxy = Proxy(story.api.port)
    started.later(proxy.close)
    story.api.get("/reset_data")
    body = {name: kind("0") for name, kind in FIELDS.items()} | {"batch_size": 4}
    story.api.post("/register", body)
    story.api.send(dict(story.sent[0][0]))
    proxy.delay_next_batch = 2.0
    client = AtroposClient(proxy.url, batch_seconds=0.5)
    started.later(client.close)
    with pytest.raises(BatchLost):
        client.batch()
    time.sleep(1.0)
    assert len(proxy.to("/batch")) == 1
