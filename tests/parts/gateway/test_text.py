"""Stop strings and messages, against hand-made cases and a plain search."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from atropos_exp.parts.gateway.client import GatewayClient
from atropos_exp.parts.gateway.refusal import Refusal
from atropos_exp.parts.gateway.text import Text, checked
from tests.helpers.processes import has_pytorch


@pytest.fixture(scope="module")
def text(helpers: Any) -> Text:
    return Text(helpers.weights)


@pytest.mark.parametrize(
    ("whole", "stops", "kept", "matched"),
    [
        ("12\n34", ["\n"], "12\n", "\n"),
        ("12\n34", ["4", "\n"], "12\n", "\n"),  # the first in the text, not in the list
        ("abcabc", ["bc"], "abc", "bc"),
        ("abcabc", ["bc", "abc"], "abc", "abc"),  # both end at one token: the one that starts first
        ("abc", ["b", "bc"], "ab", "b"),
        ("abc", ["abc"], "abc", "abc"),
        ("abc", ["d", "ca"], None, None),
        ("één", ["é"], "é", "é"),  # of two tokens each
        ("één", ["én"], "één", "én"),
        ("x🙂y", ["🙂"], "x🙂", "🙂"),
    ],
)
def test_cuts_by_hand(text: Text, whole: str, stops: list[str], kept: str | None, matched: str | None) -> None:
    token_ids = text.encode(whole, add_special_tokens=False)
    assert len(token_ids) == len(whole.encode())  # tiny has a token per byte
    found = text.cut(token_ids, stops, skip_special_tokens=True)
    assert found == (None if kept is None else (len(kept.encode()), matched))


def test_cuts_of_random_tokens_against_a_plain_search(text: Text) -> None:
    generator = np.random.default_rng(0)
    num_cut = 0
    for _ in range(300):
        token_ids = generator.choice([1, 20, 21, 22, 37, 38], size=generator.integers(1, 20)).astype(np.int32)
        letters = [generator.choice(list("012AB"), size=generator.integers(1, 4)) for _ in range(generator.integers(4))]
        stops = ["".join(row) for row in letters]
        texts = [text.decode(token_ids[:end], skip_special_tokens=True) for end in range(len(token_ids) + 1)]
        ends = [end for end, part in enumerate(texts) if any(stop in part for stop in stops)]
        found = text.cut(token_ids, stops, skip_special_tokens=True)
        assert (None if found is None else found[0]) == (ends[0] if ends else None)
        if found is not None:
            num_cut += 1
            assert texts[ends[0]].find(found[1]) == min(i for s in stops if (i := texts[ends[0]].find(s)) >= 0)
    assert 50 < num_cut < 250


def test_special_tokens_are_those_of_the_file(text: Text) -> None:
    assert text.special_token("<|end|>") == 1
    assert text.special_token("<|endoftext|>") is None  # added by the tokenizer's class; the model has no row for it
    assert text.special_token("x") is None


def test_its_process_has_no_pytorch(gateway: GatewayClient) -> None:
    assert not has_pytorch(gateway.process.pid)


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_end_a_request(gateway: GatewayClient, helpers: Any, include: bool) -> None:
    """A long answer without stop strings tells where the cut must be."""
    body = {"prompt": [50, 51, 52], "max_tokens": 30, "temperature": 1.5, "ignore_eos": True, "seed": 4}
    free = helpers.post(gateway, "/generate", body)
    text, tokens = free["text"][0], free["token_ids"][0]
    places = range(3, len(text) - 1)
    stop = next(text[i : i + 2] for i in places if text[i : i + 2].isascii() and "�" not in text[: i + 2])
    before = gateway.counters()["stop_string_cuts"]
    cut = helpers.post(
        gateway, "/generate", {**body, "stop": [stop, "no such text"], "include_stop_str_in_output": include}
    )
    kept = text[: text.find(stop) + (len(stop) if include else 0)]
    assert cut["text"] == [kept] and cut["finish_reasons"] == ["stop"]
    length = len(cut["token_ids"][0])
    assert cut["token_ids"] == [tokens[:length]] and cut["logprobs"] == [free["logprobs"][0][:length]]
    assert gateway.counters()["stop_string_cuts"] == before + 1
    assert length < 30
    sglang = {"max_new_tokens": 30, "temperature": 1.5, "ignore_eos": True, "seed": 4, "stop": stop}
    answer = helpers.post(
        gateway, "/generate", {"input_ids": [50, 51, 52], "sampling_params": {**sglang, "no_stop_trim": include}}
    )
    assert answer["text"] == kept and answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    chat = helpers.post(gateway, "/v1/completions", {**body, "stop": stop, "include_stop_str_in_output": include})
    assert (chat["choices"][0]["text"], chat["choices"][0]["stop_reason"]) == (kept, stop)


def test_the_ledger_keeps_the_cut_completion(gateway: GatewayClient, helpers: Any) -> None:
    prompt = [60, 61, 62]
    body = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    cut = helpers.post(gateway, "/generate", {**body, "stop": [chr(33 + k) for k in range(94)]})
    length = len(cut["token_ids"][0])
    assert length < 12
    free = [20, *cut["token_ids"][0]]  # not sampled
    kept, longer, other = gateway.lookup(
        [
            helpers.sequence(prompt, (cut["token_ids"][0], True)),
            helpers.sequence(prompt, (cut["token_ids"][0] + [20], True)),
            helpers.sequence(prompt, (free, True)),
        ],
        claim=False,
    )
    assert kept is not None and longer is None and other is None


def test_a_special_token_as_stop_string_stops_the_engine(gateway: GatewayClient, helpers: Any) -> None:
    body = {"prompt": helpers.chat, "max_tokens": 20, "temperature": 0, "ignore_eos": True, "stop": ["<|end|>"]}
    answer = helpers.post(gateway, "/generate", body)
    assert answer["token_ids"][0][-1] == helpers.stop and answer["finish_reasons"] == ["stop"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "messages must be a list of at least one message"),
        ([], "messages must be a list"),
        (["hi"], r"messages\[0\] must be an object with a role"),
        ([{"role": "user", "content": 3}], "content must be text; got 3"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "only parts of type text"),
    ],
)
def test_messages_that_cannot_be_shown(messages: Any, message: str) -> None:
    with pytest.raises(Refusal, match=message):
        checked(messages)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ('{"a": 12, "b": [1]}', {"a": 12, "b": [1]}),
        ("", {}),
        ({"a": 12}, {"a": 12}),
        ("12", "12"),
        ("not JSON", "not JSON"),
    ],
)
def test_arguments_of_tool_calls_reach_the_template_as_objects(arguments: Any, shown: Any) -> None:
    """As the templates of Qwen, Llama and others expect: `arguments | tojson` of text would encode it again."""
    call = {"id": "c1", "type": "function", "function": {"name": "calc", "arguments": arguments}}
    [message] = checked([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert message["tool_calls"] == [{**call, "function": {"name": "calc", "arguments": shown}}]
    assert message["content"] == "" and call["function"] == {"name": "calc", "arguments": arguments}
    for other in (None, "x", ["x"]):
        [message] = checked([{"role": "assistant", "content": "", "tool_calls": other}])
        assert message["tool_calls"] == other


def test_a_template_that_fails_is_a_refusal(text: Text) -> None:
    def chat(messages: Any, **changes: Any) -> Any:
        values = {"tools": None, "add_generation_prompt": True, "continue_final_message": False, "extra": {}}
        return text.chat(messages, **{**values, **changes})

    message = [{"role": "user", "content": "hi"}]
    assert chat(message).tolist() == [3, *text.encode("hi", add_special_tokens=False).tolist(), 4]
    with pytest.raises(Refusal, match="the chat template cannot render the messages"):
        chat(message, continue_final_message=True)  # and a generation prompt: a contradiction
    with pytest.raises(Refusal, match="template does not show tools"):
        chat(message, tools=[{"type": "function"}])
