"""Starting an engine's servers: the settings that all engines have, what is checked first, and the command lines."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from atropos_exp.config.lora import LoraSettings
from atropos_exp.config.settings import Few, Seconds, Settings
from atropos_exp.errors import UserError
from atropos_exp.parts.engine.client import EngineClient
from atropos_exp.parts.engine.devices import gpu_problems, visible_devices
from atropos_exp.parts.engine.process import ServerProcess
from atropos_exp.parts.engine.servers import Servers
from atropos_exp.parts.engine.update import together
from atropos_exp.processes.child import ENGINE_DEVICES
from atropos_exp.weights.choose import TRANSPORTS, choose_transport, make_transport, near_servers, transport_problems


def built_in(transport: str) -> str:
    """The name of one of this project's transports, or `auto`. Raises UserError for another."""
    if transport not in (allowed := ("auto", *TRANSPORTS)):
        raise UserError(f"got {transport!r}, expected one of {', '.join(allowed)}")
    return transport


class ServerSettings(Settings):
    """The settings that all engines have, and how their servers are started.

    What the rest of a run asks of an engine's settings, whichever engine it is:

        preflight(device=...)   what stands in the way of a start, one sentence each, found without starting anything
        start(...)              an `Engine` in working order

    and what stands below for a type checker: a key of the engine's YAML, or a `ClassVar` of False or None where it has
    no such mode or limit.
    """

    if TYPE_CHECKING:  # pydantic lets no field of a subclass stand over a property

        @property
        def colocate(self) -> bool: ...  # gives the shared GPU to the trainer during an update
        @property
        def gpu_memory_utilization(self) -> float | None: ...  # share of the GPU that it reserves at its start
        @property
        def kv_cache_gb(self) -> float | None: ...  # GiB of keys and values, where they are set
        @property
        def max_batch_tokens(self) -> int | None: ...  # tokens decoded at once, where they are limited

    # of the served weights; auto: float32 on a CPU, bfloat16 on a GPU
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    python: str | None  # interpreter of the servers; None: one that the engine finds, or this process's
    gpus: list[Annotated[int, Field(ge=0, le=1023)]] | None  # of all servers; None: the trainer's own
    data_parallel_size: Few  # servers, each with the whole model
    num_threads: Annotated[
        int | None, Field(ge=1, le=1024, description="null: its share of the cores")
    ]  # of each server
    transport: str  # auto, a name in `weights.choose.TRANSPORTS`, or the full name of a class
    start_timeout_seconds: Seconds
    request_timeout_seconds: Seconds
    health_timeout_seconds: Seconds
    max_restarts: Annotated[int, Field(ge=0, le=10**6, description="0: never")]  # times that a lost server is replaced

    def program(
        self, *, device: str, max_sequence_length: int, lora: LoraSettings | None, twin: Path | None
    ) -> ServerProgram:
        """What `start` starts. Raises UserError where these settings cannot serve such sequences."""
        raise NotImplementedError

    def start(
        self,
        *,
        model_folder: Path,
        device: str,
        log_folder: Path,
        max_sequence_length: int,
        lora: LoraSettings | None = None,
        twin: Path | None = None,
        trust_remote_code: bool = False,
    ) -> Servers:
        """Start the servers on a Hugging Face folder and wait for their first tokens. The caller stops them.

        `max_sequence_length` is the most tokens that a prompt and its answer have together. `lora`, of the model, is
        read by an engine that serves it beside the base. `twin` is the folder of a small model of the same
        architecture, with which an engine may try how it can serve it. `trust_remote_code`: Python code of the folder
        is run. Raises UserError for what cannot be served, and
        EngineError.
        """
        program = self.program(device=device, max_sequence_length=max_sequence_length, lora=lora, twin=twin)
        _check_model(model_folder, max_sequence_length=max_sequence_length)
        devices = visible_devices(
            self.gpus,
            tensor_parallel_size=program.tensor_parallel_size,
            data_parallel_size=self.data_parallel_size,
            device=device,
        )
        dtype = self.dtype
        if dtype == "auto":
            dtype = "bfloat16" if device.startswith("cuda") else "float32"
        model = ["--model", str(model_folder), "--device", device, "--dtype", dtype]
        model += ["--max-sequence-length", str(max_sequence_length)]
        model += ["--trust-remote-code"] if trust_remote_code else []
        with contextlib.ExitStack() as undo:  # after an error no server is left
            transport = make_transport(
                choose_transport(self.transport, devices, device=device),
                log_folder,
                num_servers=self.data_parallel_size,
                receivers_per_server=program.receivers_per_server,
                near=near_servers(devices, device=device),
            )
            undo.callback(transport.close)
            clients = []
            for server, visible in enumerate(devices):
                log = log_folder / ("engine.log" if self.data_parallel_size == 1 else f"engine_{server}.log")
                arguments = [*model, *program.arguments, *transport.arguments(server)]
                client = EngineClient(
                    process=self._process(program, arguments, visible, log=log, fds=transport.inherited_fds),
                    transport=transport,
                    kind=program.kind,
                    dtype=dtype,
                    start_timeout_seconds=self.start_timeout_seconds,
                    request_timeout_seconds=self.request_timeout_seconds,
                    health_timeout_seconds=self.health_timeout_seconds,
                    max_restarts=self.max_restarts,
                )
                undo.callback(client.stop)
                clients.append(client)
            together(clients, lambda client: client.wait_until_ready())
            undo.pop_all()
        return Servers(tuple(clients), transport)

    def _process(
        self, program: ServerProgram, arguments: Sequence[str], visible: str | None, *, log: Path, fds: Sequence[int]
    ) -> ServerProcess:
        """Start one server process. `visible`: its CUDA_VISIBLE_DEVICES; None: those of this process."""
        num_threads = self.num_threads or max(1, len(os.sched_getaffinity(0)) // self.data_parallel_size)
        return ServerProcess(
            program.module,
            [
                *arguments,
                *("--num-threads", str(num_threads)),
                *("--heartbeat-seconds", str(self.health_timeout_seconds / 5)),
            ],
            python=program.python,
            environment={
                # A launcher such as torchrun sets one thread per rank; the server has its own setting.
                "OMP_NUM_THREADS": str(num_threads),
                # Idle threads sleep: spinning ones slow the trainer, and each other on a shared machine (8 × seen).
                "OMP_WAIT_POLICY": "passive",
                "HF_HUB_OFFLINE": "1",
                "TQDM_DISABLE": "1",  # progress bars are noise in a log
                **program.environment,
                **({} if visible is None else {ENGINE_DEVICES: visible}),
            },
            log=log,
            inherited_fds=fds,
        )

    def placement_problems(self, *, device: str, tensor_parallel_size: int = 1) -> list[str]:
        """What does not fit between the GPUs, the transport and the device; one sentence each."""
        problems = gpu_problems(
            self.gpus,
            tensor_parallel_size=tensor_parallel_size,
            data_parallel_size=self.data_parallel_size,
            device=device,
        )
        return problems + transport_problems(self.transport, device=device)


@dataclass(frozen=True, kw_only=True)
class ServerProgram:
    """The program of one engine's server.

        ServerProgram(kind="hf", module="atropos_exp.parts.engine.hf.server", python=None,
                      arguments=["--max-batch-tokens", "65536"])

    It holds what is this engine's own, beside the command line that every engine's server has.
    """

    kind: str  # the engine's name in conf/engine
    module: str  # started as `python -m module`
    python: str | None  # interpreter; None: this process's
    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    tensor_parallel_size: int = 1  # GPUs of one server
    receivers_per_server: int = 1  # processes of one server that receive weights; the others share its GPU


def _check_model(folder: Path, *, max_sequence_length: int) -> None:
    """Raises UserError if the folder has no model, or one with too short a context."""
    if not (folder / "config.json").is_file():
        raise UserError(f"no model in {folder}: it has no config.json; expected a Hugging Face model folder")
    positions = json.loads((folder / "config.json").read_text()).get("max_position_embeddings")
    if positions is not None and max_sequence_length > positions:
        raise UserError(
            f"the model in {folder} has a context of {positions} tokens, but max_prompt_length + max_response_length "
            f"is {max_sequence_length}; lower one of them"
        )
