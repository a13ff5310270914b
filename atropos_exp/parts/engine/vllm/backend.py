"""The backend of engine `vllm`: its scheduler, core and weight updates behind the routes of an engine server."""

import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from atropos_exp.parts.engine.serving.queued import QueuedBackend
from atropos_exp.parts.engine.vllm.core import Core
from atropos_exp.parts.engine.vllm.generation import Generation
from atropos_exp.parts.engine.vllm.scheduler import Scheduler
from atropos_exp.parts.engine.vllm.update import WorkerUpdate
from atropos_exp.processes.wire import Message
from atropos_exp.types import TokenIds


@dataclass(frozen=True, kw_only=True, eq=False)
class VLLMBackend(QueuedBackend[Generation]):
    """The `Backend` of engine `vllm`. The thread of `scheduler.run_forever` makes `model` and is the only one to use
    it."""

    scheduler: Scheduler
    model: Core
    update: WorkerUpdate
    step_timeout_seconds: float
    generation: type[Generation] = Generation

    def draw(self, prompt: TokenIds) -> tuple[int, float]:
        token, logprob, _ = self.model.draw(prompt)
        return token, logprob

    def info(self) -> Message:
        return super().info() | {
            "num_running_rows": self.model.num_running,
            "num_batches": self.model.num_steps,
            "num_rows": self.model.num_rows,
            "num_prompt_tokens": self.model.num_prompt_tokens,
            "num_cached_tokens": self.model.num_cached_tokens,
            "num_resident_digests": self.update.num_resident,
            "num_cache_proofs": self.update.num_cache_proofs,
            "loads_plainly": self.update.is_plain,
            "is_asleep": self.update.is_asleep,
            "update_seconds": dict(self.account.seconds),
        }

    def sleep(self, *, deadline: float) -> Future[Message]:
        return self.scheduler.control(self.update.sleep, deadline=deadline, when_idle=True)

    def load(self, message: Message, *, deadline: float) -> Future[Any]:
        return self.scheduler.control(lambda: self.update.load(message), deadline=deadline)

    def is_moving(self) -> bool:
        started = self.model.step_started
        return started is None or time.monotonic() - started < self.step_timeout_seconds
