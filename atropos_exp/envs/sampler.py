"""Samples from the engine through atroposlib's server manager: token ids in, token ids and logprobs out."""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from atropos_exp.runs.seeds import derive_seed
from atropos_exp.types import Finish, Sample, SamplingParams, TokenIds

MAX_COMPLETIONS = 8  # per call: atroposlib would split a larger one into calls with equal seeds
Ids = Sequence[int]


class SamplerError(RuntimeError):
    """The server's answer cannot be used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledTurn:
    """One completion as an environment gets it. Its fields are plain lists, ready for JSON."""

    prompt_ids: list[int]  # as the server took it
    token_ids: list[int]  # [R], the stop token included when it ended the turn
    logprobs: list[float]  # [R], nats
    finish: Finish


class EnvSampler:
    """Samples from `server`, an atroposlib ServerManager whose servers speak the vLLM or the SGLang dialect."""

    def __init__(self, server: Any) -> None:
        self._server = server

    async def complete(
        self, prompt_ids: Ids, params: SamplingParams, *, num_samples: int, split: str = "train"
    ) -> list[SampledTurn]:
        """`num_samples` completions of one prompt [P]. Each call that this takes has a seed of its own.

        Raises SamplerError if the server's answer cannot be used."""
        sizes = [min(MAX_COMPLETIONS, num_samples - done) for done in range(0, num_samples, MAX_COMPLETIONS)]
        calls = [
            self._call(prompt_ids, replace(params, seed=derive_seed(params.seed, call)), size, split)
            for call, size in enumerate(sizes)
        ]
        return [completion for answer in await asyncio.gather(*calls) for completion in answer]

    async def _call(self, prompt_ids: Ids, params: SamplingParams, num_samples: int, split: str) -> list[SampledTurn]:
        taken, token_ids, logprobs, finishes = await self._server.tokens_and_logprobs_completion(
            input_ids=[int(token) for token in prompt_ids],
            n=num_samples,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k or -1,  # off, in both dialects
            max_tokens=params.max_tokens,
            stop_token_ids=list(params.stop_token_ids),
            seed=params.seed,
            split=split,
        )
        if not len(token_ids) == len(logprobs) == len(finishes) == num_samples:
            raise SamplerError(f"asked for {num_samples} completions, got {len(token_ids)}")
        return [
            _completion(list(taken), ids, values, finish)
            for ids, values, finish in zip(token_ids, logprobs, finishes, strict=True)
        ]


def _completion(prompt_ids: list[int], token_ids: list[int], logprobs: list[float], finish: object) -> SampledTurn:
    reason = finish.get("type") if isinstance(finish, dict) else finish  # SGLang's is an object
    if reason not in (Finish.STOP.value, Finish.LENGTH.value):
        raise SamplerError(f"a completion ended with {reason!r}; expected stop or length")
    if len(token_ids) != len(logprobs) or not all(map(math.isfinite, logprobs)):
        raise SamplerError(f"{len(token_ids)} tokens came with {len(logprobs)} logprobs, not all of them finite")
    return SampledTurn(prompt_ids=prompt_ids, token_ids=token_ids, logprobs=logprobs, finish=Finish(reason))


class SamplerEngine:
    """The part of an `Engine` that held-out evaluation uses, for a thread beside the event loop `loop`."""

    def __init__(self, sampler: EnvSampler, loop: asyncio.AbstractEventLoop, *, timeout_seconds: float) -> None:
        self._sampler = sampler
        self._loop = loop
        self._timeout_seconds = timeout_seconds

    def generate(self, prompts: Sequence[TokenIds], params: SamplingParams, *, num_samples: int) -> list[list[Sample]]:
        """See `Engine.generate`. Prompt i has its own seed, derived from i. Raises SamplerError after the timeout."""
        waiting = asyncio.run_coroutine_threadsafe(self._generate(prompts, params, num_samples), self._loop)
        try:
            return waiting.result(self._timeout_seconds)
        except TimeoutError:
            waiting.cancel()
            what = f"{num_samples} completions of each of {len(prompts)} held-out prompts"
            raise SamplerError(f"waited {self._timeout_seconds:g} s (env.worker_timeout) for {what}") from None

    async def _generate(
        self, prompts: Sequence[TokenIds], params: SamplingParams, num_samples: int
    ) -> list[list[Sample]]:
        calls = [
            self._sampler.complete(
                prompt.tolist(),
                replace(params, seed=derive_seed(params.seed, index)),
                num_samples=num_samples,
                split="eval",
            )
            for index, prompt in enumerate(prompts)
        ]
        return [[_sample(completion) for completion in group] for group in await asyncio.gather(*calls)]


def _sample(completion: SampledTurn) -> Sample:
    return Sample(
        token_ids=np.array(completion.token_ids, dtype=np.int32),
        logprobs=np.array(completion.logprobs, dtype=np.float32),
        finish=completion.finish,
        policy_version=0,  # environments do not learn which weights answered; the gateway's ledger knows
    )
