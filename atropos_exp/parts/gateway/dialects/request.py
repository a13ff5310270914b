"""A request for completions and its results, independent of the dialect that it came in."""

from dataclasses import dataclass

from atropos_exp.parts.gateway.dialects.fields import Fields, token_ids
from atropos_exp.parts.gateway.refusal import invalid
from atropos_exp.parts.gateway.text import Text
from atropos_exp.types import Floats, TokenIds

LOWEST_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.0  # logits over a lower one overflow
MAX_SAMPLES = 4096  # completions of one prompt in one request


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SamplingRequest:
    """Asks for `num_samples` completions of each prompt. Where a field is None, the gateway chooses."""

    prompts: tuple[TokenIds, ...]
    num_samples: int
    temperature: float
    top_p: float
    top_k: int  # 0: off
    max_tokens: int | None  # None: the rest of the context
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool  # do not stop at the model's own stop tokens
    stops: tuple[str, ...]
    include_stop: bool  # keep the stop string in the text
    skip_special_tokens: bool  # in the text
    seed: int | None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Completion:
    """One completion, as its sender gets it and the ledger keeps it."""

    token_ids: TokenIds  # [R]
    logprobs: Floats  # [R], nats, finite, at most 0
    finish: str  # "stop" or "length"
    matched: int | str | None  # the stop token or stop string that ended it
    text: str
    policy_version: int


def take_sampling(
    fields: Fields,
    prompts: tuple[TokenIds, ...],
    text: Text,
    *,
    max_names: tuple[str, ...] = ("max_tokens",),
    seed_name: str = "seed",
    include_stop_name: str = "include_stop_str_in_output",
) -> SamplingRequest:
    """Take the parameters that all dialects share out of `fields`; the names are how this dialect may call the limit of
    tokens, the seed, and the wish to keep the stop string. Raises Refusal."""
    limits = {name: fields.integer(name, None, 1, 1 << 31) for name in max_names}
    given = {name: limit for name, limit in limits.items() if limit is not None}
    if len(set(given.values())) > 1:
        raise invalid(" and ".join(given), given, "one and the same limit")
    max_tokens = next(iter(given.values()), None)
    top_p = fields.number("top_p", 1.0, 0.0, 1.0)
    if top_p == 0.0:
        raise invalid("top_p", top_p, "above 0 and at most 1 (1 turns it off)")
    temperature = fields.number("temperature", 1.0, 0.0, MAX_TEMPERATURE)
    if 0.0 < temperature < LOWEST_TEMPERATURE:
        raise invalid("temperature", temperature, f"0 (greedy), or from {LOWEST_TEMPERATURE:g} to {MAX_TEMPERATURE:g}")
    ids = fields.take("stop_token_ids") or None
    stop_token_ids = set() if ids is None else set(token_ids(ids, "stop_token_ids").tolist())
    stops = []
    for stop in fields.texts("stop"):
        token = text.special_token(stop)
        if token is None:
            stops.append(stop)
        else:  # the engine can stop there by itself
            stop_token_ids.add(token)
    return SamplingRequest(
        prompts=prompts,
        num_samples=fields.count("n", 1, 1, MAX_SAMPLES),
        temperature=temperature,
        top_p=top_p,
        top_k=max(0, fields.count("top_k", 0, -1, 1 << 31)),
        max_tokens=max_tokens,
        stop_token_ids=tuple(sorted(stop_token_ids)),
        ignore_eos=fields.flag("ignore_eos", False),
        stops=tuple(stops),
        include_stop=fields.flag(include_stop_name, False),
        skip_special_tokens=fields.flag("skip_special_tokens", True),
        seed=fields.integer(seed_name, None, -(1 << 63), (1 << 64) - 1),
    )
