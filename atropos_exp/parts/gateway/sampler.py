"""From a request to completions: wait for the gate, ask the engine, cut at stop strings, record in the ledger."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from atropos_exp.parts.gateway.counters import Counters
from atropos_exp.parts.gateway.dialects.request import Completion, SamplingRequest
from atropos_exp.parts.gateway.gate import Gate
from atropos_exp.parts.gateway.ledger import CompletionLedger
from atropos_exp.parts.gateway.refusal import Refusal
from atropos_exp.parts.gateway.text import Text
from atropos_exp.parts.gateway.upstream import Answer
from atropos_exp.parts.gateway.upstreams import Upstreams
from atropos_exp.processes.wire import split
from atropos_exp.types import Floats, SamplingParams, TokenIds, TokenScores

LOWEST_LOGPROB = -9999.0  # in the place of minus infinity, which JSON cannot carry; vLLM's choice too


@dataclass(frozen=True, kw_only=True, eq=False)
class Sampler:
    """Serves the requests of all dialects from the engine behind `upstream`."""

    upstream: Upstreams
    gate: Gate
    ledger: CompletionLedger
    text: Text
    counters: Counters
    stop_token_ids: tuple[int, ...]  # the model's own
    max_sequence_length: int
    seeds: Seeds
    request_timeout_seconds: float

    async def sample(self, request: SamplingRequest) -> list[list[Completion]]:
        """The `num_samples` completions of each prompt, in order. Raises Refusal."""
        started = time.monotonic()
        room = self._room(request)
        max_tokens = room if request.max_tokens is None else min(room, request.max_tokens)
        if request.max_tokens is not None and request.max_tokens > room:
            self.counters.add("clamped_max_tokens")
        own_stops = () if request.ignore_eos else self.stop_token_ids
        params = SamplingParams(
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            max_tokens=max_tokens,
            stop_token_ids=tuple(sorted({*request.stop_token_ids, *own_stops})),
            seed=next(self.seeds) if request.seed is None else request.seed,
        )
        await self.gate.enter()
        answer = await self.upstream.generate(
            request.prompts, params, num_samples=request.num_samples, seconds=self._seconds_left(started)
        )
        return self._completions(request, answer)

    async def score(self, sequence: TokenIds, *, num_top: int) -> TokenScores:
        """Logprobs of a sequence's own tokens, at temperature 1, and of the `num_top` likeliest at each position."""
        started = time.monotonic()
        await self.gate.enter()
        scored = await self.upstream.score(
            sequence, num_top=num_top, temperature=1.0, seconds=self._seconds_left(started)
        )
        return replace(scored, logprobs=self._finite(scored.logprobs), top_logprobs=self._finite(scored.top_logprobs))

    def _seconds_left(self, started: float) -> float:
        return max(1.0, self.request_timeout_seconds - (time.monotonic() - started))

    def _room(self, request: SamplingRequest) -> int:
        """The number of tokens that fit behind the longest prompt. Raises Refusal if there is no room."""
        longest = max(len(prompt) for prompt in request.prompts)
        room = self.max_sequence_length - longest
        if room < 1:
            raise Refusal(
                400,
                "length",
                f"the prompt has {longest} tokens; prompt and completion together may have {self.max_sequence_length}",
                param="prompt",
            )
        return room

    def _completions(self, request: SamplingRequest, answer: Answer) -> list[list[Completion]]:
        assert len(answer.lengths) == len(request.prompts) * request.num_samples
        rows = zip(
            split(answer.token_ids, answer.lengths),
            split(self._finite(answer.logprobs), answer.lengths),
            answer.stopped.tolist(),
            answer.versions.tolist(),
            strict=True,
        )
        groups = []
        for prompt in request.prompts:
            self.counters.add("prompt_tokens", len(prompt))
            groups.append([self._completion(request, prompt, *row) for row in islice(rows, request.num_samples)])
        return groups

    def _completion(
        self,
        request: SamplingRequest,
        prompt: TokenIds,
        token_ids: TokenIds,
        logprobs: Floats,
        stopped: bool,
        version: int,
    ) -> Completion:
        finish = "stop" if stopped else "length"
        matched: int | str | None = int(token_ids[-1]) if stopped else None
        skip = request.skip_special_tokens
        cut = self.text.cut(token_ids, request.stops, skip_special_tokens=skip) if request.stops else None
        if cut is not None:
            num_tokens, matched = cut
            self.counters.add("stop_string_cuts")
            token_ids, logprobs, finish = token_ids[:num_tokens], logprobs[:num_tokens], "stop"
        text = self.text.decode(token_ids, skip_special_tokens=skip)
        if isinstance(matched, str):
            end = text.find(matched)
            text = text[: end + len(matched)] if request.include_stop else text[:end]
        self.counters.add("completions")
        self.counters.add("completion_tokens", len(token_ids))
        self.ledger.add(
            prompt,
            token_ids,
            logprobs,
            policy_version=version,
            temperature=request.temperature or 1.0,  # the engine reports a greedy token's logprob at 1
        )
        return Completion(
            token_ids=token_ids, logprobs=logprobs, finish=finish, matched=matched, text=text, policy_version=version
        )

    def _finite(self, logprobs: Floats) -> Floats:
        """`logprobs` within [LOWEST_LOGPROB, 0]; changed ones are counted. NaN means broken weights and is refused."""
        outside = ~((logprobs <= 0) & (logprobs >= LOWEST_LOGPROB))
        if not outside.any():
            return logprobs
        if np.isnan(logprobs).any():
            raise Refusal(503, "engine", "the engine gave logprobs that are not numbers: its weights are broken")
        self.counters.add("clamped_logprobs", int(outside.sum()))
        return np.clip(logprobs, LOWEST_LOGPROB, 0.0).astype(np.float32)


class Seeds:
    """Draws a seed of 63 bits for each request without one; no two are alike."""

    def __init__(self, seed: int, incarnation: int) -> None:
        """`incarnation` tells a restarted gateway from the one before it."""
        self._base = (seed & 0xFFFFFFFF) << 96 | (incarnation & 0xFFFFFFFF) << 64
        self._count = 0

    def __next__(self) -> int:
        import xxhash

        digest = xxhash.xxh3_64_intdigest((self._base | self._count).to_bytes(16, "little"))
        self._count += 1
        return digest >> 1
