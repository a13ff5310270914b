"""The backend of engine `sglang`: one event loop owns SGLang's engine, and every request is a coroutine on it.

Written against SGLang 0.5.12: `async_generate`.
"""

import asyncio
import time
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np

from atropos_exp.errors import Refused
from atropos_exp.parts.engine.serving.seeds import request_keys
from atropos_exp.parts.engine.sglang.update import SchedulerUpdate
from atropos_exp.processes.wire import Message, flatten
from atropos_exp.types import SamplingParams, TokenIds, TokenScores
from atropos_exp.weights.account import UpdateAccount
from atropos_exp.weights.receiver import BucketSource

Value = TypeVar("Value")
SENTINEL_TOKENS = 64  # of a prompt that must not be found in the prefix cache after it was emptied
SCORED_TOGETHER = 8  # sequences, each of which may take a request per token
GREEDY = {"temperature": 0.0, "max_new_tokens": 1, "ignore_eos": True}


class SGLangBackend:
    """The `Backend` of engine `sglang`. All of its state belongs to the event loop `loop`."""

    def __init__(
        self,
        engine: Any,
        account: UpdateAccount,
        source: BucketSource,
        *,
        seeded: bool,
        vocab_size: int,
        max_sequence_length: int,
        versions: Mapping[str, str],
    ) -> None:
        self.loop: asyncio.AbstractEventLoop = engine.loop
        self.hub_names = True
        self.vocab_size = vocab_size
        self.max_sequence_length = max_sequence_length
        self._engine = engine
        self._account = account
        self._seeded = seeded
        self._versions = versions
        self._changed = asyncio.Condition()
        self._paused = False
        self._num_waiting = 0  # generations not answered
        self._num_in_flight = 0  # of these, in SGLang
        self._update = SchedulerUpdate(engine, account, source, num_cached=self._num_cached)

    def generate(
        self,
        prompts: Sequence[TokenIds],
        params: SamplingParams,
        *,
        num_samples: int,
        first_prompt: int,
        deadline: float,
    ) -> Future[Message]:
        return self._run(self._generate(prompts, params, num_samples, first_prompt), deadline)

    def score(
        self, sequences: Sequence[TokenIds], *, temperature: float, num_top: int, deadline: float
    ) -> Future[list[TokenScores]]:
        return self._run(self._score(sequences, temperature, num_top), deadline)

    def probe(self, *, deadline: float) -> Future[Message]:
        return self._run(self._probe(), deadline)

    def info(self) -> Message:
        return {
            "version": self._account.version,
            "problem": self._account.problem,
            "num_waiting": self._num_waiting,
            "num_resident_digests": self._update.num_resident,  # the others are of what arrived
            "num_cache_proofs": self._update.num_cache_proofs,
            "update_seconds": dict(self._account.seconds),
            "versions": dict(self._versions),
        }

    def expected(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        return self._account.expected

    def pause(self, *, deadline: float) -> Future[Any]:
        return self._run(self._pause(), deadline)

    def resume(self) -> None:
        asyncio.run_coroutine_threadsafe(self._set_paused(False), self.loop)

    def sleep(self, *, deadline: float) -> Future[Message]:
        raise Refused(400, "engine sglang cannot give its memory back")

    def begin(self, version: int, *, deadline: float) -> Future[Any]:
        return self._run(self._update.begin(version), deadline)

    def load(self, message: Message, *, deadline: float) -> Future[Any]:
        return self._run(self._update.load(message), deadline)

    def finish(self, *, deadline: float) -> Future[Any]:
        return self._run(self._finish(), deadline)

    def abort(self, *, deadline: float) -> Future[Any]:
        return self._run(self._update.abort(), deadline)

    def digests(self, *, on_device: bool, deadline: float) -> Future[Mapping[str, str]]:
        return self._run(self._update.digests(on_device=on_device), deadline)

    def is_moving(self) -> bool:
        return True  # SGLang's own watchdog ends the process when its scheduler hangs

    def _run(self, work: Coroutine[Any, Any, Value], deadline: float) -> Future[Value]:
        async def bounded() -> Value:
            try:
                return await asyncio.wait_for(work, max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                state = "paused" if self._paused else "busy"
                problem = f"; {self._account.problem}" if self._account.problem else ""
                raise Refused(503, f"held by the engine until its deadline: {state}{problem}") from None

        return asyncio.run_coroutine_threadsafe(bounded(), self.loop)

    async def _until_whole(self) -> None:
        """Weights that belong together: awaited while paused, else refused."""
        async with self._changed:
            while self._account.problem is not None:
                if not self._paused:
                    raise Refused(409, self._account.problem)
                await self._changed.wait()

    async def _generate(
        self, prompts: Sequence[TokenIds], params: SamplingParams, num_samples: int, first_prompt: int
    ) -> Message:
        self._num_waiting += 1
        try:
            while True:  # a pause may come between the two
                await self._until_whole()
                async with self._changed:
                    await self._changed.wait_for(lambda: not self._paused)
                    if self._account.problem is None:
                        self._num_in_flight += 1
                        break
            try:
                return await self._sample(prompts, params, num_samples, first_prompt)
            finally:
                async with self._changed:
                    self._num_in_flight -= 1
                    self._changed.notify_all()
        finally:
            self._num_waiting -= 1

    async def _sample(
        self, prompts: Sequence[TokenIds], params: SamplingParams, num_samples: int, first_prompt: int
    ) -> Message:
        prompt_N = np.repeat(np.arange(len(prompts)), num_samples)
        keys_N = request_keys(params.seed, len(prompts), num_samples, first_prompt=first_prompt)
        sampling: dict[str, Any] = {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k or -1,
            "max_new_tokens": params.max_tokens,
            "stop_token_ids": list(params.stop_token_ids),
            "ignore_eos": not params.stop_token_ids,  # SGLang would ignore stop_token_ids with it
        }
        seeds = [{"sampling_seed": int(key) & 0x7FFFFFFF} if self._seeded else {} for key in keys_N]
        outputs = await self._ask([prompts[int(index)] for index in prompt_N], [{**sampling, **seed} for seed in seeds])
        drawn = [output["meta_info"]["output_token_logprobs"] for output in outputs]
        token_ids, lengths = flatten([np.array([item[1] for item in row], np.int32) for row in drawn], np.int32)
        logprobs, _ = flatten([np.array([item[0] for item in row], np.float32) for row in drawn], np.float32)
        # A stop token in the last place that max_tokens allows is a length to SGLang, and to us a stop.
        stopped = [
            output["meta_info"]["finish_reason"]["type"] == "stop" or bool(row and row[-1][1] in params.stop_token_ids)
            for output, row in zip(outputs, drawn, strict=True)
        ]
        return {
            "token_ids": token_ids,
            "logprobs": logprobs,
            "lengths": lengths,
            "stopped": np.array(stopped, dtype=np.bool_),
            "versions": np.full(len(outputs), self._account.version, dtype=np.int64),
        }

    async def _score(self, sequences: Sequence[TokenIds], temperature: float, num_top: int) -> list[TokenScores]:
        await self._until_whole()
        scored: list[TokenScores] = []
        for first in range(0, len(sequences), SCORED_TOGETHER):
            scored += await self._score_few(sequences[first : first + SCORED_TOGETHER], temperature, num_top)
        return scored

    async def _score_few(self, sequences: Sequence[TokenIds], temperature: float, num_top: int) -> list[TokenScores]:
        """SGLang scores a prompt at temperature 1 only. At another one each token is asked for after its prefix: the
        logprobs of drawn tokens are at their temperature, and the prefixes are cached."""
        logprobs: list[float] = []  # of every token after a first one, sequence by sequence
        tops: list[list[Any]] = []  # the likeliest there, as (logprob, token, text)
        if temperature in (0.0, 1.0):
            whole = [GREEDY] * len(sequences)
            for output in await self._ask(sequences, whole, logprob_start_len=0, top_logprobs_num=num_top):
                found = output["meta_info"]
                logprobs += [item[0] for item in found["input_token_logprobs"][1:]]
                tops += found["input_top_logprobs"][1:] if num_top else []
        elif places := [(sequence, end) for sequence in sequences for end in range(1, len(sequence))]:
            outputs = await self._ask(
                [sequence[:end] for sequence, end in places],
                [{**GREEDY, "temperature": temperature}] * len(places),
                token_ids_logprob=[[int(sequence[end])] for sequence, end in places],
                top_logprobs_num=num_top,
            )
            logprobs = [output["meta_info"]["output_token_ids_logprobs"][0][0][0] for output in outputs]
            tops = [output["meta_info"]["output_top_logprobs"][0] for output in outputs] if num_top else []
        shape = (len(logprobs), num_top)
        arrays = (
            np.array(logprobs, np.float32),
            np.array([[item[1] for item in top] for top in tops], np.int32).reshape(shape),
            np.array([[item[0] for item in top] for top in tops], np.float32).reshape(shape),
        )
        ends = np.cumsum([len(sequence) - 1 for sequence in sequences])[:-1]
        rows = zip(*(np.split(array, ends) for array in arrays), strict=True)
        return [TokenScores(logprobs=row, top_token_ids=ids, top_logprobs=top) for row, ids, top in rows]

    async def _probe(self) -> Message:
        await self._until_whole()
        (output,) = await self._ask([np.zeros(1, np.int32)], [GREEDY])
        logprob, token = output["meta_info"]["output_token_logprobs"][0][:2]
        if not np.isfinite(logprob):
            raise Refused(409, f"the model gives the logprob {logprob}: its weights are not finite")
        return {"token_id": token, "version": self._account.version}

    async def _pause(self) -> None:
        await self._set_paused(True)
        async with self._changed:
            await self._changed.wait_for(lambda: self._num_in_flight == 0)

    async def _set_paused(self, paused: bool) -> None:
        async with self._changed:
            self._paused = paused
            self._changed.notify_all()

    async def _finish(self) -> None:
        await self._update.finish()
        async with self._changed:
            self._changed.notify_all()

    async def _num_cached(self) -> int:
        """Tokens of the sentinel prompt that the prefix cache knows; afterwards it knows them all."""
        (output,) = await self._ask([np.zeros(min(SENTINEL_TOKENS, self.max_sequence_length), np.int32)], [GREEDY])
        return int(output["meta_info"]["cached_tokens"])

    async def _ask(self, prompts: Sequence[TokenIds], sampling: list[dict[str, Any]], **more: Any) -> list[Any]:
        outputs: list[Any] = await self._engine.async_generate(
            input_ids=[prompt.tolist() for prompt in prompts], sampling_params=sampling, return_logprob=True, **more
        )
        return outputs
