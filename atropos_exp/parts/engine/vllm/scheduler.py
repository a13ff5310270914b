"""One thread that owns vLLM's engine: requests join its running batch between two steps of the model."""

import time

from atropos_exp.errors import Refused
from atropos_exp.parts.engine.serving.queue import Call, RequestQueues, refuse
from atropos_exp.parts.engine.vllm.core import Core
from atropos_exp.parts.engine.vllm.generation import Generation
from atropos_exp.processes.wire import Message
from atropos_exp.weights.account import UpdateAccount


class Scheduler(RequestQueues[Generation]):
    """Decides what runs next. The thread of `run_forever` makes `core` and is the only one to use it."""

    def __init__(self, core: Core, account: UpdateAccount) -> None:
        super().__init__(lambda: account.problem)
        self._core = core
        self._account = account
        self._running: list[Generation] = []
        self._unscored: list[Generation] = []  # sampled to their ends, but their logprobs are still to be found

    @property
    def num_waiting(self) -> int:
        return super().num_waiting + len(self._running) + len(self._unscored)

    def run_forever(self) -> None:
        """The work of the thread that owns vLLM's engine."""
        while True:
            if not (self._running or self._unscored):
                self._await_work()
            self.turn()

    def turn(self) -> None:
        """Everything that can be done now, then one step of the model."""
        self.expire(with_control=True)
        self._expire_sampling()
        while self._control and not (self._control[0].when_idle and (self._running or self._unscored)):
            self._control.popleft().run()
        if (problem := self._account.problem) is not None:
            self._refuse_waiting(problem)
            return
        self._run_all(self._probes)
        self._conclude()
        if not self._running:  # a score sets the temperature of every logit
            while self._unscored:
                self._answer(self._unscored.pop(0))
            self._run_all(self._scores)
        while self._generations and not (self._is_paused or self._scores or self._unscored):
            self._admit(self._generations.popleft())
        if self._running:
            self._core.step()
            self._conclude()

    def _admit(self, generation: Generation) -> None:
        if generation.done.cancelled():
            return
        try:
            self._core.add(generation)
            self._running.append(generation)
        except Refused as refusal:
            refuse(generation, refusal.status, str(refusal))

    def _conclude(self) -> None:
        """Answer the generations whose last row has ended."""
        while self._core.ended:
            generation = self._core.ended.pop(0)
            self._running.remove(generation)
            if generation.is_truncated:
                self._unscored.append(generation)
            else:
                self._answer(generation)

    def _answer(self, generation: Generation) -> None:
        """Send its rows. Those of a truncated distribution get their logprobs under the whole one first."""

        def work() -> Message:
            if generation.is_truncated:
                temperature = generation.params.temperature
                scores = self._core.score(generation.sequences(), temperature=temperature, num_top=0)
                generation.rescored([scored.logprobs for scored in scores])
            return generation.answer(self._account.version)

        Call(work=work, deadline=generation.deadline, done=generation.done).run()

    def _expire_sampling(self) -> None:
        """Stop sampling rows whose deadline has passed or whose client has gone."""
        now = time.monotonic()
        for generations in (self._running, self._unscored):
            for generation in [g for g in generations if g.deadline < now or g.done.cancelled()]:
                self._core.abort(generation)
                generations.remove(generation)
                refuse(generation, 503, "not sampled to its end before its deadline")
