"""vLLM's engine as this server uses it: requests of token ids in, finished rows out."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from atropos_exp.errors import Refused
from atropos_exp.parts.engine.vllm.adapter import ADAPTER
from atropos_exp.parts.engine.vllm.generation import Generation
from atropos_exp.types import TokenIds, TokenScores

MAX_DRAINING_STEPS = 4


class Core:
    """Wraps vLLM's `LLMEngine`, whose `add_request` and `step` are the same from 0.24 to 0.30.

        core.add(generation)
        while generation.left:
            core.step()
        core.ended.pop()  # the generation, with the tokens and logprobs of all its rows

    One thread uses it.
    """

    def __init__(self, engine: Any, *, seeded: bool) -> None:
        """`seeded`: each row has a random generator of its own, so the same request gives the same tokens."""
        self.engine = engine
        self._seeded = seeded
        self._running: dict[str, tuple[Generation, int]] = {}
        self._single: dict[str, Any] = {}  # request id -> its output, of scores and probes
        self._num_single = 0
        self._adapter: Any = None  # vLLM's LoRARequest, which goes with every prompt
        self.ended: list[Generation] = []  # whose last row has ended; the caller of `step` takes them out
        self.step_started: float | None = None  # of time.monotonic(), while a step runs
        self.num_steps = 0
        self.num_rows = 0  # finished
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0  # of these, found in the prefix cache

    @property
    def num_running(self) -> int:
        """Rows in the running batch."""
        return len(self._running)

    def add(self, generation: Generation) -> None:
        """Add all rows to the running batch. Raises Refused if vLLM does not take them."""
        params = generation.params
        for row in range(generation.num_rows):
            sampling = self._sampling(
                temperature=params.temperature,
                top_p=params.top_p,
                top_k=params.top_k,
                max_tokens=params.max_tokens,
                seed=generation.seeds[row] if self._seeded and params.temperature > 0 else None,
                stop_token_ids=list(params.stop_token_ids),
                logprobs=0,
            )
            try:
                self._add(generation.request_id(row), generation.prompt_of(row), sampling)
            except ValueError as error:
                self.abort(generation)
                raise Refused(400, f"vLLM does not take prompt {row // generation.num_samples}: {error}") from error
            self._running[generation.request_id(row)] = (generation, row)

    def abort(self, generation: Generation) -> None:
        """Remove the rows that have not ended from the running batch."""
        rows = [generation.request_id(row) for row in generation.left]
        known = [request_id for request_id in rows if self._running.pop(request_id, None) is not None]
        if known:
            self.engine.abort_request(known)

    def step(self) -> None:
        """Run one step of the model for all running rows."""
        self.step_started = time.monotonic()
        outputs = self.engine.step()
        self.step_started = None
        self.num_steps += 1
        for output in outputs:
            if not output.finished:
                continue
            if output.request_id in self._single:
                self._single[output.request_id] = output
            elif output.request_id in self._running:
                generation, row = self._running.pop(output.request_id)
                generation.take(row, output.outputs[0])
                self.num_rows += 1
                self.num_prompt_tokens += len(output.prompt_token_ids)
                self.num_cached_tokens += output.num_cached_tokens or 0
                if not generation.left:
                    self.ended.append(generation)

    def score(self, sequences: Sequence[TokenIds], *, temperature: float, num_top: int) -> list[TokenScores]:
        """The logprobs of every sequence and the `num_top` likeliest tokens. Nothing else may run meanwhile: the
        temperature applies to all logits."""
        assert not self._running
        if temperature not in (0.0, 1.0):
            self.engine.collective_rpc("atropos_score_at", args=(temperature,))
        try:
            sampling = self._sampling(temperature=0.0, max_tokens=1, prompt_logprobs=num_top)
            outputs = self._run([(sequence, sampling) for sequence in sequences if len(sequence) > 1])
        finally:
            if temperature not in (0.0, 1.0):
                self.engine.collective_rpc("atropos_score_at", args=(1.0,))
        return [
            _scored(outputs.pop(0).prompt_logprobs if len(sequence) > 1 else None, num_top) for sequence in sequences
        ]

    def draw(self, prompt: TokenIds) -> tuple[int, float, int]:
        """One greedy token after a prompt, its logprob, and how many of the prompt's tokens the prefix cache had."""
        (output,) = self._run([(prompt, self._sampling(temperature=0.0, max_tokens=1, logprobs=0))])
        completion = output.outputs[0]
        return completion.token_ids[0], completion.logprobs.logprobs[0], output.num_cached_tokens or 0

    def serve_adapter(self) -> None:
        """Use the adapter that the workers hold for every prompt from now on. It has one number and one name whatever
        it contains, so vLLM's prefix cache cannot distinguish an old one from a new one: after every change of it the
        cache must be emptied."""
        from vllm.lora.request import LoRARequest

        path = "brought by weight updates"  # where vLLM would look for it, and fail, had the workers lost it
        self._adapter = LoRARequest(lora_name="policy", lora_int_id=ADAPTER, lora_path=path)

    def ask_workers(self, method: str, *arguments: Any) -> list[Any]:
        """The results of a method of `worker.WeightWorker`, called in every worker process."""
        answers: list[Any] = self.engine.collective_rpc(method, args=arguments)
        return answers

    @property
    def can_sleep(self) -> bool:
        """Whether the engine was started with its sleep mode."""
        return bool(self.engine.vllm_config.model_config.enable_sleep_mode)

    def sleep(self) -> None:
        """Release the memory of weights, keys and values, whose content is lost. Nothing may be running, and nothing
        may run until both have been woken."""
        self.forget_prefixes()  # this also ends the step that asynchronous scheduling may be ahead
        self.engine.sleep(level=2)

    def wake(self, tag: str) -> None:
        """Allocate the memory of `weights` or `kv_cache` again. Its content is undefined."""
        self.engine.wake_up([tag])

    def forget_prefixes(self) -> None:
        """Empty the prefix cache, which vLLM never does by itself when weights change."""
        for _ in range(MAX_DRAINING_STEPS):
            if self.engine.reset_prefix_cache():
                return
            self.engine.step()  # asynchronous scheduling may be a step ahead of what has ended
        raise Refused(500, "vLLM could not reset its prefix cache: some of its blocks are in use")

    def _run(self, requests: Sequence[tuple[TokenIds, Any]]) -> list[Any]:
        """To the end, in order. What else is running goes on meanwhile."""
        names = []
        for prompt, sampling in requests:
            self._num_single += 1
            names.append(f"single-{self._num_single}")
            self._single[names[-1]] = None
            self._add(names[-1], prompt, sampling)
        while any(self._single[name] is None for name in names):
            self.step()
        return [self._single.pop(name) for name in names]

    def _add(self, request_id: str, prompt: TokenIds, sampling: Any) -> None:
        self.engine.add_request(request_id, {"prompt_token_ids": prompt.tolist()}, sampling, lora_request=self._adapter)

    def _sampling(self, **values: Any) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            ignore_eos=True,  # the request says where to stop
            detokenize=False,
            flat_logprobs=True,  # arrays instead of an object per token
            output_kind=RequestOutputKind.FINAL_ONLY,
            **values,
        )


def _scored(flat: Any, num_top: int) -> TokenScores:
    """vLLM's flat list of a prompt holds nothing for token 0; then at each place the token itself and the likeliest."""
    if flat is None:
        none = np.zeros((0, num_top), dtype=np.float32)
        return TokenScores(logprobs=none.sum(axis=1), top_token_ids=none.astype(np.int32), top_logprobs=none)
    starts = np.array(flat.start_indices[1:], dtype=np.int64)
    logprobs = np.array(flat.logprobs, dtype=np.float32)
    top = starts[:, None] + 1 + np.arange(num_top)
    return TokenScores(
        logprobs=logprobs[starts],
        top_token_ids=np.array(flat.token_ids, dtype=np.int32)[top],
        top_logprobs=logprobs[top],
    )
