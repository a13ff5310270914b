"""The backend of engine `vllm`: one thread owns vLLM's engine; requests join its running batch between two steps."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from atropos_exp.errors import Refused
from atropos_exp.parts.engine.serving.backend import Scored
from atropos_exp.parts.engine.vllm.core import Core
from atropos_exp.parts.engine.vllm.generation import Generation
from atropos_exp.parts.engine.vllm.update import WorkerUpdate
from atropos_exp.processes.wire import Message
from atropos_exp.types import SamplingParams, TokenIds
from atropos_exp.weights.account import UpdateAccount

logger = logging.getLogger(__name__)

IDLE_SECONDS = 0.25  # between two looks for requests that waited too long


@dataclass(kw_only=True, eq=False)
class Call:
    """Anything but sampling."""

    work: Callable[[], Any]
    deadline: float
    when_idle: bool = False  # not before the last row in flight has ended
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


class VLLMBackend:
    """A `Backend`. The thread of `run_forever` makes `core` and is the only one to use it."""

    def __init__(
        self,
        account: UpdateAccount,
        update: WorkerUpdate,
        *,
        vocab_size: int,
        max_sequence_length: int,
        step_timeout_seconds: float,
        versions: Mapping[str, str],
    ) -> None:
        self.core: Core = update.core
        self.vocab_size = vocab_size
        self.max_sequence_length = max_sequence_length
        self._account = account
        self._update = update
        self._step_timeout_seconds = step_timeout_seconds
        self._versions = versions
        self._changed = threading.Condition()
        self._control: deque[Call] = deque()  # weight updates and such: always run, in order
        self._probes: deque[Call] = deque()  # need complete weights; run even when paused
        self._scores: deque[Call] = deque()  # likewise, and alone: new rows wait for them
        self._waiting: deque[Generation] = deque()  # not in vLLM yet
        self._running: list[Generation] = []
        self._paused = False
        self._num_generations = 0

    def generate(
        self,
        prompts: Sequence[TokenIds],
        params: SamplingParams,
        *,
        num_samples: int,
        first_prompt: int,
        deadline: float,
    ) -> Future[Message]:
        with self._changed:
            self._num_generations += 1
            generation = Generation(
                number=self._num_generations,
                prompts=prompts,
                params=params,
                num_samples=num_samples,
                first_prompt=first_prompt,
                deadline=deadline,
            )
            self._waiting.append(generation)
            self._changed.notify()
        return generation.done

    def score(
        self, sequences: Sequence[TokenIds], *, temperature: float, num_top: int, deadline: float
    ) -> Future[list[Scored]]:
        def work() -> list[Scored]:
            return self.core.score(sequences, temperature=temperature, num_top=num_top)

        return self._put(self._scores, work, deadline)

    def probe(self, *, deadline: float) -> Future[Message]:
        def work() -> Message:
            token, logprob, _ = self.core.draw(np.zeros(1, dtype=np.int32))
            if not np.isfinite(logprob):
                raise Refused(409, f"the model gives the logprob {logprob}: its weights are not finite")
            return {"token_id": token, "version": self._account.version}

        return self._put(self._probes, work, deadline)

    def info(self) -> Message:
        return {
            "version": self._account.version,
            "problem": self._account.problem,
            "num_waiting": len(self._waiting) + len(self._running),
            "num_running_rows": self.core.num_running,
            "num_batches": self.core.num_steps,
            "num_rows": self.core.num_rows,
            "num_prompt_tokens": self.core.num_prompt_tokens,
            "num_cached_tokens": self.core.num_cached_tokens,
            "num_resident_digests": self._update.num_resident,
            "num_cache_proofs": self._update.num_cache_proofs,
            "loads_plainly": self._update.is_plain,
            "is_asleep": self._update.is_asleep,
            "update_seconds": dict(self._account.seconds),
            "versions": dict(self._versions),
        }

    def expected(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        return self._account.expected

    def pause(self, *, deadline: float) -> Future[Any]:
        with self._changed:
            self._paused = True
        return self._put(self._control, lambda: None, deadline, when_idle=True)

    def resume(self) -> None:
        with self._changed:
            self._paused = False
            self._changed.notify()

    def sleep(self, *, deadline: float) -> Future[Message]:
        return self._put(self._control, self._update.sleep, deadline, when_idle=True)

    def begin(self, version: int, *, deadline: float) -> Future[Any]:
        return self._put(self._control, lambda: self._update.begin(version), deadline, when_idle=True)

    def load(self, message: Message, *, deadline: float) -> Future[Any]:
        return self._put(self._control, lambda: self._update.load(message), deadline)

    def finish(self, *, deadline: float) -> Future[Any]:
        return self._put(self._control, self._update.finish, deadline)

    def abort(self, *, deadline: float) -> Future[Any]:
        return self._put(self._control, self._update.abort, deadline)

    def digests(self, *, on_device: bool, deadline: float) -> Future[Mapping[str, str]]:
        return self._put(self._control, lambda: self._update.digests(on_device=on_device), deadline)

    def is_moving(self) -> bool:
        started = self.core.step_started
        return started is None or time.monotonic() - started < self._step_timeout_seconds

    def run_forever(self) -> None:
        while True:
            with self._changed:
                while not self._has_work():
                    self._changed.wait(timeout=IDLE_SECONDS)
                    self._expire()
            self.turn()

    def turn(self) -> None:
        """Everything that can be done now, then one step of the model."""
        self._expire()
        while self._control and not (self._control[0].when_idle and self._running):
            self._control.popleft().run()
        problem = self._account.problem
        if problem is not None:
            if not self._paused:
                for queue in (self._probes, self._scores, self._waiting):
                    _refuse(queue, 409, problem)
            return
        while self._probes:
            self._probes.popleft().run()
        self._conclude()
        while self._scores and not self._running:
            self._scores.popleft().run()
        while self._waiting and not self._paused and not self._scores:
            self._admit(self._waiting.popleft())
        if self._running:
            self.core.step()
            self._conclude()

    def _admit(self, generation: Generation) -> None:
        if generation.done.cancelled():
            return
        try:
            self.core.add(generation)
            self._running.append(generation)
        except Refused as refusal:
            generation.done.set_exception(refusal)

    def _conclude(self) -> None:
        """Answer the generations whose last row has ended."""
        while self.core.ended:
            generation = self.core.ended.pop(0)
            self._running.remove(generation)
            if generation.is_truncated:
                self._scores.append(Call(work=partial(self._rescore, generation), deadline=generation.deadline))
            else:
                self._answer(generation)

    def _rescore(self, generation: Generation) -> None:
        scores = self.core.score(generation.sequences(), temperature=generation.params.temperature, num_top=0)
        generation.rescored([scored.logprobs for scored in scores])
        self._answer(generation)

    def _answer(self, generation: Generation) -> None:
        if generation.done.set_running_or_notify_cancel():
            generation.done.set_result(generation.answer(self._account.version))

    def _put(
        self, queue: deque[Call], work: Callable[[], Any], deadline: float, *, when_idle: bool = False
    ) -> Future[Any]:
        call = Call(work=work, deadline=deadline, when_idle=when_idle)
        with self._changed:
            queue.append(call)
            self._changed.notify()
        return call.done

    def _has_work(self) -> bool:
        if self._control or self._running:
            return True
        held = self._paused and self._account.problem is not None
        return bool((self._probes or self._scores) and not held) or bool(self._waiting and not self._paused)

    def _expire(self) -> None:
        """Whoever waited too long is told what for; rows that nobody waits for any more are not sampled on."""
        now = time.monotonic()
        state = "paused" if self._paused else "busy"
        if self._account.problem is not None:
            state += f"; {self._account.problem}"
        late = f"held by the engine until its deadline: {state}"
        queues: list[deque[Any]] = [self._control, self._probes, self._scores, self._waiting]
        for queue in queues:
            for item in [item for item in queue if item.deadline < now]:
                queue.remove(item)
                _refuse(deque([item]), 503, late)
        for generation in [g for g in self._running if g.deadline < now or g.done.cancelled()]:
            self.core.abort(generation)
            self._running.remove(generation)
            _refuse(deque([generation]), 503, "not sampled to its end before its deadline")


def _refuse(queue: deque[Any], status: int, reason: str) -> None:
    while queue:
        item = queue.popleft()
        if not item.done.done():
            item.done.set_exception(Refused(status, reason))
