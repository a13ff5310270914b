"""What happens when weights change, the engine or the gateway dies or hangs, or a client goes away."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from atropos_exp.errors import EngineError
from atropos_exp.parts.engine.servers import Servers
from atropos_exp.parts.gateway.client import GatewayClient
from atropos_exp.types import Endpoint

BODY = {"prompt": [20, 21, 22], "max_tokens": 2}


def wait_for(what: str, condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.02)


class Asking:
    """A request in a thread of its own."""

    def __init__(self, gateway: GatewayClient, body: Any = BODY) -> None:
        self.response: httpx.Response | None = None
        self._url, self._body = gateway.address + "/generate", body
        self.thread = threading.Thread(target=self._ask)
        self.thread.start()

    def _ask(self) -> None:
        self.response = httpx.post(self._url, json=self._body, trust_env=False, timeout=120)

    def result(self) -> httpx.Response:
        self.thread.join(timeout=120)
        assert self.response is not None, "waited 120 s for the answer"
        return self.response


@pytest.fixture(scope="module")
def engine(helpers: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    client = helpers.start_engine(tmp_path_factory.mktemp("engine"), health_timeout_seconds=10)  # it beats every 2 s
    yield client
    client.stop()


@pytest.fixture(scope="module")
def gateway(engine: Servers, helpers: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayClient]:
    client = helpers.start_gateway(
        engine.endpoint, tmp_path_factory.mktemp("gateway"), engine_silence_seconds=10.0, health_timeout_seconds=5.0
    )
    yield client
    client.stop()


def load(engine: Servers, weights: Path, version: int) -> None:
    """The same weights again as a new version."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(weights / "model.safetensors")
    with engine.updating(version) as receiver:
        bucket = [
            (name, tensors[name].to(getattr(torch, kind)))
            for name, (kind, _) in receiver.expected().items()
            if name in tensors
        ]
        receiver.receive(bucket)


def test_a_hold_around_a_weight_update(gateway: GatewayClient, engine: Servers, helpers: Any) -> None:
    """Requests wait through both pauses, the gateway's and the engine's, and get the new version."""
    old = helpers.post(gateway, "/generate", BODY)
    before = gateway.counters()
    gateway.hold()
    gateway.hold()  # twice is once
    asking = [Asking(gateway) for _ in range(4)]
    held = before["held_requests"] + 4
    wait_for("4 requests to be held", lambda: gateway.counters()["held_requests"] == held)
    assert httpx.get(gateway.address + "/health", trust_env=False).json() == {"status": "ok", "holding": True}
    version = engine.version() + 1
    load(engine, helpers.weights, version)
    assert all(one.response is None for one in asking)
    gateway.release()
    answers = [one.result().json() for one in asking]
    found = gateway.lookup(
        [
            helpers.sequence(BODY["prompt"], (answer["token_ids"][0], True))
            for answer in [*answers, old]  # newest first: the four new ones, then the old one
        ],
        claim=True,
    )
    assert [one.policy_version for one in found[:4] if one is not None] == [version] * 4
    values = gateway.counters()
    assert values["held_seconds"] > 0 and values["holding"] == 0 and values["refused_hold"] == 0
    engine.replicas[0].pause()
    waiting = Asking(gateway)
    wait_for("the request to reach the engine", lambda: engine.replicas[0].info()["num_waiting"] == 1)
    time.sleep(2.5)  # until the engine has sent a sign of life at least once
    assert waiting.response is None
    assert httpx.get(gateway.address + "/health", trust_env=False).status_code == 200
    engine.replicas[0].resume()
    assert waiting.result().status_code == 200


def test_a_client_that_goes_away_takes_its_request_along(gateway: GatewayClient, engine: Servers) -> None:
    before = gateway.counters()
    engine.replicas[0].pause()
    rows = engine.replicas[0].info()["num_rows"]
    port = int(gateway.address.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port)) as client:
        body = b'{"prompt": [20, 21], "max_tokens": 2}'
        client.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        wait_for("the request to reach the engine", lambda: engine.replicas[0].info()["num_waiting"] == 1)
    wait_for("the gateway to notice", lambda: gateway.counters()["disconnected"] == before["disconnected"] + 1)
    assert gateway.counters()["in_flight"] == 0
    time.sleep(5)  # the engine looks for its client with every sign of life
    engine.replicas[0].resume()
    wait_for("the engine to drop the request", lambda: engine.replicas[0].info()["num_waiting"] == 0)
    assert engine.replicas[0].info()["num_rows"] == rows
    assert gateway.counters()["ledger_entries"] == before["ledger_entries"]


def test_a_killed_gateway_comes_back_on_its_port(gateway: GatewayClient, helpers: Any) -> None:
    answer = helpers.post(gateway, "/generate", BODY)
    sequence = helpers.sequence(BODY["prompt"], (answer["token_ids"][0], True))
    (before,) = gateway.lookup([sequence], claim=False)
    assert before is not None
    assert gateway.restart_if_dead() is False
    completions = gateway.counters()["completions"]
    os.kill(gateway.process.pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"gateway: waited for what its ledger knows; .*killed by SIGKILL"):
        gateway.lookup([sequence], claim=False)
    with pytest.raises(EngineError, match="SIGKILL"):
        gateway.hold()  # remembered for the next process
    assert time.monotonic() - started < 4  # the deadline is 5 s: its death is noticed, not waited out
    asking = Asking(gateway)  # queues on the trainer's socket
    assert gateway.restart_if_dead() is True
    assert gateway.counters()["holding"] == 1 and asking.response is None
    gateway.release()
    assert asking.result().status_code == 200
    assert gateway.lookup([sequence], claim=False) == [None]  # the ledger began anew
    values = gateway.counters()
    assert (values["restarts"], values["completions"], values["ledger_entries"]) == (1, completions + 1, 1)
    again = helpers.sequence(BODY["prompt"], (asking.result().json()["token_ids"][0], True))
    (after,) = gateway.lookup([again], claim=False)
    assert after is not None and after.key != before.key


def test_a_gateway_that_hangs_is_replaced(gateway: GatewayClient, helpers: Any) -> None:
    os.kill(gateway.process.pid, signal.SIGSTOP)
    with pytest.raises(EngineError, match=r"no answer for 5 s .gateway.health_timeout_seconds."):
        gateway.check()
    assert gateway.restart_if_dead() is True
    helpers.post(gateway, "/generate", BODY)


@pytest.mark.slow
def test_an_engine_that_hangs_or_dies(helpers: Any, tmp_path: Path) -> None:
    engine = helpers.start_engine(tmp_path)
    try:
        gateway = helpers.start_gateway(engine.endpoint, tmp_path, engine_silence_seconds=3.0)
        try:
            helpers.post(gateway, "/generate", BODY)
            os.kill(engine.replicas[0].process.pid, signal.SIGSTOP)
            response = helpers.ask(gateway, "/generate", BODY)
            message = response.json()["error"]["message"]
            assert response.status_code == 503 and "no sign of life for 3 s (gateway.engine_silence_seconds)" in message
            assert httpx.get(gateway.address + "/health", trust_env=False, timeout=30).status_code == 503
            os.kill(engine.replicas[0].process.pid, signal.SIGCONT)

            def healthy() -> bool:
                return httpx.get(gateway.address + "/health", trust_env=False, timeout=30).status_code == 200

            wait_for("health to return", healthy)
            helpers.post(gateway, "/generate", BODY)
            engine.replicas[0].process.stop()
            response = helpers.ask(gateway, "/generate", BODY)
            assert response.status_code == 503 and "the engine did not answer" in response.json()["error"]["message"]
            assert response.headers["Retry-After"]
            wait_for("health to say so", lambda: not healthy())
            gateway.check()  # itself it is well
            assert gateway.counters()["refused_engine"] >= 3
        finally:
            gateway.stop()
    finally:
        engine.stop()


def test_it_dies_with_the_trainer(helpers: Any, tmp_path: Path) -> None:
    """Killed while it holds requests."""
    code = (
        "import sys, time, yaml\n"
        "from pathlib import Path\n"
        "from atropos_exp.config.origin import CONF_DIR\n"
        "from atropos_exp.parts.gateway.settings import GatewaySettings\n"
        "from atropos_exp.types import Endpoint\n"
        "values = yaml.safe_load((CONF_DIR / 'gateway/default.yaml').read_text())\n"
        "del values['_target_']\n"
        "settings = GatewaySettings(**values)\n"
        "client = settings.start(doors=settings.listen(()),\n"
        "    endpoints=[Endpoint(kind='hf', address='http://127.0.0.1:9', token=None)],\n"
        "    model_folder=Path(sys.argv[1]),\n"
        "    model_name='tiny', stop_token_ids=(), max_sequence_length=64, seed=0, log_folder=Path(sys.argv[2]))\n"
        "client.hold()\n"
        "print(client.process.pid, client.address, flush=True)\n"
        "time.sleep(600)\n"
    )
    trainer = subprocess.Popen(
        [sys.executable, "-c", code, str(helpers.weights), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert trainer.stdout is not None
        pid, address = trainer.stdout.readline().split()
        assert httpx.get(f"{address}/v1/models", trust_env=False, timeout=30).status_code == 200
    finally:
        trainer.kill()
        trainer.wait(timeout=30)
        if trainer.stdout is not None:
            trainer.stdout.close()
    wait_for("the gateway to end", lambda: not Path(f"/proc/{pid}").exists(), seconds=15)

    def is_refused() -> bool:
        try:
            httpx.get(f"{address}/v1/models", trust_env=False)
        except httpx.ConnectError:
            return True
        except httpx.TransportError:  # its guard, which ends after it, still had the socket open
            return False
        raise AssertionError("somebody answers for a gateway that is gone")

    wait_for("its port to be closed", is_refused, seconds=5)


def test_an_absent_engine_and_a_hold_that_has_an_end(helpers: Any, tmp_path: Path) -> None:
    endpoint = Endpoint(kind="hf", address="http://127.0.0.1:9", token=None)
    gateway = helpers.start_gateway(endpoint, tmp_path, max_hold_seconds=1.0)
    try:
        assert helpers.ask(gateway, "/generate", BODY).status_code == 503
        assert httpx.get(gateway.address + "/health", trust_env=False).status_code == 503
        gateway.hold()
        response = helpers.ask(gateway, "/generate", BODY)
        assert response.status_code == 503 and int(response.headers["Retry-After"]) > 0
        assert "held for 1 s (gateway.max_hold_seconds)" in response.json()["error"]["message"]
        values = gateway.counters()
        assert (values["refused_hold"], values["refused_engine"], values["held_requests"]) == (1, 2, 1)
    finally:
        gateway.stop()
    gateway.stop()
    with pytest.raises(EngineError):
        gateway.check()


def test_a_process_that_cannot_start(helpers: Any, tmp_path: Path) -> None:
    endpoint = Endpoint(kind="hf", address="http://127.0.0.1:9", token=None)
    doors = helpers.settings().listen(())
    with (
        contextlib.closing(doors),
        pytest.raises(EngineError, match=r"did not start: its process ended with exit code 1.*gateway.log"),
    ):
        helpers.settings().start(
            doors=doors,
            endpoints=[endpoint],
            model_folder=tmp_path / "nothing",
            model_name="x",
            stop_token_ids=(),
            max_sequence_length=8,
            seed=0,
            log_folder=tmp_path,
        )
