"""The backend of engine `hf`: its scheduler, decoder and weights behind the routes of an engine server."""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from atropos_exp.errors import Refused
from atropos_exp.parts.engine.hf.decode import Decoder
from atropos_exp.parts.engine.hf.scheduler import Generation, Scheduler
from atropos_exp.parts.engine.hf.weights import WeightStore
from atropos_exp.processes.wire import Message
from atropos_exp.types import SamplingParams, TokenIds, TokenScores
from atropos_exp.weights.receiver import BucketSource


@dataclass(frozen=True, kw_only=True, eq=False)
class HFBackend:
    """The `Backend` of engine `hf`. All work on the model runs on the scheduler's thread."""

    scheduler: Scheduler
    decoder: Decoder
    weights: WeightStore
    source: BucketSource
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
            Generation(
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
            lambda: self.decoder.score(sequences, temperature=temperature, num_top=num_top), deadline=deadline
        )

    def probe(self, *, deadline: float) -> Future[Message]:
        def work() -> Message:
            params = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, max_tokens=1, stop_token_ids=(), seed=0)
            prompt = np.zeros(1, dtype=np.int32)
            probe = Generation(prompts=[prompt], params=params, num_samples=1, deadline=math.inf)
            drawn = self.scheduler.decode_now(probe)
            if not np.isfinite(drawn["logprobs"]).all():
                raise Refused(409, f"the model gives the logprob {drawn['logprobs'][0]}: its weights are not finite")
            return {"token_id": int(drawn["token_ids"][0]), "version": self.weights.version}

        return self.scheduler.probe(work, deadline=deadline)

    def info(self) -> Message:
        return {
            "version": self.weights.version,
            "problem": self.weights.problem,
            "num_waiting": self.scheduler.num_waiting,
            "num_batches": self.scheduler.num_batches,
            "num_rows": self.scheduler.num_rows,
            "versions": dict(self.versions),
        }

    def expected(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        return self.weights.expected()

    def pause(self, *, deadline: float) -> Future[Any]:
        return self.scheduler.pause(deadline=deadline)

    def resume(self) -> None:
        self.scheduler.resume()

    def sleep(self, *, deadline: float) -> Future[Message]:
        raise Refused(400, "engine hf cannot give its memory back")

    def begin(self, version: int, *, deadline: float) -> Future[Any]:
        return self.scheduler.control(lambda: self.weights.begin(version), deadline=deadline)

    def load(self, message: Message, *, deadline: float) -> Future[Any]:
        def work() -> None:
            for name, tensor in self.source.read(message):
                self.weights.load(name, tensor)

        return self.scheduler.control(work, deadline=deadline)

    def finish(self, *, deadline: float) -> Future[Any]:
        return self.scheduler.control(self.weights.finish, deadline=deadline)

    def abort(self, *, deadline: float) -> Future[Any]:
        return self.scheduler.control(self.weights.abort, deadline=deadline)

    def digests(self, *, on_device: bool, deadline: float) -> Future[Mapping[str, str]]:
        return self.scheduler.control(lambda: self.weights.digests(on_device=on_device), deadline=deadline)

    def is_moving(self) -> bool:
        return True  # a forward pass has no limit of its own here: the request's deadline is one
