"""The server process through its client."""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx
import numpy as np
import pytest

from atropos_exp.engine.client import EngineClient
from atropos_exp.types import Finish, Sample, SamplingParams, UserError
from atropos_exp.wire import pack, unpack


def sampling(**changes: Any) -> SamplingParams:
    values: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 6, "seed": 1}
    return SamplingParams(**{**values, "stop_token_ids": (2, 3), **changes})


def ids(groups: list[list[Sample]]) -> list[list[list[int]]]:
    return [[sample.token_ids.tolist() for sample in group] for group in groups]


def post(engine: EngineClient, path: str, content: bytes, **headers: str) -> tuple[int, str]:
    headers = headers or {"authorization": f"Bearer {engine.process.token}"}
    response = httpx.post(engine.process.address + path, content=content, headers=headers, trust_env=False)
    return response.status_code, unpack(response.content)["error"]


def test_samples_carry_what_the_trainer_needs(engine: EngineClient, model: Any, helpers: Any) -> None:
    prompts = helpers.random_prompts([5, 1, 9])
    params = sampling(temperature=0.8)
    groups = engine.generate(prompts, params, num_samples=8)
    assert [len(group) for group in groups] == [8, 8, 8]
    finishes = set()
    for prompt, group in zip(prompts, groups, strict=True):
        for sample in group:
            assert sample.token_ids.dtype == np.int32 and sample.logprobs.dtype == np.float32
            expected = helpers.teacher_forced(model, prompt, sample.token_ids, 0.8)
            np.testing.assert_allclose(sample.logprobs, expected, atol=1e-5)
            stopped = sample.token_ids[-1] in params.stop_token_ids
            assert not set(sample.token_ids[:-1].tolist()) & set(params.stop_token_ids)
            assert sample.finish is (Finish.STOP if stopped else Finish.LENGTH)
            assert stopped or len(sample.token_ids) == 6
            assert sample.policy_version == engine.version() == 0
            finishes.add(sample.finish)
    assert finishes == {Finish.STOP, Finish.LENGTH}


def test_same_request_same_tokens(engine: EngineClient, helpers: Any) -> None:
    prompts = helpers.random_prompts([5, 7])
    first = engine.generate(prompts, sampling(), num_samples=16)
    again = engine.generate(prompts, sampling(), num_samples=16)
    assert ids(first) == ids(again)
    for one, two in zip(first[0], again[0], strict=True):
        assert one.logprobs.tobytes() == two.logprobs.tobytes()
    assert ids(engine.generate(prompts, sampling(seed=2), num_samples=16)) != ids(first)
    assert len({tuple(tokens) for tokens in ids(first)[0]}) > 10  # samples of one prompt differ


def test_score_agrees_with_the_samplers_logprobs(engine: EngineClient, helpers: Any) -> None:
    (prompt,) = helpers.random_prompts([6])
    ((sample,),) = engine.generate([prompt], sampling(temperature=0.5), num_samples=1)
    (scored,) = engine.score([np.concatenate([prompt, sample.token_ids])], temperature=0.5)
    np.testing.assert_allclose(scored[len(prompt) - 1 :], sample.logprobs, atol=1e-5)


def test_requests_of_several_threads_share_batches(engine: EngineClient, helpers: Any) -> None:
    prompts = helpers.random_prompts([4] * 12, seed=3)
    alone = [ids(engine.generate([prompt], sampling(seed=i), num_samples=2)) for i, prompt in enumerate(prompts)]
    before = engine.info()
    together: list[Any] = [None] * 12
    engine.pause()  # so that they all wait, however slowly this machine starts threads

    def ask(index: int) -> None:
        together[index] = ids(engine.generate([prompts[index]], sampling(seed=index), num_samples=2))

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(12)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    while engine.info()["num_waiting"] < 12:
        assert time.monotonic() < deadline, "waited 60 s for 12 requests to reach the server"
        time.sleep(0.02)
    assert engine.info()["num_batches"] == before["num_batches"]  # held
    engine.check()  # and healthy meanwhile
    engine.resume()
    for thread in threads:
        thread.join(timeout=30)
    after = engine.info()
    assert after["num_rows"] - before["num_rows"] == 24
    assert after["num_batches"] - before["num_batches"] == 1
    assert together == alone


def test_wrong_requests_are_refused_with_the_reason(engine: EngineClient, helpers: Any) -> None:
    (prompt,) = helpers.random_prompts([4])
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (helpers.random_prompts([helpers.max_length - 5]), {}, "prompt 0 has 43 tokens; with 6 .* between 1 and 42"),
        ([np.zeros(0, dtype=np.int32)], {}, "prompt 0 has 0 tokens"),
        ([np.array([0, helpers.vocab], dtype=np.int32)], {}, "token id 0..48 outside the vocabulary of 48"),
        ([prompt], {"top_p": 0.0}, "top_p must be above 0"),
        ([prompt], {"temperature": -1.0}, "temperature must be a number from 0"),
        ([prompt], {"temperature": float("nan")}, "temperature must be a number"),
        ([prompt], {"max_tokens": 0}, "max_tokens must be a number from 1"),
        ([prompt], {"stop_token_ids": (99,)}, "stop token 99 outside the vocabulary"),
    ]
    for prompts, changes, message in cases:
        with pytest.raises(UserError, match=message):
            engine.generate(prompts, sampling(**changes), num_samples=1)
    with pytest.raises(UserError, match="outside the vocabulary"):
        engine.score([np.array([-1, 2], dtype=np.int32)], temperature=1.0)
    assert engine.generate([], sampling(), num_samples=1) == [] and engine.score([], temperature=1.0) == []


def test_only_the_tokens_holder_is_served(engine: EngineClient) -> None:
    assert engine.process.address.startswith("http://127.0.0.1:")
    for wrong in ("Bearer wrong", engine.process.token, "Bearer"):
        assert post(engine, "/info", pack({}), authorization=wrong) == (401, "wrong or missing token")
    assert post(engine, "/info", pack({}), other="header") == (401, "wrong or missing token")


def test_a_body_that_is_no_message_is_refused(engine: EngineClient) -> None:
    for content in (b"", b"\x80\x04K\x01.", b"\xff" * 40, pack({"x": np.zeros(3, dtype=np.int32)})[:-5]):
        status, error = post(engine, "/generate", content)
        assert status == 400 and error.startswith("bad request: ")


def test_out_of_order_weight_messages_are_refused(engine: EngineClient) -> None:
    for path, message, expected in (
        ("/weights/finish", {}, (409, "finish without an update in progress")),
        (
            "/weights/bucket",
            {"file": "x"},
            (400, "this server was started for another weight transport; got file, timeout_seconds"),
        ),
        (
            "/weights/bucket",
            {"num_bytes": 64, "pieces": [["a", "float32", [17], 0]]},
            (400, "a at byte 0 does not fit a buffer of 64 bytes"),
        ),
        ("/weights/begin", {"version": -1}, (400, "version must be a number from 0 to 4611686018427387904; got -1")),
    ):
        assert post(engine, path, pack({"timeout_seconds": 5.0, **message})) == expected
