"""The server process through its client."""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx
import numpy as np

from atropos_exp.parts.engine.servers import Servers
from atropos_exp.processes.wire import pack, unpack
from tests.helpers.random_models import random_prompts
from tests.helpers.sampling_contract import SamplingContract, ids, sampling


class TestSampling(SamplingContract):
    tolerance = 1e-5
    max_length = 48  # as conftest.py says


def test_the_same_request_gets_the_same_bits(engine: Servers) -> None:
    (one,), (other,) = (engine.generate(random_prompts([5]), sampling(), num_samples=16) for _ in range(2))
    assert [sample.logprobs.tobytes() for sample in one] == [sample.logprobs.tobytes() for sample in other]


def post(engine: Servers, path: str, content: bytes, **headers: str) -> tuple[int, str]:
    headers = headers or {"authorization": f"Bearer {engine.replicas[0].process.token}"}
    response = httpx.post(engine.replicas[0].process.address + path, content=content, headers=headers, trust_env=False)
    return response.status_code, unpack(response.content)["error"]


def test_requests_of_several_threads_share_batches(engine: Servers) -> None:
    prompts = random_prompts([4] * 12, seed=3)
    alone = [ids(engine.generate([prompt], sampling(seed=i), num_samples=2)) for i, prompt in enumerate(prompts)]
    before = engine.replicas[0].info()
    together: list[Any] = [None] * 12
    engine.replicas[0].pause()  # so that they all wait, however slowly this machine starts threads

    def ask(index: int) -> None:
        together[index] = ids(engine.generate([prompts[index]], sampling(seed=index), num_samples=2))

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(12)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    while engine.replicas[0].info()["num_waiting"] < 12:
        assert time.monotonic() < deadline, "waited 60 s for 12 requests to reach the server"
        time.sleep(0.02)
    assert engine.replicas[0].info()["num_batches"] == before["num_batches"]  # held
    engine.check()  # and healthy meanwhile
    engine.replicas[0].resume()
    for thread in threads:
        thread.join(timeout=30)
    after = engine.replicas[0].info()
    assert after["num_rows"] - before["num_rows"] == 24
    assert after["num_batches"] - before["num_batches"] == 1
    assert together == alone


def test_only_the_tokens_holder_is_served(engine: Servers) -> None:
    assert engine.replicas[0].process.address.startswith("http://127.0.0.1:")
    for wrong in ("Bearer wrong", engine.replicas[0].process.token, "Bearer"):
        assert post(engine, "/info", pack({}), authorization=wrong) == (401, "wrong or missing token")
    assert post(engine, "/info", pack({}), other="header") == (401, "wrong or missing token")


def test_a_body_that_is_no_message_is_refused(engine: Servers) -> None:
    for content in (b"", b"\x80\x04K\x01.", b"\xff" * 40, pack({"x": np.zeros(3, dtype=np.int32)})[:-5]):
        status, error = post(engine, "/generate", content)
        assert status == 400 and error.startswith("bad request: ")


def test_out_of_order_weight_messages_are_refused(engine: Servers) -> None:
    for path, message, expected in (
        ("/weights/finish", {}, (409, "finish without an update in progress")),
        (
            "/weights/bucket",
            {"file": "x"},
            (400, "this server was started for another weight transport; got file, timeout_seconds"),
        ),
        (
            "/weights/bucket",
            {"num_bytes": 64, "pieces": [["a", "float32", [17], 0]], "shm": True},
            (400, "a at byte 0 does not fit a buffer of 64 bytes"),
        ),
        ("/weights/begin", {"version": -1}, (400, "version must be a number from 0 to 4611686018427387904; got -1")),
    ):
        assert post(engine, path, pack({"timeout_seconds": 5.0, **message})) == expected
