"""The backend of engine `vllm`: its scheduler, core and weight updates behind the routes of an engine server."""

import itertools
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from atropos_exp.errors import Refused
from atropos_exp.parts.engine.vllm.generation import Generation
from atropos_exp.parts.engine.vllm.scheduler import Scheduler
from atropos_exp.parts.engine.vllm.update import WorkerUpdate
from atropos_exp.processes.wire import Message
from atropos_exp.types import SamplingParams, TokenIds, TokenScores
from atropos_exp.weights.account import UpdateAccount


class VLLMBackend:
    """A `Backend`. The thread of `scheduler.run_forever` makes `update.core` and is the only one to use it."""

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
        self.scheduler = Scheduler(update.core, account)
        self.vocab_size = vocab_size
        self.max_sequence_length = max_sequence_length
        self._core = update.core
        self._account = account
        self._update = update
        self._step_timeout_seconds = step_timeout_seconds
        self._versions = versions
        self._numbers = itertools.count(1)

    def generate(
        self,
        prompts: Sequence[TokenIds],
        params: SamplingParams,
        *,
        num_samples: int,
        first_prompt: int,
        deadline: float,
    ) -> Future[Message]:
        return self.scheduler.submit(
            Generation(
                number=next(self._numbers),
                prompts=prompts,
                params=params,
                num_samples=num_samples,
                first_prompt=first_prompt,
                deadline=deadline,
            )
        )

    def score(
        self, sequences: Sequence[TokenIds], *, temperature: float, num_top: int, deadline: float
    ) -> Future[list[TokenScores]]:
        return self.scheduler.score(
            lambda: self._core.score(sequences, temperature=temperature, num_top=num_top), deadline=deadline
        )

    def probe(self, *, deadline: float) -> Future[Message]:
        def work() -> Message:
            token, logprob, _ = self._core.draw(np.zeros(1, dtype=np.int32))
            if not np.isfinite(logprob):
                raise Refused(409, f"the model gives the logprob {logprob}: its weights are not finite")
            return {"token_id": token, "version": self._account.version}

        return self.scheduler.probe(work, deadline=deadline)

    def info(self) -> Message:
        return {
            "version": self._account.version,
            "problem": self._account.problem,
            "num_waiting": self.scheduler.num_waiting,
            "num_running_rows": self._core.num_running,
            "num_batches": self._core.num_steps,
            "num_rows": self._core.num_rows,
            "num_prompt_tokens": self._core.num_prompt_tokens,
            "num_cached_tokens": self._core.num_cached_tokens,
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
        return self.scheduler.pause(deadline=deadline)

    def resume(self) -> None:
        self.scheduler.resume()

    def sleep(self, *, deadline: float) -> Future[Message]:
        return self.scheduler.control(self._update.sleep, deadline=deadline, when_idle=True)

    def begin(self, version: int, *, deadline: float) -> Future[Any]:
        return self.scheduler.control(lambda: self._update.begin(version), deadline=deadline, when_idle=True)

    def load(self, message: Message, *, deadline: float) -> Future[Any]:
        return self.scheduler.control(lambda: self._update.load(message), deadline=deadline)

    def finish(self, *, deadline: float) -> Future[Any]:
        return self.scheduler.control(self._update.finish, deadline=deadline)

    def abort(self, *, deadline: float) -> Future[Any]:
        return self.scheduler.control(self._update.abort, deadline=deadline)

    def digests(self, *, on_device: bool, deadline: float) -> Future[Mapping[str, str]]:
        return self.scheduler.control(lambda: self._update.digests(on_device=on_device), deadline=deadline)

    def is_moving(self) -> bool:
        started = self._core.step_started
        return started is None or time.monotonic() - started < self._step_timeout_seconds
