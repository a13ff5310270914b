"""The native `/generate` of SGLang, which Atropos environments of type sglang call."""

import uuid

from atropos_exp.interfaces import JSON
from atropos_exp.parts.gateway.dialects.fields import Fields, token_ids
from atropos_exp.parts.gateway.dialects.request import Completion, take_sampling
from atropos_exp.parts.gateway.refusal import Refusal, invalid
from atropos_exp.parts.gateway.sampler import Sampler
from atropos_exp.types import TokenIds


async def generate(sampler: Sampler, body: JSON) -> JSON | list[JSON]:
    """The answer to POST /generate: an object for one completion, else a list, prompt by prompt. Raises Refusal."""
    fields = Fields(body)
    prompts, is_batch = _prompts(sampler, fields)
    with_logprobs = fields.flag("return_logprob", False)
    with_text = fields.flag("return_text_in_logprobs", False)
    parameters = fields.take("sampling_params", {})
    fields.finish()
    sampling = Fields(parameters, prefix="sampling_params.")
    request = take_sampling(
        sampling,
        prompts,
        sampler.text,
        max_names=("max_new_tokens", "max_tokens", "max_completion_tokens"),
        seed_name="sampling_seed" if "sampling_seed" in sampling else "seed",
        include_stop_name="no_stop_trim",
    )
    sampling.finish()
    groups = await sampler.sample(request)
    answers = [
        _answer(sampler, prompt, completion, with_logprobs=with_logprobs, with_text=with_text)
        for prompt, completions in zip(prompts, groups, strict=True)
        for completion in completions
    ]
    return answers if is_batch or request.num_samples > 1 else answers[0]


def _answer(
    sampler: Sampler, prompt: TokenIds, completion: Completion, *, with_logprobs: bool, with_text: bool
) -> JSON:
    num_tokens = len(completion.token_ids)
    reached = {"length": num_tokens} if completion.matched is None else {"matched": completion.matched}
    meta: JSON = {
        "id": uuid.uuid4().hex,
        "finish_reason": {"type": completion.finish, **reached},
        "prompt_tokens": len(prompt),
        "completion_tokens": num_tokens,
        "cached_tokens": 0,
        "weight_version": str(completion.policy_version),
    }
    output_ids = completion.token_ids.tolist()
    if with_logprobs:
        texts = sampler.text.token_texts(completion.token_ids) if with_text else [None] * num_tokens
        meta["input_token_logprobs"] = []
        meta["output_token_logprobs"] = list(zip(completion.logprobs.tolist(), output_ids, texts, strict=True))
    return {"text": completion.text, "output_ids": output_ids, "meta_info": meta}


def _prompts(sampler: Sampler, fields: Fields) -> tuple[tuple[TokenIds, ...], bool]:
    """The prompts, and whether they came as a list."""
    ids, text = fields.take("input_ids"), fields.take("text")
    if ids is not None and text is not None:
        raise Refusal(400, "value", "give either input_ids or text", param="text")
    if isinstance(ids, list) and ids and isinstance(ids[0], list):
        return tuple(token_ids(item, f"input_ids[{index}]") for index, item in enumerate(ids)), True
    if ids is not None:
        return (token_ids(ids, "input_ids"),), False
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, list) or not texts or not all(isinstance(item, str) for item in texts):
        raise invalid("text", text, "a text or a list of texts (or give input_ids)")
    prompts = tuple(sampler.text.encode(item, add_special_tokens=True) for item in texts)
    if not all(len(prompt) for prompt in prompts):
        raise Refusal(400, "value", "text is empty", param="text")
    return prompts, isinstance(text, list)
