"""The `/generate` that Atropos environments of type vllm call (stock vLLM has none): tokens in, tokens out."""

from typing import Any

from atropos_exp.interfaces import JSON
from atropos_exp.parts.gateway.dialects.fields import Fields, token_ids
from atropos_exp.parts.gateway.dialects.request import take_sampling
from atropos_exp.parts.gateway.refusal import Refusal, invalid, unsupported
from atropos_exp.parts.gateway.sampler import Sampler
from atropos_exp.types import TokenIds, TokenScores

MAX_PROMPT_LOGPROBS = 1024


async def generate(sampler: Sampler, body: JSON) -> JSON:
    """The answer to POST /generate, in which `logprobs[completion][token]` is [{id: logprob}], the stop token included.

    It has the form of the vLLM server in Atropos' example_trainer. Raises Refusal.
    """
    fields = Fields(body)
    prompt = _prompt(sampler, fields.take("prompt"))
    num_logprobs = fields.integer("logprobs", None, 0, 1 << 31)
    if num_logprobs:
        raise unsupported("logprobs", num_logprobs, "set it to 0: the logprob of each sampled token")
    num_top = fields.integer("prompt_logprobs", None, 0, MAX_PROMPT_LOGPROBS)
    max_names = ("max_tokens", "max_completion_tokens", "max_new_tokens")
    request = take_sampling(fields, (prompt,), sampler.text, max_names=max_names)
    fields.finish()
    (completions,) = await sampler.sample(request)
    answer: JSON = {
        "text": [completion.text for completion in completions],
        "prompt": sampler.text.decode(prompt, skip_special_tokens=False),
        "finish_reasons": [completion.finish for completion in completions],
        "logprobs": [
            [
                [{str(token): logprob}]
                for token, logprob in zip(completion.token_ids.tolist(), completion.logprobs.tolist(), strict=True)
            ]
            for completion in completions
        ],
        "prompt_token_ids": prompt.tolist(),
        "token_ids": [completion.token_ids.tolist() for completion in completions],
    }
    if num_top is not None:
        answer["prompt_logprobs"] = prompt_logprobs(prompt, await sampler.score(prompt, num_top=num_top))
    return answer


def prompt_logprobs(prompt: TokenIds, scored: TokenScores) -> list[dict[str, float] | None]:
    """One entry per prompt token: None for the first, then {id: logprob} with the token itself before the likeliest."""
    entries: list[dict[str, float] | None] = [None]
    rows = zip(
        prompt[1:].tolist(),
        scored.logprobs.tolist(),
        scored.top_token_ids.tolist(),
        scored.top_logprobs.tolist(),
        strict=True,
    )
    for token, logprob, top_ids, top_logprobs in rows:
        entry = {str(token): logprob}
        for top_id, top_logprob in zip(top_ids, top_logprobs, strict=True):
            entry.setdefault(str(top_id), top_logprob)
        entries.append(entry)
    return entries


def _prompt(sampler: Sampler, prompt: Any) -> TokenIds:
    if isinstance(prompt, dict):
        for name in prompt.keys() - {"prompt_token_ids", "prompt"}:
            if prompt[name] is not None:
                raise unsupported(f"prompt.{name}", prompt[name], "leave it out")
        if prompt.get("prompt_token_ids") is not None:
            return token_ids(prompt["prompt_token_ids"], "prompt.prompt_token_ids")
        prompt = prompt.get("prompt")
    if isinstance(prompt, list):
        return token_ids(prompt, "prompt")
    if not isinstance(prompt, str):
        raise invalid("prompt", prompt, 'a text or {"prompt_token_ids": [...]}')
    encoded = sampler.text.encode(prompt, add_special_tokens=True)
    if not len(encoded):
        raise Refusal(400, "value", "prompt is empty", param="prompt")
    return encoded
