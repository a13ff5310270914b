"""`/v1/completions`, `/v1/chat/completions` and `/v1/models`, as the openai client expects them."""

import time
import uuid

import numpy as np

from atropos_exp.interfaces import JSON
from atropos_exp.parts.gateway.dialects.fields import Fields, token_ids
from atropos_exp.parts.gateway.dialects.request import Completion, take_sampling
from atropos_exp.parts.gateway.refusal import Refusal, invalid, unsupported
from atropos_exp.parts.gateway.sampler import Sampler
from atropos_exp.types import TokenIds


async def completions(sampler: Sampler, model: str, body: JSON) -> JSON:
    """The answer to POST /v1/completions. Raises Refusal."""
    fields = Fields(body)
    prompts = _prompts(sampler, fields)
    num_logprobs = fields.integer("logprobs", None, 0, 1 << 31)
    if num_logprobs:
        raise unsupported("logprobs", num_logprobs, "set it to 0: the logprob of each sampled token")
    with_ids = fields.flag("return_token_ids", False)
    request = take_sampling(fields, prompts, sampler.text)
    best_of = fields.integer("best_of", None, 1, 1 << 31)
    if best_of not in (None, request.num_samples):
        raise unsupported("best_of", best_of, "leave it out or set it to n")
    fields.finish()
    groups = await sampler.sample(request)
    choices: list[JSON] = []
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            choice: JSON = {
                "index": len(choices),
                "text": completion.text,
                "finish_reason": completion.finish,
                "stop_reason": completion.matched,
                "logprobs": None if num_logprobs is None else _completion_logprobs(sampler, completion),
            }
            if with_ids:
                choice |= {"token_ids": completion.token_ids.tolist(), "prompt_token_ids": prompt.tolist()}
            choices.append(choice)
    return _answer("cmpl", "text_completion", model, prompts, groups, choices)


async def chat(sampler: Sampler, model: str, body: JSON) -> JSON:
    """The answer to POST /v1/chat/completions. Raises Refusal."""
    fields = Fields(body)
    prompt = _chat_prompt(sampler, fields)
    with_logprobs = fields.flag("logprobs", False)
    with_ids = fields.flag("return_token_ids", False)
    request = take_sampling(fields, (prompt,), sampler.text, max_names=("max_completion_tokens", "max_tokens"))
    fields.finish()
    groups = await sampler.sample(request)
    choices: list[JSON] = []
    for index, completion in enumerate(groups[0]):
        choice: JSON = {
            "index": index,
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "finish_reason": completion.finish,
            "stop_reason": completion.matched,
            "logprobs": {"content": _chat_logprobs(sampler, completion)} if with_logprobs else None,
        }
        if with_ids:
            choice["token_ids"] = completion.token_ids.tolist()
        choices.append(choice)
    answer = _answer("chatcmpl", "chat.completion", model, (prompt,), groups, choices)
    if with_ids:
        answer["prompt_token_ids"] = prompt.tolist()
    return answer


def models(model: str, max_sequence_length: int, started: int) -> JSON:
    """The answer to GET /v1/models: the one model that is served. `started` is in seconds since 1970."""
    entry = {
        "id": model,
        "object": "model",
        "created": started,
        "owned_by": "atropos_exp",
        "max_model_len": max_sequence_length,
    }
    return {"object": "list", "data": [entry]}


def _answer(
    prefix: str,
    kind: str,
    model: str,
    prompts: tuple[TokenIds, ...],
    groups: list[list[Completion]],
    choices: list[JSON],
) -> JSON:
    num_prompt = sum(map(len, prompts))
    num_completion = sum(len(completion.token_ids) for group in groups for completion in group)
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "choices": choices,
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_completion,
            "total_tokens": num_prompt + num_completion,
        },
    }


def _prompts(sampler: Sampler, fields: Fields) -> tuple[TokenIds, ...]:
    prompt = fields.take("prompt")
    special = fields.flag("add_special_tokens", True)
    if isinstance(prompt, str):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise invalid("prompt", prompt, "a text, a list of texts, a list of token ids or a list of such lists")
    if not isinstance(prompt[0], str | list):
        return (token_ids(prompt, "prompt"),)
    prompts = []
    for index, item in enumerate(prompt):
        if isinstance(item, str):
            encoded = sampler.text.encode(item, add_special_tokens=special)
            if not len(encoded):
                raise Refusal(400, "value", f"prompt[{index}] is empty", param="prompt")
            prompts.append(encoded)
        else:
            prompts.append(token_ids(item, f"prompt[{index}]"))
    return tuple(prompts)


def _chat_prompt(sampler: Sampler, fields: Fields) -> TokenIds:
    tools = fields.take("tools") or None
    choice = fields.take("tool_choice", "auto")
    if choice not in ("auto", "none"):
        raise unsupported("tool_choice", choice, "only auto and none are: the model decides")
    if tools is not None and (not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools)):
        raise invalid("tools", tools, "a list of objects")
    extra = fields.take("chat_template_kwargs", {})
    if not isinstance(extra, dict) or extra.keys() & {"tokenize", "return_dict", "chat_template", "conversation"}:
        raise invalid("chat_template_kwargs", extra, "an object with variables of the chat template")
    continue_final_message = fields.flag("continue_final_message", False)
    prompt = sampler.text.chat(
        fields.take("messages"),
        tools=tools if choice == "auto" else None,
        add_generation_prompt=fields.flag("add_generation_prompt", not continue_final_message),
        continue_final_message=continue_final_message,
        extra=extra,
    )
    if not len(prompt):
        raise Refusal(400, "value", "the chat template makes an empty prompt of the messages", param="messages")
    return prompt


def _completion_logprobs(sampler: Sampler, completion: Completion) -> JSON:
    texts = sampler.text.token_texts(completion.token_ids)
    offsets = np.cumsum([0, *map(len, texts)])[:-1].tolist()
    logprobs = completion.logprobs.tolist()
    return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": None, "text_offset": offsets}


def _chat_logprobs(sampler: Sampler, completion: Completion) -> list[JSON]:
    texts = sampler.text.token_texts(completion.token_ids)
    return [
        {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
        for text, logprob in zip(texts, completion.logprobs.tolist(), strict=True)
    ]
