"""`engine=hf`: samples with transformers in a server process of its own. Needs nothing that the trainer has not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import AfterValidator

from atropos_exp.config.lora import LoraSettings
from atropos_exp.config.settings import Count, NotNegative
from atropos_exp.errors import UserError
from atropos_exp.parts.engine.devices import gpu_problems
from atropos_exp.parts.engine.launch import Launch, ServerSettings
from atropos_exp.parts.engine.preflight import missing_modules
from atropos_exp.parts.engine.servers import Servers
from atropos_exp.weights.choose import TRANSPORTS, is_transport, transport_problems

SERVER = "atropos_exp.parts.engine.hf.server"
NEEDS = ("torch", "transformers", "safetensors", "starlette", "uvicorn", "msgpack", "xxhash", "numpy")


def _known(transport: str) -> str:
    if not is_transport(transport):
        names = ", ".join(TRANSPORTS)
        raise UserError(f"got {transport!r}, expected one of {names}, or a class of atropos_exp.weights")
    return transport


class HFEngine(ServerSettings):
    """Settings of `engine=hf`."""

    transport: Annotated[str, AfterValidator(_known)]
    max_batch_tokens: Count
    batching_wait_seconds: NotNegative

    colocate: ClassVar[bool] = False

    def preflight(self, *, device: str) -> list[str]:
        """What stands in the way of `start`, one sentence each, found without starting a server."""
        problems = []
        if self.python is not None:
            missing = missing_modules(self.python, (*NEEDS, "atropos_exp"))
            if missing:
                problems.append(
                    f"engine.python: {self.python} cannot serve engine=hf: {missing}; name an interpreter of an "
                    "environment that has this package, or null for the trainer's own"
                )
        if self.transport == "shm" and not hasattr(os, "memfd_create"):
            problems.append("engine.transport is shm, which needs Linux; use engine.transport=disk")
        problems += gpu_problems(
            self.gpus, tensor_parallel_size=1, data_parallel_size=self.data_parallel_size, device=device
        )
        return problems + transport_problems(self.transport, device=device)

    def start(
        self,
        *,
        model_folder: Path,
        device: str,
        log_folder: Path,
        max_sequence_length: int,
        lora: LoraSettings | None = None,
    ) -> Servers:
        """Start the server on a Hugging Face folder and wait for its first token; raises EngineError.

        `max_sequence_length` is the most tokens that a prompt and its answer have together. The caller stops it.
        """
        if max_sequence_length > self.max_batch_tokens:
            raise UserError(
                f"engine.max_batch_tokens is {self.max_batch_tokens}, but one sequence may have {max_sequence_length} "
                "tokens (max_prompt_length + max_response_length); raise the former or lower the latter"
            )
        launch = Launch(
            kind="hf",
            module=SERVER,
            settings=self,
            python=self.python,
            model_folder=model_folder,
            device=device,
            max_sequence_length=max_sequence_length,
            log_folder=log_folder,
        )
        launch.check_model()
        return launch.start(
            *("--max-batch-tokens", str(self.max_batch_tokens)),
            *("--batching-wait-seconds", str(self.batching_wait_seconds)),
            environment={},
        )
