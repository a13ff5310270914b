"""Every dialect against the engine behind it: the same tokens and logprobs, bit by bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from atropos_exp.parts.engine.servers import Servers
from atropos_exp.parts.gateway.client import GatewayClient
from atropos_exp.types import Sample

Drawn = list[tuple[list[int], list[float], str]]


def expected(engine: Servers, prompts: list[list[int]], n: int, **changes: Any) -> Drawn:
    from types import SimpleNamespace

    helpers: SimpleNamespace = changes.pop("helpers")
    groups = engine.generate(
        [np.array(prompt, dtype=np.int32) for prompt in prompts], helpers.params(**changes), num_samples=n
    )
    samples: list[Sample] = [sample for group in groups for sample in group]
    return [(sample.token_ids.tolist(), sample.logprobs.tolist(), sample.finish.value) for sample in samples]


def test_vllm_generate(gateway: GatewayClient, engine: Servers, helpers: Any, tokenizer: Any) -> None:
    body = {
        "prompt": {"prompt_token_ids": helpers.chat},
        "logprobs": 0,
        "n": 4,
        "max_tokens": 5,
        "temperature": 1.3,
        "top_p": 0.9,
        "top_k": 30,
        "seed": 11,
    }
    answer = helpers.post(gateway, "/generate", body)
    drawn = expected(
        engine, [helpers.chat], 4, max_tokens=5, temperature=1.3, top_p=0.9, top_k=30, seed=11, helpers=helpers
    )
    tokens = [[int(next(iter(entry[0]))) for entry in row] for row in answer["logprobs"]]
    logprobs = [[next(iter(entry[0].values())) for entry in row] for row in answer["logprobs"]]
    assert list(zip(tokens, logprobs, answer["finish_reasons"], strict=True)) == drawn
    assert answer["token_ids"] == tokens and answer["prompt_token_ids"] == helpers.chat
    assert answer["text"] == [tokenizer.decode(row, skip_special_tokens=True) for row in tokens]
    assert answer["prompt"] == tokenizer.decode(helpers.chat)
    assert {"stop", "length"} >= set(answer["finish_reasons"])
    assert all(row[-1] == helpers.stop for row, finish in zip(tokens, answer["finish_reasons"], strict=True)
               if finish == "stop")  # fmt: skip


def test_vllm_generate_from_text(gateway: GatewayClient, helpers: Any, tokenizer: Any) -> None:
    for prompt in ("1+2=é", {"prompt": "1+2=é"}):
        answer = helpers.post(gateway, "/generate", {"prompt": prompt, "max_tokens": 1})
        assert answer["prompt_token_ids"] == tokenizer.encode("1+2=é")
    assert helpers.post(gateway, "/generate", {"prompt": helpers.chat, "max_tokens": 1})["prompt_token_ids"]


def test_sglang_generate(gateway: GatewayClient, engine: Servers, helpers: Any) -> None:
    parameters = {"max_new_tokens": 6, "temperature": 0.8, "sampling_seed": 3}
    body = {"input_ids": helpers.chat, "sampling_params": parameters, "return_logprob": True}
    one = helpers.post(gateway, "/generate", body)
    several = helpers.post(gateway, "/generate", {**body, "sampling_params": {**parameters, "n": 3}})
    batch = helpers.post(gateway, "/generate", {**body, "input_ids": [helpers.chat, [21, 15]]})
    for answers, prompts, n in (
        ([one], [helpers.chat], 1),
        (several, [helpers.chat], 3),
        (batch, [helpers.chat, [21, 15]], 1),
    ):
        drawn = expected(engine, prompts, n, temperature=0.8, seed=3, helpers=helpers)
        got = [
            (
                [token for _, token, _ in answer["meta_info"]["output_token_logprobs"]],
                [logprob for logprob, _, _ in answer["meta_info"]["output_token_logprobs"]],
                answer["meta_info"]["finish_reason"]["type"],
            )
            for answer in answers
        ]
        assert got == drawn
        assert [answer["output_ids"] for answer in answers] == [tokens for tokens, _, _ in drawn]
    assert one["meta_info"]["prompt_tokens"] == len(helpers.chat) and one["meta_info"]["weight_version"] == "0"
    assert len(helpers.post(gateway, "/generate", {**body, "input_ids": [helpers.chat]})) == 1  # a list stays a list
    plain = helpers.post(gateway, "/generate", {"text": "1+2", "sampling_params": {"max_new_tokens": 2}})
    assert "output_token_logprobs" not in plain["meta_info"]
    with_text = helpers.post(gateway, "/generate", {**body, "return_text_in_logprobs": True})
    assert all(isinstance(text, str) for _, _, text in with_text["meta_info"]["output_token_logprobs"])


def test_completions(gateway: GatewayClient, engine: Servers, helpers: Any, tokenizer: Any) -> None:
    text = tokenizer.decode(helpers.chat)
    assert tokenizer.encode(text) == helpers.chat
    other = tokenizer.encode("2+2")
    for prompt, prompts in (
        (text, [helpers.chat]),
        ([text, "2+2"], [helpers.chat, other]),
        (helpers.chat, [helpers.chat]),
        ([helpers.chat, other], [helpers.chat, other]),
    ):
        body = {"model": "x", "prompt": prompt, "n": 2, "max_tokens": 6, "seed": 1, "logprobs": 0,
                "return_token_ids": True}  # fmt: skip
        answer = helpers.post(gateway, "/v1/completions", body)
        drawn = expected(engine, prompts, 2, helpers=helpers)
        choices = answer["choices"]
        assert [choice["index"] for choice in choices] == list(range(2 * len(prompts)))
        assert [(c["token_ids"], c["logprobs"]["token_logprobs"], c["finish_reason"]) for c in choices] == drawn
        assert [c["text"] for c in choices] == [tokenizer.decode(ids, skip_special_tokens=True) for ids, *_ in drawn]
        assert [c["prompt_token_ids"] for c in choices] == [prompt for prompt in prompts for _ in range(2)]
        num_prompt, num_new = sum(map(len, prompts)), sum(len(ids) for ids, *_ in drawn)
        usage = {"prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new}
        assert answer["usage"] == usage and answer["object"] == "text_completion" and answer["model"] == "tiny"


def test_chat(gateway: GatewayClient, engine: Servers, helpers: Any, tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "add"},
        {"role": "user", "content": [{"type": "text", "text": "1+2"}]},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "4+5"},
    ]
    plain = [{**message, "content": "1+2"} if index == 1 else message for index, message in enumerate(messages)]
    prompt = tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
    body = {"model": "x", "messages": messages, "n": 2, "max_completion_tokens": 6, "seed": 1, "logprobs": True,
            "return_token_ids": True}  # fmt: skip
    answer = helpers.post(gateway, "/v1/chat/completions", body)
    assert answer["prompt_token_ids"] == prompt
    drawn = expected(engine, [prompt], 2, helpers=helpers)
    got = [
        (c["token_ids"], [entry["logprob"] for entry in c["logprobs"]["content"]], c["finish_reason"])
        for c in answer["choices"]
    ]
    assert got == drawn
    for choice, (ids, *_) in zip(answer["choices"], drawn, strict=True):
        assert choice["message"]["content"] == tokenizer.decode(ids, skip_special_tokens=True)
        assert choice["message"]["role"] == "assistant"
    prefilled = {**body, "messages": [*messages, {"role": "assistant", "content": "9"}]}
    for changes, template in (
        ({"add_generation_prompt": False}, {"add_generation_prompt": False}),
        ({"continue_final_message": True}, {"continue_final_message": True}),
    ):
        answer = helpers.post(gateway, "/v1/chat/completions", {**prefilled, **changes})
        last = [*plain, {"role": "assistant", "content": "9"}]
        assert answer["prompt_token_ids"] == tokenizer.apply_chat_template(last, return_dict=False, **template)


def test_prompt_logprobs_are_those_of_the_model(gateway: GatewayClient, helpers: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    prompt = [3, 20, 21, 14, 22, 23, 4, 300, 250]  # the last ones are unlikely: not among the top
    body = {"prompt": {"prompt_token_ids": prompt}, "prompt_logprobs": 3, "n": 1, "temperature": 0, "max_tokens": 1}
    entries = helpers.post(gateway, "/generate", body)["prompt_logprobs"]
    model = AutoModelForCausalLM.from_pretrained(helpers.weights, dtype=torch.float32, local_files_only=True)
    with torch.inference_mode():
        table = torch.log_softmax(model(input_ids=torch.tensor([prompt])).logits[0].double(), dim=-1)
    assert len(entries) == len(prompt) and entries[0] is None
    sizes = set()
    for place in range(1, len(prompt)):
        entry, row = entries[place], table[place - 1]
        top = row.topk(3).indices.tolist()
        assert list(entry) == list(dict.fromkeys(str(token) for token in (prompt[place], *top)))
        np.testing.assert_allclose(list(entry.values()), [float(row[int(key)]) for key in entry], atol=1e-4)
        sizes.add(len(entry))
    assert sizes == {3, 4}
    only = helpers.post(gateway, "/generate", {**body, "prompt_logprobs": 0})["prompt_logprobs"]
    assert [list(entry) for entry in only[1:]] == [[str(token)] for token in prompt[1:]]
    everything = helpers.post(gateway, "/generate", {**body, "prompt_logprobs": 1000})["prompt_logprobs"]
    assert all(len(entry) == 384 for entry in everything[1:])


def test_requests_without_a_seed_share_no_randomness(gateway: GatewayClient, helpers: Any) -> None:
    body = {"prompt": helpers.chat, "max_tokens": 12, "temperature": 3.0, "ignore_eos": True}
    drawn = [tuple(helpers.post(gateway, "/generate", body)["token_ids"][0]) for _ in range(12)]
    assert len(set(drawn)) == 12


def test_greedy_and_ignored_stop_tokens(gateway: GatewayClient, engine: Servers, helpers: Any) -> None:
    body = {"prompt": helpers.chat, "max_tokens": 8, "temperature": 0}
    answer = helpers.post(gateway, "/generate", body)
    ((ids, _, finish),) = expected(engine, [helpers.chat], 1, temperature=0.0, max_tokens=8, helpers=helpers)
    assert answer["token_ids"] == [ids] and finish == "stop" and ids[-1] == helpers.stop
    free = helpers.post(gateway, "/generate", {**body, "ignore_eos": True})
    assert len(free["token_ids"][0]) == 8 and free["token_ids"][0][: len(ids)] == ids
    assert free["finish_reasons"] == ["length"]
    early = helpers.post(gateway, "/generate", {**body, "stop_token_ids": [ids[0]]})
    assert early["token_ids"] == [ids[:1]] and early["finish_reasons"] == ["stop"]
    off = helpers.post(gateway, "/generate", {**body, "top_k": -1, "top_p": 1, "min_p": 0, "repetition_penalty": 1.0})
    assert off["token_ids"] == [ids]


def test_the_ledger_knows_what_every_dialect_gave(gateway: GatewayClient, helpers: Any) -> None:
    prompt = [30, 31, 32]  # of this test alone
    vllm = helpers.post(gateway, "/generate", {"prompt": prompt, "n": 2, "max_tokens": 8, "temperature": 0.5})
    found = gateway.lookup(
        [helpers.sequence(prompt, (ids, True)) for ids in vllm["token_ids"]] * 2
        + [helpers.sequence([9, 9], ([8], True))],
        claim=True,
    )
    assert found[4] is None
    for provenance, row in zip(found[:2], vllm["logprobs"], strict=True):
        assert provenance is not None and (provenance.policy_version, provenance.temperature) == (0, 0.5)
        logprobs = [next(iter(entry[0].values())) for entry in row]
        assert provenance.logprobs.tolist() == [0.0] * len(prompt) + logprobs
    assert [provenance.returned_before for provenance in found[:4] if provenance] == [False, False, True, True]
    assert found[0] and found[1] and found[0].key != found[1].key
    greedy = helpers.post(
        gateway, "/v1/completions", {"prompt": [5, 9], "temperature": 0, "max_tokens": 3, "return_token_ids": True}
    )
    (one,) = gateway.lookup([helpers.sequence([5, 9], (greedy["choices"][0]["token_ids"], True))], claim=False)
    assert one is not None and one.temperature == 1.0  # under which a greedy token's logprob holds


@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens_in_the_text(gateway: GatewayClient, helpers: Any, tokenizer: Any, skip: bool) -> None:
    body = {"prompt": helpers.chat, "max_tokens": 8, "temperature": 0, "skip_special_tokens": skip}
    answer = helpers.post(gateway, "/generate", body)
    assert answer["text"] == [tokenizer.decode(answer["token_ids"][0], skip_special_tokens=skip)]
    assert ("<|end|>" in answer["text"][0]) is not skip
