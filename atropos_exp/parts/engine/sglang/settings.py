"""`engine=sglang`: samples with SGLang in a server process, in a Python environment of its own."""

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field

from atropos_exp.config.lora import LoraSettings
from atropos_exp.config.settings import Count, Few
from atropos_exp.parts.engine.launch import ServerProgram, ServerSettings, built_in
from atropos_exp.parts.engine.preflight import environment_problems, has_gpu, interpreter

SERVER = "atropos_exp.parts.engine.sglang.server"
# The version that verl 0.9.1 was built against; it pins transformers 5.6.0, which verl excludes.
INSTALL = "`pip install sglang==0.5.12 msgpack xxhash` in an environment of its own, on a machine with an NVIDIA GPU"


class SGLangEngine(ServerSettings):
    """Settings of `engine=sglang`; conf/engine/sglang.yaml describes each."""

    transport: Annotated[str, AfterValidator(built_in)]
    tensor_parallel_size: Few
    mem_fraction_static: Annotated[float, Field(gt=0, le=1)]
    max_running_requests: Count
    attention_backend: str | None
    sampling_backend: str | None
    seeded: bool

    colocate: ClassVar[bool] = False
    lora: ClassVar[str] = "merged"
    kv_cache_gb: ClassVar[float | None] = None
    max_batch_tokens: ClassVar[int | None] = None

    @property
    def gpu_memory_utilization(self) -> float:
        return self.mem_fraction_static

    @property
    def _python(self) -> str:
        return interpreter(self.python, environment=".venv-sglang")

    def preflight(self, *, device: str) -> list[str]:
        """Why `start` would fail, one sentence each, found without starting a server."""
        problems = environment_problems(
            option="sglang", title="SGLang", python=self._python, is_own=self.python is None, install=INSTALL
        )
        problems += self.placement_problems(device=device, tensor_parallel_size=self.tensor_parallel_size)
        if not problems and not has_gpu():
            problems.append("engine=sglang needs an NVIDIA GPU, and this machine shows none; use another engine")
        return problems

    def program(
        self, *, device: str, max_sequence_length: int, lora: LoraSettings | None, twin: Path | None
    ) -> ServerProgram:
        return ServerProgram(
            kind="sglang",
            module=SERVER,
            python=self._python,
            arguments=[
                *("--engine-arguments", json.dumps(self.engine_arguments())),
                *(["--seeded"] if self.seeded else []),
            ],
            # A score draws one token past the longest sequence.
            environment={"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"},
            tensor_parallel_size=self.tensor_parallel_size,
        )

    def engine_arguments(self) -> dict[str, Any]:
        """Arguments of sglang.Engine, besides those that every run needs."""
        arguments: dict[str, Any] = {
            "tp_size": self.tensor_parallel_size,
            "mem_fraction_static": self.mem_fraction_static,
            "max_running_requests": self.max_running_requests,
            "cuda_graph_max_bs": self.max_running_requests,
            "grammar_backend": "none",
            "enable_deterministic_inference": self.seeded,  # seeds of requests count only with it
        }
        backends = {"attention_backend": self.attention_backend, "sampling_backend": self.sampling_backend}
        return arguments | {name: value for name, value in backends.items() if value is not None}
