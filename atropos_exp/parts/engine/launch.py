"""Starting an engine's servers: what all of them check first, and what all of them are told."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from atropos_exp.config.settings import Count, Seconds, Settings
from atropos_exp.errors import UserError
from atropos_exp.parts.engine.client import EngineClient
from atropos_exp.parts.engine.devices import visible_devices
from atropos_exp.parts.engine.process import DEVICES_VARIABLE, ServerProcess
from atropos_exp.parts.engine.servers import Servers
from atropos_exp.parts.engine.update import together
from atropos_exp.weights.choose import TRANSPORTS, choose_transport, make_transport, near_servers
from atropos_exp.weights.transport import Transport


def built_in(transport: str) -> str:
    """The name of one of this project's transports, or `auto`. Raises UserError for another."""
    if transport not in (allowed := ("auto", *TRANSPORTS)):
        raise UserError(f"got {transport!r}, expected one of {', '.join(allowed)}")
    return transport


class ServerSettings(Settings):
    """The settings that all engines have."""

    # of the served weights; auto: float32 on a CPU, bfloat16 on a GPU
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    python: str | None
    gpus: list[int] | None  # of all servers; None: the trainer's own
    data_parallel_size: Count  # servers
    num_threads: Annotated[int | None, Field(ge=1, description="null: its share of the cores")]  # of each server
    transport: str  # auto, one of TRANSPORTS, or a class of this folder
    start_timeout_seconds: Seconds
    request_timeout_seconds: Seconds
    health_timeout_seconds: Seconds
    max_restarts: Annotated[int, Field(ge=0, description="0: never")]


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One engine to be started: a server, or several of the same (`data_parallel_size`)."""

    kind: str  # hf | vllm | sglang
    module: str  # python -m
    settings: ServerSettings
    python: str | None  # that of the settings, or what stands for it
    model_folder: Path
    device: str
    log_folder: Path
    max_sequence_length: int  # tokens of a prompt and its answer together
    tensor_parallel_size: int = 1  # GPUs of one server
    receivers_per_server: int = 1  # processes of one that receive weights; the others share its GPU

    def check_model(self) -> None:
        """Raises UserError if the folder has no model, or one with too short a context."""
        if not (self.model_folder / "config.json").is_file():
            raise UserError(
                f"no model in {self.model_folder}: it has no config.json; expected a Hugging Face model folder"
            )
        positions = json.loads((self.model_folder / "config.json").read_text()).get("max_position_embeddings")
        if positions is not None and self.max_sequence_length > positions:
            raise UserError(
                f"the model in {self.model_folder} has a context of {positions} tokens, but max_prompt_length + "
                f"max_response_length is {self.max_sequence_length}; lower one of them"
            )

    @property
    def served_dtype(self) -> str:
        if self.settings.dtype != "auto":
            return self.settings.dtype
        return "bfloat16" if self.device.startswith("cuda") else "float32"

    def start(self, *arguments: str, environment: Mapping[str, str]) -> Servers:
        """Start the servers and wait for their first tokens; raises EngineError. The caller stops them."""
        count = self.settings.data_parallel_size
        devices = visible_devices(
            self.settings.gpus,
            tensor_parallel_size=self.tensor_parallel_size,
            data_parallel_size=count,
            device=self.device,
        )
        with contextlib.ExitStack() as undo:
            transport = make_transport(
                choose_transport(self.settings.transport, devices, device=self.device),
                self.log_folder,
                num_servers=count,
                receivers_per_server=self.receivers_per_server,
                near=near_servers(devices, device=self.device),
            )
            undo.callback(transport.close)
            clients = []
            for server in range(count):
                visible = {} if devices[server] is None else {DEVICES_VARIABLE: devices[server] or ""}
                more = [*arguments, *transport.arguments(server)]
                client = self._client(server, more, {**environment, **visible}, transport)
                undo.callback(client.stop)
                clients.append(client)
            together(clients, lambda client: client.wait_until_ready())
            undo.pop_all()
        return Servers(clients, transport)

    def _client(
        self, server: int, arguments: Sequence[str], environment: Mapping[str, str], transport: Transport
    ) -> EngineClient:
        """Start one server process."""
        settings = self.settings
        num_threads = settings.num_threads or max(1, len(os.sched_getaffinity(0)) // settings.data_parallel_size)
        process = ServerProcess(
            self.module,
            [
                *("--model", str(self.model_folder), "--device", self.device, "--dtype", self.served_dtype),
                *("--num-threads", str(num_threads)),
                *("--max-sequence-length", str(self.max_sequence_length)),
                *("--heartbeat-seconds", str(settings.health_timeout_seconds / 5)),
                *arguments,
            ],
            python=self.python,
            environment={
                # A launcher such as torchrun sets one thread per rank; the server has its own setting.
                "OMP_NUM_THREADS": str(num_threads),
                # Idle threads sleep: spinning ones slow the trainer, and each other on a shared machine (8 × seen).
                "OMP_WAIT_POLICY": "passive",
                "HF_HUB_OFFLINE": "1",
                "TQDM_DISABLE": "1",  # progress bars are noise in a log
                **environment,
            },
            log=self.log_folder / ("engine.log" if settings.data_parallel_size == 1 else f"engine_{server}.log"),
            inherited_fds=transport.inherited_fds,
        )
        return EngineClient(
            process,
            transport,
            kind=self.kind,
            dtype=self.served_dtype,
            start_timeout_seconds=settings.start_timeout_seconds,
            request_timeout_seconds=settings.request_timeout_seconds,
            health_timeout_seconds=settings.health_timeout_seconds,
        )
