"""`engine=hf`: samples with transformers in a server process. It needs no libraries besides the trainer's."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from atropos_exp.errors import UserError
from atropos_exp.parts.engine.launch import DTYPES, ServerProgram, ServerSettings, check_settings
from atropos_exp.parts.engine.preflight import missing_modules
from atropos_exp.weights.choose import TRANSPORTS, is_transport

if TYPE_CHECKING:
    from atropos_exp.types import LoraSettings

SERVER = "atropos_exp.parts.engine.hf.server"
NEEDS = ("torch", "transformers", "safetensors", "starlette", "uvicorn", "msgpack", "xxhash", "numpy")


@dataclass(frozen=True, kw_only=True)
class HFEngine(ServerSettings):
    """Settings of `engine=hf`; conf/engine/hf.yaml describes each."""

    max_batch_tokens: int
    batching_wait_seconds: float

    colocate: ClassVar[bool] = False
    gpu_memory_utilization: ClassVar[float | None] = None
    kv_cache_gb: ClassVar[float | None] = None

    def __post_init__(self) -> None:
        check_settings(self, choices={"dtype": DTYPES}, positive=())
        if not is_transport(self.transport):
            raise UserError(f"engine.transport must be one of {', '.join(TRANSPORTS)}; got {self.transport!r}")
        if self.batching_wait_seconds < 0:
            raise UserError(f"engine.batching_wait_seconds must be 0 or more; got {self.batching_wait_seconds}")
        if self.max_batch_tokens < 1:
            raise UserError(f"engine.max_batch_tokens must be 1 or more; got {self.max_batch_tokens}")
        if self.num_threads is not None and self.num_threads < 1:
            raise UserError(f"engine.num_threads must be 1 or more, or null for all cores; got {self.num_threads}")

    def preflight(self, *, device: str) -> list[str]:
        """Why `start` would fail, one sentence each, found without starting a server."""
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
        return problems + self.placement_problems(device=device)

    def program(self, *, device: str, max_sequence_length: int, lora: LoraSettings | None) -> ServerProgram:
        if max_sequence_length > self.max_batch_tokens:
            raise UserError(
                f"engine.max_batch_tokens is {self.max_batch_tokens}, but one sequence may have {max_sequence_length} "
                "tokens (max_prompt_length + max_response_length); raise the former or lower the latter"
            )
        return ServerProgram(
            kind="hf",
            module=SERVER,
            python=self.python,
            arguments=[
                *("--max-batch-tokens", str(self.max_batch_tokens)),
                *("--batching-wait-seconds", str(self.batching_wait_seconds)),
            ],
        )
