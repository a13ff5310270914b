"""The thread that owns the model of engine `hf`: it decodes requests in batches and does everything else in between."""

import logging
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atropos_exp.parts.engine.hf.decode import Decoder, Rows
from atropos_exp.parts.engine.hf.weights import WeightStore
from atropos_exp.parts.engine.serving import queue
from atropos_exp.processes.wire import Message

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class Generation(queue.Generation):
    """One request and what has been decoded of it. Its rows may be decoded in several batches."""

    def __post_init__(self) -> None:
        num_rows = self.num_rows
        self.key_N = self.keys()
        self.token_ids_NR = np.zeros((num_rows, self.params.max_tokens), dtype=np.int32)
        self.logprobs_NR = np.zeros((num_rows, self.params.max_tokens), dtype=np.float32)
        self.length_N = np.zeros(num_rows, dtype=np.int64)
        self.stopped_N = np.zeros(num_rows, dtype=np.bool_)
        self.version_N = np.zeros(num_rows, dtype=np.int64)
        # Rows of similar length share batches, which saves padding.
        self.todo = deque(sorted(range(num_rows), key=lambda row: (len(self.prompt_of(row)), row)))
        self.num_left = num_rows

    def result(self) -> Message:
        """The answer, once every row has been decoded."""
        taken_NR = np.arange(self.params.max_tokens)[None, :] < self.length_N[:, None]
        return {
            "token_ids": self.token_ids_NR[taken_NR],
            "logprobs": self.logprobs_NR[taken_NR],
            "lengths": self.length_N,
            "stopped": self.stopped_N,
            "versions": self.version_N,
        }


class Scheduler(queue.RequestQueues[Generation]):
    """Decodes what is queued. `decoder` calls `on_step` between forward passes, where a waiting probe goes first."""

    def __init__(
        self, decoder: Decoder, weights: WeightStore, *, max_batch_tokens: int, batching_wait_seconds: float
    ) -> None:
        """`max_batch_tokens`: rows × (prompt + answer) tokens of one batch. `batching_wait_seconds`: an idle server
        waits this long for more requests before it decodes the first."""
        super().__init__(lambda: weights.account.problem, batching_wait_seconds=batching_wait_seconds)
        self._decoder = decoder
        self._weights = weights
        self._max_batch_tokens = max_batch_tokens
        self._in_probe = False
        self.num_batches = 0
        self.num_rows = 0

    def run_forever(self) -> None:
        """The work of the thread that owns the model."""
        while True:
            self._await_work()
            self.turn()

    def decode_now(self, generation: Generation) -> Message:
        """The answer to one request that is decoded by itself. Only for work that runs on the model's thread."""
        self._decode([(generation, row) for row in generation.todo])
        return generation.result()

    def on_step(self) -> None:
        """Called between forward passes, where only a probe may run. (A probe's own forward passes call it too.)"""
        if self._probes and not self._in_probe and self._weights.account.problem is None:
            self._in_probe = True
            try:
                self._run_all(self._probes)
            finally:
                self._in_probe = False

    def turn(self) -> None:
        """Do what can be done now: control first, then probes and scores, then one batch."""
        self._run_all(self._control)
        if (problem := self._weights.account.problem) is not None:
            self._refuse_waiting(problem)
            return
        self.on_step()
        self._run_all(self._scores)
        if not self._is_paused and self._generations:
            self._decode_batch()

    def _decode_batch(self) -> None:
        rows = self._take_rows()
        if not rows:
            return
        generations = list(dict.fromkeys(generation for generation, _ in rows))
        try:
            self._decode(rows)
            self.num_batches += 1
            self.num_rows += len(rows)
            for generation in generations:
                if generation.num_left == 0:
                    self._drop(generation)
                    if generation.done.set_running_or_notify_cancel():
                        generation.done.set_result(generation.result())
        except Exception as error:  # every client of the batch gets it, the log has the trace
            logger.exception("decoding failed")
            for generation in generations:
                self._drop(generation)
                if not generation.done.done():
                    generation.done.set_exception(error)

    def _take_rows(self) -> list[tuple[Generation, int]]:
        """The next rows, first come first served, as many as `max_batch_tokens` holds (at least one)."""
        rows: list[tuple[Generation, int]] = []
        longest_prompt = longest_answer = 0
        with self._changed:
            waiting = list(self._generations)
        for generation in waiting:
            if generation.done.cancelled():
                self._drop(generation)
                continue
            answer = max(longest_answer, generation.params.max_tokens)
            while generation.todo:
                prompt = max(longest_prompt, len(generation.prompt_of(generation.todo[0])))
                if rows and (len(rows) + 1) * (prompt + answer) > self._max_batch_tokens:
                    return rows
                rows.append((generation, generation.todo.popleft()))
                longest_prompt, longest_answer = prompt, answer
        return rows

    def _decode(self, rows: list[tuple[Generation, int]]) -> None:
        """Decode rows of generations. Sorted by prompt and key, the batch is the same whatever order they came in."""
        prompts = sorted({g.prompt_of(row).tobytes() for g, row in rows}, key=lambda raw: (len(raw), raw))
        index_of = {prompt: index for index, prompt in enumerate(prompts)}
        placed = sorted(
            ((index_of[g.prompt_of(row).tobytes()], int(g.key_N[row]), g, row) for g, row in rows),
            key=lambda place: place[:2],
        )
        params = [g.params for _, _, g, _ in placed]
        stops = {stop: index for index, stop in enumerate(sorted({p.stop_token_ids for p in params}))}

        def column(values: list[Any], dtype: Any) -> NDArray[Any]:
            return np.array(values, dtype=dtype)

        decoded = self._decoder.decode(
            Rows(
                prompts=[np.frombuffer(prompt, dtype=np.int32) for prompt in prompts],
                prompt_N=column([prompt for prompt, *_ in placed], np.int64),
                key_N=column([key for _, key, *_ in placed], np.uint64),
                temperature_N=column([p.temperature for p in params], np.float32),
                top_p_N=column([p.top_p for p in params], np.float32),
                top_k_N=column([p.top_k for p in params], np.int64),
                max_tokens_N=column([p.max_tokens for p in params], np.int64),
                stops=list(stops),
                stop_N=column([stops[p.stop_token_ids] for p in params], np.int64),
            )
        )
        for index, (_, _, generation, row) in enumerate(placed):
            length = int(decoded.length_N[index])
            generation.token_ids_NR[row, :length] = decoded.token_ids_NR[index, :length]
            generation.logprobs_NR[row, :length] = decoded.logprobs_NR[index, :length]
            generation.length_N[row] = length
            generation.stopped_N[row] = decoded.stopped_N[index]
            generation.version_N[row] = self._weights.account.version
            generation.num_left -= 1

    def _drop(self, generation: Generation) -> None:
        with self._changed:
            if generation in self._generations:
                self._generations.remove(generation)
