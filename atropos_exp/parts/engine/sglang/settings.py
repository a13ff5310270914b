"""`engine=sglang`: samples with SGLang in a server process of its own, in an environment of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator

from atropos_exp.config.lora import LoraSettings
from atropos_exp.config.settings import Count, Positive
from atropos_exp.parts.engine.devices import gpu_problems
from atropos_exp.parts.engine.launch import Launch, ServerSettings, built_in
from atropos_exp.parts.engine.preflight import environment_problems, has_gpu, interpreter
from atropos_exp.parts.engine.servers import Servers
from atropos_exp.weights.choose import transport_problems

SERVER = "atropos_exp.parts.engine.sglang.server"
# The version that verl 0.9.1 was built against; it pins transformers 5.6.0, which verl excludes.
INSTALL = "`pip install sglang==0.5.12 msgpack xxhash` in an environment of its own, on a machine with an NVIDIA GPU"


class SGLangEngine(ServerSettings):
    """Settings of `engine=sglang`."""

    transport: Annotated[str, AfterValidator(built_in)]
    tensor_parallel_size: Count
    mem_fraction_static: Positive
    max_running_requests: Count
    attention_backend: str | None
    sampling_backend: str | None
    seeded: bool

    @property
    def _python(self) -> str:
        return interpreter(self.python, environment=".venv-sglang")

    colocate: ClassVar[bool] = False

    def preflight(self, *, device: str) -> list[str]:
        """What stands in the way of `start`, one sentence each, found without starting a server."""
        problems = environment_problems(
            option="sglang", title="SGLang", python=self._python, is_own=self.python is None, install=INSTALL
        )
        problems += gpu_problems(
            self.gpus,
            tensor_parallel_size=self.tensor_parallel_size,
            data_parallel_size=self.data_parallel_size,
            device=device,
        )
        problems += transport_problems(self.transport, device=device)
        if not problems and not has_gpu():
            problems.append("engine=sglang needs an NVIDIA GPU, and this machine shows none; use another engine")
        return problems

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
        launch = Launch(
            kind="sglang",
            module=SERVER,
            settings=self,
            python=self._python,
            model_folder=model_folder,
            device=device,
            max_sequence_length=max_sequence_length,
            tensor_parallel_size=self.tensor_parallel_size,
            log_folder=log_folder,
        )
        launch.check_model()
        environment = {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}  # a score draws one token past the longest
        return launch.start(
            *("--engine-arguments", json.dumps(self.engine_arguments())),
            *(["--seeded"] if self.seeded else []),
            environment=environment,
        )

    def engine_arguments(self) -> dict[str, Any]:
        """For sglang.Engine, besides what every run needs."""
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
