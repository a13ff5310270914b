"""`engine=hf`: samples with transformers in a server process of its own. Needs nothing that the trainer has not."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from atropos_exp.engine.hf_client import HFClient
from atropos_exp.engine.preflight import missing_modules
from atropos_exp.engine.process import ServerProcess
from atropos_exp.engine.transport import TRANSPORTS, is_transport, make_transport
from atropos_exp.types import UserError

SERVER = "atropos_exp.engine.hf_server"
NEEDS = ("torch", "transformers", "safetensors", "starlette", "uvicorn", "msgpack", "xxhash", "numpy")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class HFEngine:
    """Settings of `engine=hf`."""

    dtype: str
    python: str | None
    num_threads: int | None
    max_batch_tokens: int
    batching_wait_seconds: float
    transport: str
    start_timeout_seconds: float
    request_timeout_seconds: float
    health_timeout_seconds: float

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"engine.dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")
        if not is_transport(self.transport):
            raise UserError(f"engine.transport must be one of {', '.join(TRANSPORTS)}; got {self.transport!r}")
        for name in ("start_timeout_seconds", "request_timeout_seconds", "health_timeout_seconds"):
            if not getattr(self, name) > 0:
                raise UserError(f"engine.{name} must be above 0 seconds; got {getattr(self, name)}")
        if self.batching_wait_seconds < 0:
            raise UserError(f"engine.batching_wait_seconds must be 0 or more; got {self.batching_wait_seconds}")
        if self.max_batch_tokens < 1:
            raise UserError(f"engine.max_batch_tokens must be 1 or more; got {self.max_batch_tokens}")
        if self.num_threads is not None and self.num_threads < 1:
            raise UserError(f"engine.num_threads must be 1 or more, or null for all cores; got {self.num_threads}")

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
        return problems

    def start(self, *, model_folder: Path, device: str, log_folder: Path, max_sequence_length: int) -> HFClient:
        """Start the server on a Hugging Face folder and wait for its first token; raises EngineError.

        `max_sequence_length` is the most tokens that a prompt and its answer have together. The caller stops it.
        """
        if max_sequence_length > self.max_batch_tokens:
            raise UserError(
                f"engine.max_batch_tokens is {self.max_batch_tokens}, but one sequence may have {max_sequence_length} "
                "tokens (max_prompt_length + max_response_length); raise the former or lower the latter"
            )
        if not (model_folder / "config.json").is_file():
            raise UserError(f"no model in {model_folder}: it has no config.json; expected a Hugging Face model folder")
        positions = json.loads((model_folder / "config.json").read_text()).get("max_position_embeddings")
        if positions is not None and max_sequence_length > positions:
            raise UserError(
                f"the model in {model_folder} has a context of {positions} tokens, but max_prompt_length + "
                f"max_response_length is {max_sequence_length}; lower one of them"
            )
        dtype = self.dtype
        if dtype == "auto":
            dtype = "bfloat16" if device.startswith("cuda") else "float32"
        num_threads = self.num_threads or len(os.sched_getaffinity(0))
        transport = make_transport(self.transport, log_folder)
        with contextlib.ExitStack() as undo:
            undo.callback(transport.close)
            process = ServerProcess(
                SERVER,
                [
                    *("--model", str(model_folder), "--device", device, "--dtype", dtype),
                    *("--num-threads", str(num_threads), "--max-batch-tokens", str(self.max_batch_tokens)),
                    *("--batching-wait-seconds", str(self.batching_wait_seconds)),
                    *("--max-sequence-length", str(max_sequence_length)),
                    *("--heartbeat-seconds", str(self.health_timeout_seconds / 5)),
                    *transport.arguments(),
                ],
                python=self.python,
                environment={
                    # A launcher such as torchrun sets one thread per rank; the server has its own setting.
                    "OMP_NUM_THREADS": str(num_threads),
                    # Idle threads sleep: spinning ones slow the trainer, and each other on a shared machine (8 × seen).
                    "OMP_WAIT_POLICY": "passive",
                    "HF_HUB_OFFLINE": "1",
                    "TQDM_DISABLE": "1",  # progress bars are noise in a log
                },
                log=log_folder / "engine.log",
                inherited_fds=transport.inherited_fds,
            )
            undo.callback(process.stop)
            client = HFClient(
                process,
                transport,
                dtype=dtype,
                request_timeout_seconds=self.request_timeout_seconds,
                health_timeout_seconds=self.health_timeout_seconds,
            )
            undo.callback(client.stop)
            client.wait_until_ready(self.start_timeout_seconds)
            undo.pop_all()
        return client
