"""One thread that owns the model: it decodes what is queued in batches and does everything else in between."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atropos_exp.errors import Refused
from atropos_exp.parts.engine.hf.decode import Decoder, Rows
from atropos_exp.parts.engine.hf.weights import WeightStore
from atropos_exp.parts.engine.serving.seeds import row_keys
from atropos_exp.types import SamplingParams, TokenIds

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class Generation:
    """One request: `num_samples` completions of each prompt. Its rows may be decoded in several batches."""

    prompts: Sequence[TokenIds]
    params: SamplingParams
    num_samples: int
    deadline: float  # of time.monotonic()
    first_prompt: int = 0  # place of the first one in the call that this is a part of
    done: Future[dict[str, Any]] = field(default_factory=Future)

    def __post_init__(self) -> None:
        num_rows = len(self.prompts) * self.num_samples
        self.prompt_N = np.repeat(np.arange(len(self.prompts)), self.num_samples)
        sample_N = np.tile(np.arange(self.num_samples), len(self.prompts))
        self.key_N = row_keys(self.params.seed, self.first_prompt + self.prompt_N, sample_N)
        self.token_ids_NR = np.zeros((num_rows, self.params.max_tokens), dtype=np.int32)
        self.logprobs_NR = np.zeros((num_rows, self.params.max_tokens), dtype=np.float32)
        self.length_N = np.zeros(num_rows, dtype=np.int64)
        self.stopped_N = np.zeros(num_rows, dtype=np.bool_)
        self.version_N = np.zeros(num_rows, dtype=np.int64)
        # Rows of similar length share batches, which saves padding.
        self.todo = deque(sorted(range(num_rows), key=lambda row: (len(self.prompt_of(row)), row)))
        self.num_left = num_rows

    def prompt_of(self, row: int) -> TokenIds:
        return self.prompts[int(self.prompt_N[row])]

    def result(self) -> dict[str, Any]:
        taken_NR = np.arange(self.params.max_tokens)[None, :] < self.length_N[:, None]
        return {
            "token_ids": self.token_ids_NR[taken_NR],
            "logprobs": self.logprobs_NR[taken_NR],
            "lengths": self.length_N,
            "stopped": self.stopped_N,
            "versions": self.version_N,
        }


@dataclass(kw_only=True, eq=False)
class Call:
    """Anything else that needs the model."""

    work: Callable[[], Any]
    deadline: float
    done: Future[Any] = field(default_factory=Future)

    def run(self) -> None:
        if self.done.set_running_or_notify_cancel():
            try:
                self.done.set_result(self.work())
            except Refused as refusal:
                self.done.set_exception(refusal)
            except Exception as error:  # the client is told, the log has the trace
                logger.exception("a call failed")
                self.done.set_exception(error)


class Scheduler:
    """Queues of the server. `decoder` calls `on_step` between forward passes, where a waiting probe goes first."""

    def __init__(
        self, decoder: Decoder, weights: WeightStore, *, max_batch_tokens: int, batching_wait_seconds: float
    ) -> None:
        self._decoder = decoder
        self._weights = weights
        self._max_batch_tokens = max_batch_tokens
        self._batching_wait_seconds = batching_wait_seconds
        self._changed = threading.Condition()
        self._control: deque[Call] = deque()  # weight updates and such: always run, between batches
        self._probes: deque[Call] = deque()  # need complete weights; run even when paused, between forward passes
        self._scores: deque[Call] = deque()  # need complete weights; run even when paused, between batches
        self._generations: deque[Generation] = deque()
        self._paused = False
        self._in_probe = False
        self.num_batches = 0
        self.num_rows = 0

    @property
    def num_waiting(self) -> int:
        """Generations not finished yet."""
        return len(self._generations)

    def submit(self, generation: Generation) -> Future[dict[str, Any]]:
        self._put(self._generations, generation)
        return generation.done

    def control(self, work: Callable[[], Any], *, deadline: float) -> Future[Any]:
        return self._put(self._control, Call(work=work, deadline=deadline))

    def probe(self, work: Callable[[], Any], *, deadline: float) -> Future[Any]:
        return self._put(self._probes, Call(work=work, deadline=deadline))

    def score(self, work: Callable[[], Any], *, deadline: float) -> Future[Any]:
        return self._put(self._scores, Call(work=work, deadline=deadline))

    def pause(self, *, deadline: float) -> Future[Any]:
        """Hold generations from now on; the result comes when the batch in flight has ended."""
        with self._changed:
            self._paused = True
        return self.control(lambda: None, deadline=deadline)

    def resume(self) -> None:
        with self._changed:
            self._paused = False
            self._changed.notify()

    def run_forever(self) -> None:
        while True:
            with self._changed:
                while not self._is_runnable():
                    idle = not self._generations
                    self._changed.wait(timeout=0.25)
                    self.expire()
                    if idle and self._generations and self._batching_wait_seconds:
                        # Requests that were sent together arrive one after the other: let them share a batch.
                        self._changed.wait_for(lambda: False, timeout=self._batching_wait_seconds)
            self.turn()

    def decode_now(self, generation: Generation) -> dict[str, Any]:
        """Decode one request by itself. For work that already runs on this thread."""
        self._decode([generation], [list(generation.todo)])
        return generation.result()

    def on_step(self) -> None:
        """Between forward passes: only a probe may cut in. (Its own forward passes come here too.)"""
        if self._probes and not self._in_probe and self._weights.problem is None:
            self._in_probe = True
            try:
                self._drain(self._probes)
            finally:
                self._in_probe = False

    def _put(self, queue: deque[Any], item: Any) -> Future[Any]:
        with self._changed:
            queue.append(item)
            self._changed.notify()
        done: Future[Any] = item.done
        return done

    def _is_runnable(self) -> bool:
        if self._control:
            return True
        held = self._paused and self._weights.problem is not None
        return bool((self._probes or self._scores) and not held) or bool(self._generations and not self._paused)

    def turn(self) -> None:
        """Do what can be done now: control first, then probes and scores, then one batch."""
        self._drain(self._control)
        problem = self._weights.problem
        if problem is not None:
            if not self._paused:
                for queue in (self._probes, self._scores, self._generations):
                    self._refuse(queue, 409, problem)
            return
        self.on_step()
        self._drain(self._scores)
        if not self._paused and self._generations:
            self._decode_batch()

    def _drain(self, queue: deque[Call]) -> None:
        while queue:
            queue.popleft().run()

    def _refuse(self, queue: deque[Any], status: int, reason: str) -> None:
        while queue:
            item = queue.popleft()
            if not item.done.done():
                item.done.set_exception(Refused(status, reason))

    def expire(self) -> None:
        """Whoever waited too long is told what for."""
        now = time.monotonic()
        state = "paused" if self._paused else "busy"
        if self._weights.problem is not None:
            state += f"; {self._weights.problem}"
        queues: list[deque[Any]] = [self._probes, self._scores, self._generations]
        for queue in queues:
            late = [item for item in queue if item.deadline < now]
            for item in late:
                queue.remove(item)
            self._refuse(deque(late), 503, f"held by the engine until its deadline: {state}")

    def _decode_batch(self) -> None:
        generations, rows_of = self._take_rows()
        if not generations:
            return
        try:
            self._decode(generations, rows_of)
            self.num_batches += 1
            self.num_rows += sum(map(len, rows_of))
            for generation in generations:
                if generation.num_left == 0:
                    self._drop(generation)
                    if generation.done.set_running_or_notify_cancel():
                        generation.done.set_result(generation.result())
        except Exception as error:  # every client of the batch is told, the log has the trace
            logger.exception("decoding failed")
            for generation in generations:
                self._drop(generation)
                if not generation.done.done():
                    generation.done.set_exception(error)

    def _take_rows(self) -> tuple[list[Generation], list[list[int]]]:
        """The next rows, first come first served, as many as `max_batch_tokens` holds (at least one)."""
        generations: list[Generation] = []
        rows_of: list[list[int]] = []
        num_rows = longest_prompt = longest_answer = 0
        with self._changed:
            waiting = list(self._generations)
        for generation in waiting:
            if generation.done.cancelled():
                self._drop(generation)
                continue
            answer = max(longest_answer, generation.params.max_tokens)
            rows: list[int] = []
            while generation.todo:
                prompt = max(longest_prompt, len(generation.prompt_of(generation.todo[0])))
                if num_rows and (num_rows + 1) * (prompt + answer) > self._max_batch_tokens:
                    break
                rows.append(generation.todo.popleft())
                num_rows, longest_prompt, longest_answer = num_rows + 1, prompt, answer
            if rows:
                generations.append(generation)
                rows_of.append(rows)
            if generation.todo:
                break
        return generations, rows_of

    def _decode(self, generations: list[Generation], rows_of: list[list[int]]) -> None:
        # Sorted by prompt and key, the batch is the same whatever order the requests came in.
        taken = [(g, order, row) for order, g in enumerate(generations) for row in rows_of[order]]
        prompts = sorted({g.prompt_of(row).tobytes() for g, _, row in taken}, key=lambda raw: (len(raw), raw))
        index_of = {prompt: index for index, prompt in enumerate(prompts)}
        stops = {stop: index for index, stop in enumerate(sorted({g.params.stop_token_ids for g in generations}))}
        rows = sorted((index_of[g.prompt_of(row).tobytes()], int(g.key_N[row]), order, row) for g, order, row in taken)
        params = [generations[order].params for _, _, order, _ in rows]

        def column(values: list[Any], dtype: Any) -> NDArray[Any]:
            return np.array(values, dtype=dtype)

        decoded = self._decoder.decode(
            Rows(
                prompts=[np.frombuffer(prompt, dtype=np.int32) for prompt in prompts],
                prompt_N=column([prompt for prompt, *_ in rows], np.int64),
                key_N=column([key for _, key, *_ in rows], np.uint64),
                temperature_N=column([p.temperature for p in params], np.float32),
                top_p_N=column([p.top_p for p in params], np.float32),
                top_k_N=column([p.top_k for p in params], np.int64),
                max_tokens_N=column([p.max_tokens for p in params], np.int64),
                stops=list(stops),
                stop_N=column([stops[p.stop_token_ids] for p in params], np.int64),
            )
        )
        for index, (_, _, order, row) in enumerate(rows):
            generation, length = generations[order], int(decoded.length_N[index])
            generation.token_ids_NR[row, :length] = decoded.token_ids_NR[index, :length]
            generation.logprobs_NR[row, :length] = decoded.logprobs_NR[index, :length]
            generation.length_N[row] = length
            generation.stopped_N[row] = decoded.stopped_N[index]
            generation.version_N[row] = self._weights.version
            generation.num_left -= 1

    def _drop(self, generation: Generation) -> None:
        with self._changed:
            if generation in self._generations:
                self._generations.remove(generation)
