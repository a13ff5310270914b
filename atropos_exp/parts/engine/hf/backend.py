"""The backend of engine `hf`: its scheduler, decoder and weights behind the routes of an engine server."""

import math
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from atropos_exp.errors import Refused
from atropos_exp.parts.engine.hf.scheduler import Generation, Scheduler
from atropos_exp.parts.engine.hf.weights import WeightStore
from atropos_exp.parts.engine.serving.queued import QueuedBackend
from atropos_exp.processes.wire import Message
from atropos_exp.types import SamplingParams, TokenIds
from atropos_exp.weights.receiver import BucketSource


@dataclass(frozen=True, kw_only=True, eq=False)
class HFBackend(QueuedBackend[Generation]):
    """The `Backend` of engine `hf`. All work on the model runs on the scheduler's thread."""

    scheduler: Scheduler
    update: WeightStore
    source: BucketSource
    generation: type[Generation] = Generation

    def draw(self, prompt: TokenIds) -> tuple[int, float]:
        params = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, max_tokens=1, stop_token_ids=(), seed=0)
        drawn = self.scheduler.decode_now(Generation(prompts=[prompt], params=params, num_samples=1, deadline=math.inf))
        return int(drawn["token_ids"][0]), float(drawn["logprobs"][0])

    def info(self) -> Message:
        return super().info() | {"num_batches": self.scheduler.num_batches, "num_rows": self.scheduler.num_rows}

    def sleep(self, *, deadline: float) -> Future[Message]:
        raise Refused(400, "engine hf cannot give its memory back")

    def load(self, message: Message, *, deadline: float) -> Future[Any]:
        def work() -> None:
            for name, tensor in self.source.read(message):
                self.update.load(name, tensor)

        return self.scheduler.control(work, deadline=deadline)

    def is_moving(self) -> bool:
        return True  # a forward pass has no limit of its own here: the request's deadline is one
