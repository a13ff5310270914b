"""The server classes that Atropos environments use, unmodified, pointed at the gateway."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from atropos_exp.parts.gateway.client import GatewayClient

KINDS = ("vllm", "sglang", "openai")


def server(gateway: GatewayClient, kind: str, folder: Any, **changes: Any) -> Any:
    from atroposlib.envs.server_handling import openai_server, server_baseline, sglang_server, vllm_server

    classes = {
        "vllm": vllm_server.VLLMServer,
        "sglang": sglang_server.SGLangServer,
        "openai": openai_server.OpenAIServer,
    }
    config = server_baseline.APIServerConfig(
        server_type=kind,
        base_url=f"{gateway.address}/v1",
        api_key="x",
        model_name="tiny",
        tokenizer_name=str(folder),
        timeout=60,
        **changes,
    )
    return classes[kind](config)


def run(gateway: GatewayClient, kind: str, folder: Any, work: Callable[[Any], Awaitable[Any]], **changes: Any) -> Any:
    """`work(server)`, with the server's health task ended and its connections closed afterwards."""

    async def whole() -> Any:
        one = server(gateway, kind, folder, **changes)
        try:
            async with asyncio.timeout(120):
                return await work(one)
        finally:
            task = getattr(one, "check_task", None)
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            await one.openai.close()

    return asyncio.run(whole())


@pytest.mark.parametrize("kind", KINDS)
def test_text_calls(gateway: GatewayClient, helpers: Any, kind: str, tokenizer: Any) -> None:
    """With their own health checks on, as environments run them."""
    before = gateway.counters()
    text = tokenizer.decode(helpers.chat)

    async def work(one: Any) -> Any:
        completion = await one.completion(prompt=text, n=3, max_tokens=8, temperature=0.0)
        chat = await one.chat_completion(
            messages=[{"role": "user", "content": "12+34="}], n=2, max_tokens=8, temperature=0.0, stop=["\n"]
        )
        return completion, chat

    completion, chat = run(gateway, kind, helpers.weights, work)
    (greedy,) = helpers.post(gateway, "/generate", {"prompt": helpers.chat, "max_tokens": 8, "temperature": 0})["text"]
    assert [choice.text for choice in completion.choices] == [greedy] * 3
    assert [choice.message.content for choice in chat.choices] == [greedy] * 2
    assert {choice.finish_reason for choice in (*completion.choices, *chat.choices)} == {"stop"}
    counters = gateway.counters()
    health = "requests_health" if kind == "vllm" else "requests_completions"
    assert counters[health] - before[health] >= 1
    assert counters["internal_errors"] == 0


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_tokens_and_logprobs(gateway: GatewayClient, helpers: Any, kind: str, tokenizer: Any) -> None:
    text = tokenizer.decode(helpers.chat)

    async def work(one: Any) -> Any:
        return await one.tokens_and_logprobs_completion(prompt=text, n=4, max_tokens=6, temperature=0.9, seed=5)

    prompt, tokens, logprobs, finishes = run(gateway, kind, helpers.weights, work)
    answer = helpers.post(
        gateway, "/generate", {"prompt": helpers.chat, "n": 4, "max_tokens": 6, "temperature": 0.9, "seed": 5}
    )
    assert prompt == helpers.chat and tokens == answer["token_ids"]
    assert logprobs == [[next(iter(entry[0].values())) for entry in row] for row in answer["logprobs"]]
    names = [finish["type"] if isinstance(finish, dict) else finish for finish in finishes]
    assert names == answer["finish_reasons"]


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_managed_episode_is_found_in_the_ledger(gateway: GatewayClient, helpers: Any, kind: str) -> None:
    """Two turns with a tool's answer between: what ManagedServer would send to the trainer comes back known."""
    from atroposlib.envs.server_handling.managed_server import ManagedServer

    async def work(one: Any) -> Any:
        managed = ManagedServer(one, tokenizer=one.tokenizer)
        messages = [{"role": "user", "content": f"04+1{KINDS.index(kind)}"}]
        first = await managed.chat_completion(messages=messages, n=1, max_tokens=8, temperature=0.7)
        messages.append({"role": "assistant", "content": first.choices[0].message.content})
        # The template closes the assistant's turn by <|end|>, which the text of the first turn lacks.
        messages.append({"role": "user", "content": "05+13"})
        await managed.chat_completion(messages=messages, n=1, max_tokens=8, temperature=0.7)
        other = await managed.completion(prompt="07+1", n=2, max_tokens=4, temperature=0.7)
        return managed.get_state()["nodes"], first, other

    nodes, _, _ = run(gateway, kind, helpers.weights, work)
    assert len(nodes) == 3
    masks = [np.array(node.masked_tokens) != -100 for node in nodes]
    assert np.flatnonzero(np.diff(masks[0].astype(int))).size == 3  # - T - T
    sequences = [(np.array(node.tokens, dtype=np.int32), mask) for node, mask in zip(nodes, masks, strict=True)]
    found = gateway.lookup(sequences, claim=True)
    for node, mask, provenance in zip(nodes, masks, found, strict=True):
        assert provenance is not None and not provenance.returned_before
        assert (provenance.policy_version, provenance.temperature) == (0, 0.7)
        sent = np.array(node.logprobs, dtype=np.float32)  # 1.0 where not trained
        assert provenance.logprobs[mask].tolist() == sent[mask].tolist()
        assert not provenance.logprobs[~mask].any()
    assert all(one is not None and one.returned_before for one in gateway.lookup(sequences, claim=False))


def test_teacher_logprobs(gateway: GatewayClient, helpers: Any, tokenizer: Any) -> None:
    text = tokenizer.decode(helpers.chat)

    async def work(one: Any) -> Any:
        return await one.get_logprobs(prompt=text, top_k=2)

    payload = run(gateway, "vllm", helpers.weights, work)
    assert payload["prompt_tokens"] == helpers.chat
    assert payload["prompt_topk_token_ids"][0] == []
    for token, ids, logprobs in zip(
        helpers.chat[1:], payload["prompt_topk_token_ids"][1:], payload["prompt_topk_logprobs"][1:], strict=True
    ):
        assert ids[0] == token and len(ids) in (2, 3) and all(logprob <= 0 for logprob in logprobs)


def test_a_hold_is_no_failure_for_an_environment(gateway: GatewayClient, helpers: Any) -> None:
    async def work(one: Any) -> Any:
        gateway.hold()
        asking = asyncio.create_task(
            one.tokens_and_logprobs_completion(prompt="ignored", input_ids=helpers.chat, n=2, max_tokens=4)
        )
        deadline = asyncio.get_running_loop().time() + 30
        while gateway.counters()["held_requests"] < held + 1:
            assert asyncio.get_running_loop().time() < deadline, "waited 30 s for the request to be held"
            await asyncio.sleep(0.02)
        await asyncio.sleep(1.5)  # a health check or two
        assert one.server_healthy and not asking.done()
        gateway.release()
        return await asking

    held = gateway.counters()["held_requests"]
    _, tokens, _, finishes = run(gateway, "vllm", helpers.weights, work)
    assert len(tokens) == 2 and set(finishes) <= {"stop", "length"}
    assert gateway.counters()["refused_hold"] == 0
