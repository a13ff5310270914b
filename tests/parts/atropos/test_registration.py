"""Client and registration against the real API server: whom it serves is known, not assumed."""

from __future__ import annotations

import dataclasses
import socket
import threading
import time
from typing import Any

import pytest

from atropos_exp.errors import UserError
from atropos_exp.parts.atropos.client import ApiDown, ApiLost, AtroposClient, BatchLost, Registration
from atropos_exp.parts.atropos.registration import ForeignRun, register

OURS = Registration(
    wandb_group="group",
    wandb_project="project",
    batch_size=4,
    max_token_len=41,
    checkpoint_dir="checkpoints",
    save_checkpoint_interval=20,
    starting_step=7,
    num_steps=100,
)
OTHER = dataclasses.replace(OURS, wandb_group="another", batch_size=8)


def group(tag: int, *, size: int = 2, **changes: Any) -> dict[str, Any]:
    return {
        "tokens": [[1, tag]] * size,
        "masks": [[-100, tag]] * size,
        "scores": [0.0] * (size - 1) + [1.0],
        **changes,
    }


def environment(**changes: Any) -> dict[str, Any]:
    return {"max_token_length": 41, "desired_name": "e", "weight": 1.0, "group_size": 2, **changes}


def test_a_new_registration_is_seen_and_opens_the_door_to_environments(api: Any) -> None:
    client = api.client
    assert client.registered().nobody
    assert register(client, OURS, take_over=False) == "new"
    assert client.registered().matches(OURS)
    assert api.post("/register-env", environment())["status"] == "wait for trainer to start"
    assert client.batch() is None
    answer = api.post("/register-env", environment())
    assert (answer["status"], answer["env_id"], answer["starting_step"]) == ("success", 0, 7)
    assert client.environment(0) is not None and client.environment(1) is None
    assert client.status() == (7, 0)


def test_the_same_run_is_adopted_with_its_queue(api: Any) -> None:
    register(api.client, OURS, take_over=False)
    api.post("/scored_data", group(5))
    assert register(api.client, OURS, take_over=False) == "adopted"
    assert api.client.status() == (7, 1)


def test_an_api_that_got_data_before_a_trainer_is_recovered(api: Any) -> None:
    api.post("/scored_data", group(5))
    api.client.register(OURS)
    assert api.client.registered().nobody, "the API answers 200 to a registration that it ignores"
    assert register(api.client, OURS, take_over=False) == "reset"
    assert api.client.registered().matches(OURS)
    assert api.client.batch() is None


def test_another_run_is_refused_and_taken_over_only_on_demand(api: Any) -> None:
    register(api.client, OTHER, take_over=False)
    with pytest.raises(ForeignRun, match=r"serves another run: project 'project', group 'another', batch_size 8"):
        register(api.client, OURS, take_over=False)
    assert api.client.registered().matches(OTHER), "it was left alone"
    assert register(api.client, OURS, take_over=True) == "reset"
    assert api.client.registered().matches(OURS)
    assert issubclass(ForeignRun, UserError)


def test_batches_come_whole_and_the_newest_first(api: Any) -> None:
    register(api.client, OURS, take_over=False)
    assert api.client.batch() is None
    for tag in range(10, 16):
        api.post("/scored_data", group(tag))
    tags = []
    while batch := api.client.batch():
        tags.append([item["tokens"][0][1] for item in batch])
    assert tags == [[14, 15], [12, 13], [10, 11]]
    assert api.client.status() == (10, 0), "it counts batches formed, starting at the starting step"


def test_nan_costs_the_batch_and_nothing_else(api: Any) -> None:
    import httpx

    register(api.client, OURS, take_over=False)
    api.client.batch()
    for scores in ("[NaN, 1.0]", "[0.0, 1.0]"):
        text = f'{{"tokens": [[1, 2], [1, 2]], "masks": [[-100, 2], [-100, 2]], "scores": {scores}}}'
        sent = httpx.post(
            f"{api.url}/scored_data", content=text, headers={"content-type": "application/json"}, timeout=30.0
        )
        assert sent.status_code == 200
    with pytest.raises(BatchLost, match="answered 500"):
        api.client.batch()
    assert api.client.batch() is None
    api.post("/scored_data", group(1))
    api.post("/scored_data", group(2))
    assert len(api.client.batch()) == 2


def test_an_api_that_forgot_is_told_from_one_that_has_nothing(api: Any) -> None:
    register(api.client, OURS, take_over=False)
    assert api.client.batch() is None
    api.kill()
    with pytest.raises(ApiDown, match="does not answer"):
        api.client.batch()
    api.start()
    with pytest.raises(ApiLost, match="not registered"):
        api.client.batch()


def test_disconnecting_an_environment_frees_what_it_blocked(api: Any) -> None:
    register(api.client, OURS, take_over=False)
    api.client.batch()
    api.post("/register-env", environment())
    silent = api.post("/register-env", environment(min_batch_allocation=0.5))["env_id"]
    for tag in (1, 2):
        api.post("/scored_data", group(tag, env_id=0))
    assert api.client.batch() is None, "the silent one must send its half first"
    api.client.disconnect(silent)
    assert len(api.client.batch()) == 2
    with pytest.raises(AssertionError):
        api.client.disconnect(-1)


def test_something_else_on_the_port_is_no_atropos_api() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        client = AtroposClient(f"http://127.0.0.1:{server.getsockname()[1]}", batch_seconds=120.0)
        with pytest.raises(ApiDown, match="is no Atropos API"):
            client.check()
        thread.join(10)
        client.close()


def test_a_batch_that_is_too_slow_is_lost_and_asked_for_once() -> None:
    requests = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            connection, _ = server.accept()
            requests.append(connection.recv(4096))
            time.sleep(2.0)
            connection.close()

        thread = threading.Thread(target=accept)
        thread.start()
        client = AtroposClient(f"http://127.0.0.1:{server.getsockname()[1]}", batch_seconds=0.5)
        with pytest.raises(BatchLost, match=r"longer than 0.5 s"):
            client.batch()
        thread.join(10)
        client.close()
        server.settimeout(0.5)
        with pytest.raises(TimeoutError):
            server.accept()  # no second request
    assert len(requests) == 1 and requests[0].startswith(b"GET /batch")
    assert b"accept-encoding: identity" in requests[0].lower()
