"""The source against the real API: what has arrived is used, the oldest weights first, and waits end with a reason."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from atropos_exp.errors import SourceUnavailable
from atropos_exp.parts.atropos.client import AtroposClient, Registration
from atropos_exp.parts.atropos.intake import Intake
from atropos_exp.parts.atropos.launch import Programs
from atropos_exp.parts.atropos.registration import ForeignRun
from atropos_exp.parts.atropos.settings import AtroposSettings
from atropos_exp.parts.atropos.source import AtroposSource
from atropos_exp.parts.atropos.supervisor import ProgramSupervisor
from atropos_exp.runs.waiting import dropped_while_waiting
from tests.helpers.ledger_book import Book

OURS = Registration(
    wandb_group="g", wandb_project="p", batch_size=4, max_token_len=9, checkpoint_dir="c",
    save_checkpoint_interval=2, starting_step=0, num_steps=9,
)  # fmt: skip


@pytest.fixture
def book() -> Book:
    return Book()


@pytest.fixture
def source(api: Any, book: Book, tmp_path: Path) -> Iterator[AtroposSource]:
    client = AtroposClient(api.url, batch_seconds=120.0)
    settings = AtroposSettings(
        api_url=api.url, launch=False, timeout=1.0, start_timeout=1.0, data_timeout=1.0, batch_timeout=120.0,
        take_over=False, max_version_lag=None, max_restarts=0, extra_ports=[],
    )  # fmt: skip
    yield AtroposSource(
        settings,
        Programs(client=client, supervisor=ProgramSupervisor(client, max_restarts=0), is_up=True),
        falls_back=True,
        registration=lambda step: dataclasses.replace(OURS, starting_step=step - 1),
        intake=Intake(
            book, vocab_size=50, max_tokens=8, group_size=2, stop_token_ids=(), max_version_lag=None, max_response=4
        ),
        watch=lambda: None,
        gateway_counters=lambda: {"gateway/requests": 3.0},
        evaluations=lambda: {"environment/e/accuracy": 0.5},
        refusals=lambda: {"length": "the prompt has 90 tokens"},
        group_size=2,
        run_folder=tmp_path,
    )
    client.close()


def send(api: Any, *tags: int, score: str = "1.0") -> None:
    for tag in tags:
        text = (
            f'{{"tokens": [[1, {tag}], [1, {tag}]], "masks": [[-100, {tag}], [-100, {tag}]], "scores": [0.0, {score}]}}'
        )
        httpx.post(f"{api.url}/scored_data", content=text, headers={"content-type": "application/json"}, timeout=30.0)


def tags(groups: Any) -> list[int]:
    return [int(group.rollouts[0].token_ids[1]) for group in groups]


def test_batches_that_were_formed_together_are_trained_oldest_first(
    source: AtroposSource, api: Any, book: Book
) -> None:
    assert source.connect(step=1) is None
    for tag, version in ((10, 0), (11, 0), (12, 2), (13, 2), (14, 1), (15, 1)):
        for _ in range(2):
            book.sampled([1], [tag], version=version)
        send(api, tag)
    assert [tags(source.take(2, step=3)[0]) for _ in range(3)] == [[10, 11], [14, 15], [12, 13]]
    assert source.counters()["atropos/batches"] == 3.0
    assert source.counters()["gateway/requests"] == 3.0
    assert source.counters()["environment/e/accuracy"] == 0.5


def test_a_batch_that_is_lost_takes_none_with_it(source: AtroposSource, api: Any) -> None:
    """The API forms three at once and hands out the newest first; the oldest one it cannot send."""
    source.connect(step=1)
    send(api, 10, score="NaN")
    send(api, 11, 12, 13, 14, 15)
    assert sorted(tags(source.take(2, step=1)[0]) + tags(source.take(2, step=2)[0])) == [12, 13, 14, 15]
    assert source.counters()["atropos/lost_batches"] == 1.0


def test_an_api_that_is_gone_ends_the_wait_in_time_and_is_found_again(source: AtroposSource, api: Any) -> None:
    source.connect(step=1)
    send(api, 10, 11)
    assert tags(source.take(2, step=1)[0]) == [10, 11]
    api.kill()
    started = time.monotonic()
    with pytest.raises(SourceUnavailable, match="does not answer"):
        source.take(2, step=2)
    assert 1.0 <= time.monotonic() - started < 3.0
    assert not source.is_ready(step=2)
    api.start()
    deadline = time.monotonic() + 20
    while not source.is_ready(step=7):
        assert time.monotonic() < deadline
        if api.client.registered().matches(dataclasses.replace(OURS, starting_step=6)):
            send(api, 20, 21)
        time.sleep(0.2)
    assert tags(source.take(2, step=7)[0]) == [20, 21]
    counters = source.counters()
    assert (counters["atropos/registrations"], counters["atropos/outages"]) == (2.0, 1.0)
    assert api.client.status()[0] >= 7, "it was registered at the step that was trained next"


def test_silence_is_explained(source: AtroposSource) -> None:
    with pytest.raises(SourceUnavailable, match="no environment has registered"):
        source.take(2, step=1)


def test_another_run_s_api_is_refused(source: AtroposSource, api: Any) -> None:
    api.client.register(dataclasses.replace(OURS, wandb_group="other"))
    with pytest.raises(ForeignRun):
        source.connect(step=1)


def test_what_came_to_nothing_is_told_while_it_is_waited_for(
    source: AtroposSource, api: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks of 0 and 1, the likeliest mistake, and NaN: neither is silence. The last words come before the end."""
    monkeypatch.setattr("atropos_exp.parts.atropos.waiting.FIRST_WORD", 0.2)
    monkeypatch.setattr("atropos_exp.parts.atropos.source.WATCH_SECONDS", 0.1)
    source.connect(step=1)
    for _ in range(8):
        send(api, 10, score="NaN")
        send(api, 11)
    masks = {"tokens": [[1, 7], [1, 7]], "masks": [[0, 1], [0, 1]], "scores": [0.0, 1.0]}
    for _ in range(4):
        api.post("/scored_data", masks)
    with caplog.at_level(logging.WARNING), pytest.raises(SourceUnavailable) as ended:
        source.take(2, step=1)
    assert "8 batches were lost (GET /batch answered 500" in str(ended.value)
    assert (
        "4 of 4 groups were dropped (mask_value 4), for instance: mask_value: sequence 0: a mask value must be"
        in str(ended.value)
    )
    assert "first of them: the prompt has 90 tokens" in str(ended.value)
    lines = [record.message for record in caplog.records]
    assert len([line for line in lines if "a batch from Atropos is lost" in line]) == 4, "numbers 1, 2, 4 and 8"
    spoken = [line for line in lines if line.startswith("step 1 has waited")]
    assert 1 <= len(spoken) <= 4 and "batches were lost" in spoken[0]
    told = json.loads((tmp_path / "waiting.json").read_text())
    assert told["counters"]["lost_batches"] == 8 and told["dropped"] == {"mask_value": 8}
    assert dropped_while_waiting(tmp_path) == {"mask_value": 8}, "8 rollouts of 4 groups, in no row of the metrics"


def test_a_wait_that_ends_well_leaves_nothing_behind(
    source: AtroposSource, api: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atropos_exp.parts.atropos.source.WATCH_SECONDS", 0.05)
    source.connect(step=1)
    (tmp_path / "waiting.json").write_text('{"dropped": {"stale": 3}}')  # of an attempt before this one
    send(api, 10, 11)
    source.take(2, step=1)
    assert not (tmp_path / "waiting.json").exists() and dropped_while_waiting(tmp_path) == {}
