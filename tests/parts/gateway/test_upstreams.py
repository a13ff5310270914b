"""Requests over several servers of the engine: prefixes stay where they are cached, the rest is shared."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from atropos_exp.parts.engine.servers import Servers
from atropos_exp.parts.gateway.client import GatewayClient
from atropos_exp.parts.gateway.counters import Counters
from atropos_exp.parts.gateway.upstreams import AVOID_SECONDS, BLOCK_TOKENS, MAX_AHEAD_ROWS, Upstreams, prefix_keys


@pytest.fixture(scope="module")
def engine(helpers: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    client = helpers.start_engine(tmp_path_factory.mktemp("engine"), data_parallel_size=2)
    yield client
    client.stop()


@pytest.fixture(scope="module")
def gateway(engine: Servers, helpers: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayClient]:
    endpoints = [one.endpoint for one in engine.replicas]
    client = helpers.start_gateway(endpoints, tmp_path_factory.mktemp("gateway"))
    yield client
    client.stop()


def rows(engine: Servers) -> list[int]:
    return [one.info()["num_rows"] for one in engine.replicas]


def test_requests_are_shared_and_a_prompt_stays(engine: Servers, gateway: GatewayClient, helpers: Any) -> None:
    before = rows(engine)
    for token in range(10, 20):
        helpers.post(gateway, "/generate", {"prompt": [3, token], "max_tokens": 2})
    shared = [now - old for now, old in zip(rows(engine), before, strict=True)]
    assert shared == [5, 5]
    before = rows(engine)
    for _ in range(6):
        helpers.post(gateway, "/generate", {"prompt": [3, 10], "max_tokens": 2})
    assert sorted(now - old for now, old in zip(rows(engine), before, strict=True)) == [0, 6]


def test_the_answers_are_those_of_one_server(engine: Servers, gateway: GatewayClient, helpers: Any) -> None:
    """Same seed, same tokens, whichever server draws them."""
    body = {"prompt": [3, 21, 22], "max_tokens": 6, "seed": 5, "temperature": 1.0, "n": 2}
    answer = helpers.post(gateway, "/generate", body)
    for one in engine.replicas:
        params = helpers.params(seed=5)
        (group,) = one.generate([np.array([3, 21, 22], np.int32)], params, num_samples=2)
        assert [sample.token_ids.tolist() for sample in group] == answer["token_ids"]


def test_a_lost_server_is_stepped_in_for(engine: Servers, gateway: GatewayClient, helpers: Any) -> None:
    os.kill(engine.replicas[0].process.pid, signal.SIGKILL)
    for token in range(20, 28):
        helpers.post(gateway, "/generate", {"prompt": [4, token], "max_tokens": 2})
    values = gateway.counters()
    assert values["failovers"] >= 1 and values["refused_engine"] == 0
    assert httpx.get(gateway.address + "/health", trust_env=False, timeout=30).status_code == 200
    os.kill(engine.replicas[1].process.pid, signal.SIGKILL)
    assert helpers.ask(gateway, "/generate", {"prompt": [4, 20], "max_tokens": 2}).status_code == 503
    assert gateway.counters()["refused_engine"] == 1


def test_which_server_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("atropos_exp.parts.gateway.upstreams.time.monotonic", lambda: now)
    servers = Upstreams([object(), object(), object()], Counters())  # type: ignore[list-item]
    prompt = np.arange(3 * BLOCK_TOKENS + 5, dtype=np.int32)
    keys = prefix_keys(prompt)
    assert [seen for _, seen in keys] == [BLOCK_TOKENS, 2 * BLOCK_TOKENS, 3 * BLOCK_TOKENS, len(prompt)]
    servers._rows = [4, 2, 3]
    assert servers._order(keys, len(prompt)) == [1, 2, 0]
    servers._remember(keys, 0)
    assert servers._order(keys, len(prompt)) == [0, 1, 2]
    longer = np.concatenate([prompt, prompt[:100]])  # a conversation that went on
    assert servers._order(prefix_keys(longer), len(longer))[0] == 0
    other = np.concatenate([prompt[:BLOCK_TOKENS], prompt[: 2 * BLOCK_TOKENS]])  # a third in common
    assert servers._order(prefix_keys(other), len(other))[0] == 1
    servers._rows = [2 + MAX_AHEAD_ROWS, 2, 3]
    assert servers._order(keys, len(prompt))[0] == 0
    servers._rows[0] += 1
    assert servers._order(keys, len(prompt))[0] == 1
    servers._rows = [0, 0, 0]
    servers._avoid_until[0] = now + AVOID_SECONDS
    assert servers._order(keys, len(prompt)) == [1, 2, 0]
