"""What the backends of engines `hf` and `vllm` have in common: one thread owns the model and serves its queues."""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, Protocol

import numpy as np

from atropos_exp.errors import Refused
from atropos_exp.parts.engine.serving.queue import G, RequestQueues
from atropos_exp.processes.wire import Message
from atropos_exp.types import SamplingParams, TokenIds, TokenScores
from atropos_exp.weights.account import UpdateAccount


class Model(Protocol):
    """What computes."""

    def score(self, sequences: Sequence[TokenIds], *, temperature: float, num_top: int) -> list[TokenScores]: ...


class Update(Protocol):
    """Weight updates, one after the other. What does not fit raises Refused."""

    def begin(self, version: int) -> None: ...
    def finish(self) -> None: ...
    def abort(self) -> None: ...
    def digests(self, *, on_device: bool) -> Mapping[str, str]: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class QueuedBackend(Generic[G]):
    """A `Backend`, less what each engine does in its own way. `model` and `update` are used on the scheduler's thread
    only."""

    scheduler: RequestQueues[G]
    generation: type[G]
    model: Model
    account: UpdateAccount
    update: Update
    hub_names: bool
    vocab_size: int
    max_sequence_length: int
    versions: Mapping[str, str]

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
            self.generation(
                prompts=prompts, params=params, num_samples=num_samples, first_prompt=first_prompt, deadline=deadline
            )
        )

    def score(
        self, sequences: Sequence[TokenIds], *, temperature: float, num_top: int, deadline: float
    ) -> Future[list[TokenScores]]:
        return self.scheduler.score(
            lambda: self.model.score(sequences, temperature=temperature, num_top=num_top), deadline=deadline
        )

    def probe(self, *, deadline: float) -> Future[Message]:
        def work() -> Message:
            token, logprob = self.draw(np.zeros(1, dtype=np.int32))
            if not math.isfinite(logprob):
                raise Refused(409, f"the model gives the logprob {logprob}: its weights are not finite")
            return {"token_id": token, "version": self.account.version}

        return self.scheduler.probe(work, deadline=deadline)

    def draw(self, prompt: TokenIds) -> tuple[int, float]:
        """One greedy token after a prompt, and its logprob. On the scheduler's thread."""
        raise NotImplementedError

    def info(self) -> Message:
        return {
            "version": self.account.version,
            "problem": self.account.problem,
            "num_waiting": self.scheduler.num_waiting,
            "versions": dict(self.versions),
        }

    def expected(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        return self.account.expected

    def pause(self, *, deadline: float) -> Future[Any]:
        return self.scheduler.pause(deadline=deadline)

    def resume(self) -> None:
        self.scheduler.resume()

    def begin(self, version: int, *, deadline: float) -> Future[Any]:
        return self.scheduler.control(lambda: self.update.begin(version), deadline=deadline, when_idle=True)

    def finish(self, *, deadline: float) -> Future[Any]:
        return self.scheduler.control(self.update.finish, deadline=deadline)

    def abort(self, *, deadline: float) -> Future[Any]:
        return self.scheduler.control(self.update.abort, deadline=deadline)

    def digests(self, *, on_device: bool, deadline: float) -> Future[Mapping[str, str]]:
        return self.scheduler.control(lambda: self.update.digests(on_device=on_device), deadline=deadline)
