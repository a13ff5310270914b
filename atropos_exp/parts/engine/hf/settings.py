"""`engine=hf`: samples with transformers in a server process. It needs no libraries besides the trainer's."""

import os
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field

from atropos_exp.config.lora import LoraSettings
from atropos_exp.config.settings import Count
from atropos_exp.errors import UserError
from atropos_exp.parts.engine.launch import ServerProgram, ServerSettings
from atropos_exp.parts.engine.preflight import interpreter
from atropos_exp.processes.interpreters import missing_modules
from atropos_exp.weights.choose import TRANSPORTS, is_transport

SERVER = "atropos_exp.parts.engine.hf.server"
NEEDS = ("torch", "transformers", "safetensors", "starlette", "uvicorn", "msgpack", "xxhash", "numpy")


def _known(transport: str) -> str:
    if not is_transport(transport):
        names = ", ".join(TRANSPORTS)
        raise UserError(f"got {transport!r}, expected one of {names}, or a class of atropos_exp.weights")
    return transport


class HFEngine(ServerSettings):
    """Settings of `engine=hf`; conf/engine/hf.yaml describes each."""

    transport: Annotated[str, AfterValidator(_known)]
    max_batch_tokens: Count
    batching_wait_seconds: Annotated[float, Field(ge=0, le=60)]

    colocate: ClassVar[bool] = False
    lora: ClassVar[str] = "merged"
    gpu_memory_utilization: ClassVar[float | None] = None
    kv_cache_gb: ClassVar[float | None] = None

    @property
    def _python(self) -> str:
        return interpreter(self.python, environment="")

    def preflight(self, *, device: str) -> list[str]:
        """Why `start` would fail, one sentence each, found without starting a server."""
        problems = []
        if self.python is not None and (missing := missing_modules(self._python, (*NEEDS, "atropos_exp"))):
            problems.append(
                f"engine.python: {self.python} cannot serve engine=hf: {missing}; name an interpreter of an "
                "environment that has this package, or null for the trainer's own"
            )
        if self.transport == "shm" and not hasattr(os, "memfd_create"):
            problems.append("engine.transport is shm, which needs Linux; use engine.transport=disk")
        return problems + self.placement_problems(device=device)

    def program(
        self, *, device: str, max_sequence_length: int, lora: LoraSettings | None, twin: Path | None
    ) -> ServerProgram:
        if max_sequence_length > self.max_batch_tokens:
            raise UserError(
                f"engine.max_batch_tokens is {self.max_batch_tokens}, but one sequence may have {max_sequence_length} "
                "tokens (max_prompt_length + max_response_length); raise the former or lower the latter"
            )
        return ServerProgram(
            kind="hf",
            module=SERVER,
            python=self._python,
            arguments=[
                *("--max-batch-tokens", str(self.max_batch_tokens)),
                *("--batching-wait-seconds", str(self.batching_wait_seconds)),
                *(() if twin is None else ("--twin", str(twin))),
            ],
        )
