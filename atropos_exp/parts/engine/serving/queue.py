"""What waits for the thread that owns a model: in which order it is served, when it expires, how it is refused.

Engines `hf` and `vllm` each have one such thread. The web server puts requests in; the model's thread takes them out
between two steps of the model.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from atropos_exp.errors import Refused
from atropos_exp.parts.engine.serving.seeds import request_keys
from atropos_exp.processes.wire import Message
from atropos_exp.types import SamplingParams, TokenIds

logger = logging.getLogger(__name__)

IDLE_SECONDS = 0.25  # between two looks for requests that have waited too long


@dataclass(kw_only=True, eq=False)
class Generation:
    """A request for `num_samples` completions of each prompt. Row i of it is a completion of prompt i // num_samples.

    Each engine adds what it collects until the last row has ended.
    """

    prompts: Sequence[TokenIds]
    params: SamplingParams
    num_samples: int
    deadline: float  # of time.monotonic()
    first_prompt: int = 0  # place of the first prompt in the call of which this request is a part
    done: Future[Message] = field(default_factory=Future)

    @property
    def num_rows(self) -> int:
        return len(self.prompts) * self.num_samples

    def prompt_of(self, row: int) -> TokenIds:
        return self.prompts[row // self.num_samples]

    def keys(self) -> NDArray[np.uint64]:
        """The random key of each row [num_rows], which does not depend on other requests."""
        return request_keys(self.params.seed, len(self.prompts), self.num_samples, first_prompt=self.first_prompt)


@dataclass(kw_only=True, eq=False)
class Call:
    """Anything but sampling that needs the model."""

    work: Callable[[], Any]
    deadline: float  # of time.monotonic()
    when_idle: bool = False  # not before the last row in flight has ended
    done: Future[Any] = field(default_factory=Future)

    def run(self) -> None:
        """Do the work, unless its client has gone; what it returns or raises goes to `done`."""
        if self.done.set_running_or_notify_cancel():
            try:
                self.done.set_result(self.work())
            except Refused as refusal:
                self.done.set_exception(refusal)
            except Exception as error:  # the client gets it, the log has the trace
                logger.exception("a call failed")
                self.done.set_exception(error)


G = TypeVar("G", bound=Generation)


class RequestQueues(Generic[G]):
    """Four queues in front of one model, each first come, first served. Any thread may put requests in.

    Generations wait while paused. Probes and scores do not, but they need complete weights: without them they wait
    while paused, and are refused otherwise, as generations are.
    """

    def __init__(self, problem: Callable[[], str | None], *, batching_wait_seconds: float = 0.0) -> None:
        """`problem`: why the weights are not one consistent policy, or None. `batching_wait_seconds`: an idle model
        waits this long for more generations after the first one."""
        self._problem = problem
        self._batching_wait_seconds = batching_wait_seconds
        self._changed = threading.Condition()
        self._is_paused = False
        self._control: deque[Call] = deque()  # weight updates, pauses: always run, in order
        self._probes: deque[Call] = deque()
        self._scores: deque[Call] = deque()
        self._generations: deque[G] = deque()

    @property
    def num_waiting(self) -> int:
        """Generations not finished yet."""
        return len(self._generations)

    def submit(self, generation: G) -> Future[Message]:
        return self._put(self._generations, generation)

    def control(self, work: Callable[[], Any], *, deadline: float, when_idle: bool = False) -> Future[Any]:
        """Work that comes before all other, also while paused and whatever the weights are."""
        return self._put(self._control, Call(work=work, deadline=deadline, when_idle=when_idle))

    def probe(self, work: Callable[[], Any], *, deadline: float) -> Future[Any]:
        return self._put(self._probes, Call(work=work, deadline=deadline))

    def score(self, work: Callable[[], Any], *, deadline: float) -> Future[Any]:
        return self._put(self._scores, Call(work=work, deadline=deadline))

    def pause(self, *, deadline: float) -> Future[Any]:
        """Hold generations from now on; the result comes when no row is in flight any more."""
        with self._changed:
            self._is_paused = True
        return self.control(lambda: None, deadline=deadline, when_idle=True)

    def resume(self) -> None:
        with self._changed:
            self._is_paused = False
            self._changed.notify()

    def expire(self, *, with_control: bool = False) -> None:
        """Refuse what has waited past its deadline, and say what held it."""
        with self._changed:
            now = time.monotonic()
            queues: list[deque[Any]] = [self._probes, self._scores, self._generations]
            late = [
                (queue, item)
                for queue in ([self._control, *queues] if with_control else queues)
                for item in queue
                if item.deadline < now
            ]
            for queue, item in late:
                queue.remove(item)
        state = "paused" if self._is_paused else "busy"
        if (problem := self._problem()) is not None:
            state += f"; {problem}"
        for _, item in late:
            refuse(item, 503, f"held by the engine until its deadline: {state}")

    def _put(self, queue: deque[Any], item: Any) -> Future[Any]:
        with self._changed:
            queue.append(item)
            self._changed.notify()
        done: Future[Any] = item.done
        return done

    def _await_work(self) -> None:
        """Return when there is something to do."""
        with self._changed:
            while not self._has_work():
                was_idle = not self._generations
                self._changed.wait(timeout=IDLE_SECONDS)
                self.expire()
                if was_idle and self._generations and self._batching_wait_seconds:
                    # Requests that were sent together arrive one after the other: let them share a batch.
                    self._changed.wait_for(lambda: False, timeout=self._batching_wait_seconds)

    def _has_work(self) -> bool:
        if self._control:
            return True
        held = self._is_paused and self._problem() is not None
        return bool((self._probes or self._scores) and not held) or bool(self._generations and not self._is_paused)

    def _refuse_waiting(self, problem: str) -> None:
        """Without complete weights nothing is sampled or scored; while paused, they may be about to be completed."""
        if not self._is_paused:
            queues: list[deque[Any]] = [self._probes, self._scores, self._generations]
            for queue in queues:
                while queue:
                    refuse(queue.popleft(), 409, problem)

    @staticmethod
    def _run_all(queue: deque[Call]) -> None:
        while queue:
            queue.popleft().run()


def refuse(request: Generation | Call, status: int, reason: str) -> None:
    """Answer a request with a refusal, unless its client has gone."""
    if request.done.set_running_or_notify_cancel():
        request.done.set_exception(Refused(status, reason))
