"""What is refused, with the reason, its name, and in the form that openai clients read."""

from __future__ import annotations

import socket
from typing import Any

import httpx
import pytest

from atropos_exp.errors import UserError
from atropos_exp.parts.gateway.client import GatewayClient
from atropos_exp.processes.wire import pack
from atropos_exp.types import Endpoint

VLLM = {"prompt": [20, 21], "max_tokens": 1}
OPENAI = {"model": "tiny", "prompt": "1", "max_tokens": 1}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "1"}], "max_tokens": 1}


def error(response: httpx.Response) -> tuple[int, str, str | None, str]:
    body = response.json()["error"]
    return response.status_code, body["code"], body["param"], body["message"]


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        ("/v1/completions", {**OPENAI, "stream": True}, "parameter", "stream"),
        ("/v1/completions", {**OPENAI, "frequency_penalty": 0.2}, "parameter", "frequency_penalty"),
        ("/v1/completions", {**OPENAI, "logprobs": 5}, "parameter", "logprobs"),
        ("/v1/completions", {**OPENAI, "best_of": 3}, "parameter", "best_of"),
        ("/v1/completions", {**OPENAI, "echo": True}, "parameter", "echo"),
        ("/v1/completions", {**OPENAI, "guided_regex": "a+"}, "parameter", "guided_regex"),
        ("/v1/completions", {**OPENAI, "temperature": -1}, "value", "temperature"),
        ("/v1/completions", {**OPENAI, "temperature": 1e-38}, "value", "temperature"),
        ("/v1/completions", {**OPENAI, "temperature": "hot"}, "value", "temperature"),
        ("/v1/completions", {**OPENAI, "top_p": 0}, "value", "top_p"),
        ("/v1/completions", {**OPENAI, "n": 0}, "value", "n"),
        ("/v1/completions", {**OPENAI, "max_tokens": 0}, "value", "max_tokens"),
        ("/v1/completions", {**OPENAI, "stop": [""]}, "value", "stop"),
        ("/v1/completions", {**OPENAI, "prompt": ""}, "value", "prompt"),
        ("/v1/completions", {**OPENAI, "prompt": []}, "value", "prompt"),
        ("/v1/completions", {**OPENAI, "prompt": [[1], "a", 3]}, "value", "prompt[2]"),
        ("/v1/completions", {"model": "tiny"}, "value", "prompt"),
        ("/v1/completions", {**OPENAI, "prompt": [20] * 64}, "length", "prompt"),
        ("/v1/completions", {**OPENAI, "prompt": [384]}, "value", None),  # the engine's word
        ("/v1/completions", {**OPENAI, "stop_token_ids": ["a"]}, "value", "stop_token_ids"),
        ("/v1/chat/completions", {**CHAT, "tool_choice": "required"}, "parameter", "tool_choice"),
        ("/v1/chat/completions", {**CHAT, "tools": [{"type": "function"}]}, "parameter", "tools"),
        ("/v1/chat/completions", {**CHAT, "tools": "x"}, "value", "tools"),
        ("/v1/chat/completions", {**CHAT, "top_logprobs": 2}, "parameter", "top_logprobs"),
        ("/v1/chat/completions", {**CHAT, "response_format": {"type": "json_object"}}, "parameter", "response_format"),
        ("/v1/chat/completions", {**CHAT, "reasoning_effort": "high"}, "parameter", "reasoning_effort"),
        ("/v1/chat/completions", {**CHAT, "messages": []}, "value", "messages"),
        ("/v1/chat/completions", {**CHAT, "chat_template_kwargs": {"tokenize": True}}, "value", "chat_template_kwargs"),
        ("/generate", {**VLLM, "min_p": 0.1}, "parameter", "min_p"),
        ("/generate", {**VLLM, "logprobs": 1}, "parameter", "logprobs"),
        ("/generate", {**VLLM, "prompt_logprobs": -1}, "value", "prompt_logprobs"),
        ("/generate", {**VLLM, "prompt": {"prompt_token_ids": [1], "multi_modal_data": {"image": 1}}}, "parameter",
         "prompt.multi_modal_data"),
        ("/generate", {**VLLM, "prompt": 3}, "value", "prompt"),
        ("/generate", {}, "value", "prompt"),
        ("/generate", {**VLLM, "max_new_tokens": 2}, "value", "max_tokens and max_new_tokens"),
        ("/generate", {"input_ids": [1], "sampling_params": {"regex": "a"}}, "parameter", "sampling_params.regex"),
        ("/generate", {"input_ids": [1], "sampling_params": [{}, {}]}, "value", "sampling_params"),
        ("/generate", {"input_ids": [1], "text": "a"}, "value", "text"),
        ("/generate", {"input_ids": [1], "image_data": "x"}, "parameter", "image_data"),
        ("/generate", {"input_ids": [1], "return_logprob": True, "logprob_start_len": 0}, "parameter",
         "logprob_start_len"),
    ],
)  # fmt: skip
def test_refused_by_name(
    gateway: GatewayClient, helpers: Any, path: str, body: Any, code: str, param: str | None
) -> None:
    before = gateway.counters()
    status, got_code, got_param, message = error(helpers.ask(gateway, path, body))
    assert (status, got_code, got_param) == (400, code, param)
    assert param is None or param.split("[")[0].split(".")[-1] in message or code == "length"
    after = gateway.counters()
    assert after[f"refused_{code}"] == before[f"refused_{code}"] + 1
    assert after["completions"] == before["completions"] and after["internal_errors"] == 0


def test_what_asks_for_nothing_is_accepted(gateway: GatewayClient, helpers: Any) -> None:
    neutral = {
        "presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "min_p": 0, "logit_bias": {},
        "stream": False, "user": "me", "metadata": {"a": "b"}, "store": False, "seed": None, "stop": None, "best_of": 1,
        "top_k": -1, "nonsense": None, "stop_token_ids": [], "min_tokens": 0, "stream_options": None,
    }  # fmt: skip
    helpers.post(gateway, "/v1/completions", {**OPENAI, **neutral})
    neutral["n"] = neutral.pop("best_of")
    helpers.post(gateway, "/v1/chat/completions", {**CHAT, **neutral, "tools": [], "tool_choice": "auto",
                                                   "response_format": {"type": "text"}, "top_logprobs": 0})  # fmt: skip
    helpers.post(gateway, "/generate", {**VLLM, **neutral, "prompt_logprobs": None})
    del neutral["metadata"]
    helpers.post(gateway, "/generate", {"input_ids": [20], "sampling_params": {**neutral, "max_new_tokens": 1}})


def test_the_context_limits_max_tokens(gateway: GatewayClient, helpers: Any) -> None:
    body = {"prompt": [20] * 60, "ignore_eos": True}
    before = gateway.counters()["clamped_max_tokens"]
    assert len(helpers.post(gateway, "/generate", body)["token_ids"][0]) == 4  # missing: the rest
    assert gateway.counters()["clamped_max_tokens"] == before
    assert len(helpers.post(gateway, "/generate", {**body, "max_tokens": 10**6})["token_ids"][0]) == 4
    assert gateway.counters()["clamped_max_tokens"] == before + 1
    both = {"prompt": [[20] * 60, [20]], "ignore_eos": True, "return_token_ids": True}  # the longest one decides
    choices = helpers.post(gateway, "/v1/completions", both)["choices"]
    assert [len(choice["token_ids"]) for choice in choices] == [4, 4]


def test_bodies_that_are_no_json(gateway: GatewayClient) -> None:
    for content in (b"", b"{", b"\xff\xfe", b'{"a": NaN}', b"[" * 100_000):
        response = httpx.post(gateway.address + "/generate", content=content, trust_env=False)
        assert error(response)[:2] == (400, "body")
    assert error(httpx.post(gateway.address + "/generate", json=[1], trust_env=False))[:2] == (400, "body")


def test_unknown_routes(gateway: GatewayClient) -> None:
    for method, path in (("GET", "/v1/nothing"), ("GET", "/generate"), ("POST", "/v1/models"), ("PUT", "/health")):
        status, code, _, message = error(httpx.request(method, gateway.address + path, trust_env=False))
        assert (status, code) == (404, "route") and path in message


def test_routes_that_need_no_body(gateway: GatewayClient) -> None:
    models = httpx.get(gateway.address + "/v1/models", trust_env=False).json()
    assert models["data"][0]["id"] == "tiny" and models["data"][0]["max_model_len"] == 64
    for path in ("/health", "//health", "/health_generate"):
        assert httpx.get(gateway.address + path, trust_env=False).status_code == 200
    text = httpx.get(gateway.address + "/metrics", trust_env=False).text
    assert "\natropos_exp_gateway_requests_models_total " in text


def test_only_the_trainer_may_ask_for_the_ledger(gateway: GatewayClient) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer é"}):
        encoded = {name: value.encode() for name, value in headers.items()}
        for method, path in (("POST", "/ledger/lookup"), ("POST", "/hold"), ("POST", "/release"), ("GET", "/counters")):
            response = httpx.request(method, gateway.address + path, content=pack({}), headers=encoded, trust_env=False)
            assert error(response)[:2] == (401, "token")
    assert gateway.counters()["holding"] == 0


def test_a_token_and_a_size_limit(engine: Any, helpers: Any, tmp_path: Any) -> None:
    secret = "a long secret é"
    gateway = helpers.start_gateway(engine.endpoint, tmp_path, token=secret, max_body_mb=1)
    try:
        right = {"Authorization": f"Bearer {secret}".encode()}
        for headers in ({}, {"Authorization": b"Bearer wrong"}):
            for path in ("/generate", "/v1/completions", "/nothing"):
                response = httpx.post(gateway.address + path, json=VLLM, headers=headers, trust_env=False)
                assert error(response)[:2] == (401, "token")
            assert httpx.get(gateway.address + "/v1/models", headers=headers, trust_env=False).status_code == 401
            assert httpx.get(gateway.address + "/health", headers=headers, trust_env=False).status_code == 200
        assert httpx.post(gateway.address + "/generate", json=VLLM, headers=right, trust_env=False).status_code == 200
        large = {"prompt": "x" * (1 << 20)}
        response = httpx.post(gateway.address + "/generate", json=large, headers=right, trust_env=False)
        assert error(response)[:2] == (413, "body")
        # What the trainer asks is as large as its batches: 9 bytes a token, here of 300 sequences in several exchanges.
        sequences = [helpers.sequence([5], ([9] * 9_999, True))] * 300
        assert gateway.lookup(sequences, claim=True) == [None] * 300
        assert gateway.counters()["refused_token"] == 8
        assert secret not in (tmp_path / "gateway.log").read_text()
    finally:
        gateway.stop()


def test_extra_ports(engine: Any, helpers: Any, tmp_path: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as free:
        number, extra = taken.getsockname()[1], free.getsockname()[1]
        free.close()
        with pytest.raises(UserError, match=rf"atropos.extra_ports: cannot listen on 127.0.0.1:{number}: another prog"):
            helpers.start_gateway(engine.endpoint, tmp_path, extra_ports=[extra, number])
        with pytest.raises(UserError, match=rf"gateway.port: cannot listen on 127.0.0.1:{number}"):
            helpers.start_gateway(engine.endpoint, tmp_path, port=number)
        gateway = helpers.start_gateway(engine.endpoint, tmp_path, extra_ports=[extra])
    try:
        for port in (extra, int(gateway.address.rsplit(":", 1)[1])):
            body = httpx.post(f"http://127.0.0.1:{port}/generate", json=VLLM, trust_env=False).json()
            assert len(body["token_ids"][0]) == 1
    finally:
        gateway.stop()
    socket.create_server(("127.0.0.1", extra)).close()  # free again


def test_an_engine_that_it_cannot_talk_to(helpers: Any, tmp_path: Any) -> None:
    with pytest.raises(UserError, match="an engine of kind 'other' yet"):
        helpers.start_gateway(Endpoint(kind="other", address="http://127.0.0.1:9", token=None), tmp_path)
