"""The server process of engine `hf`: `python -m atropos_exp.engine.hf_server --model FOLDER …` (started by hf.py).

It listens on a loopback socket inherited from its parent, answers only requests that carry the run's token, holds
no files or named memory, and ends when its parent does.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from atropos_exp.engine.hf_app import Service, make_app
from atropos_exp.engine.hf_decode import Decoder
from atropos_exp.engine.hf_scheduler import Scheduler
from atropos_exp.engine.hf_weights import WeightStore
from atropos_exp.engine.process import TOKEN_VARIABLE

PREFILL_TOKENS = {"cpu": 1024, "cuda": 32768}  # of one forward pass over prompts: bounds its memory and a probe's wait
PARENT_POLL_SECONDS = 0.25
_PR_SET_PDEATHSIG = 1

logger = logging.getLogger(__name__)


def main() -> None:
    options = _options()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    # The trainer decides when to stop: a signal to the whole job must not take the engine away under its last step.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)
    _die_with(options.parent_pid, at_once=options.parent_death_signal)
    token = os.environ.pop(TOKEN_VARIABLE)

    import torch
    import uvicorn

    torch.set_num_threads(options.num_threads)
    torch.set_num_interop_threads(1)
    model = load_model(options.model, device=options.device, dtype=options.dtype)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and options.max_sequence_length > positions:
        raise SystemExit(f"the model has {positions} positions, the run needs {options.max_sequence_length}")
    weights = WeightStore(model)
    scheduler: Scheduler
    decoder = Decoder(model, prefill_tokens=PREFILL_TOKENS[model.device.type], on_step=lambda: scheduler.on_step())
    scheduler = Scheduler(
        decoder,
        weights,
        max_batch_tokens=options.max_batch_tokens,
        batching_wait_seconds=options.batching_wait_seconds,
    )
    service = Service(
        scheduler=scheduler,
        decoder=decoder,
        weights=weights,
        vocab_size=model.config.get_text_config().vocab_size,
        max_sequence_length=options.max_sequence_length,
        weights_fd=options.weights_fd,
        weights_folder=options.weights_folder,
        heartbeat_seconds=options.heartbeat_seconds,
        versions={"torch": torch.__version__, "transformers": sys.modules["transformers"].__version__},
    )
    threading.Thread(target=_own_the_model, args=(scheduler,), name="model", daemon=True).start()
    config = uvicorn.Config(
        make_app(service, token=token),
        lifespan="off",
        log_level="warning",
        access_log=False,
        timeout_keep_alive=3600,
        ws="none",
    )
    logger.info("serving %s on %s as %s", options.model, options.device, options.dtype)
    _web_server(config).run(sockets=[socket.socket(fileno=options.socket_fd)])


def load_model(folder: Path, *, device: str, dtype: str) -> Any:
    """The model of a Hugging Face folder, for inference. Only files of the folder are read, and no code from it."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="sdpa", local_files_only=True, trust_remote_code=False
    )
    return model.to(device).eval().requires_grad_(False)


def _own_the_model(scheduler: Scheduler) -> None:
    try:
        scheduler.run_forever()
    except BaseException:
        # Without this thread every request would wait for nothing.
        logger.exception("the model thread ended")
        os._exit(70)


def _die_with(parent_pid: int, *, at_once: bool) -> None:
    """End this process when its parent has ended, however that happened."""

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(PARENT_POLL_SECONDS)
        os._exit(71)

    if at_once:
        # Also reaches a stopped process. The kernel ties it to the parent's *thread*, hence only on request.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=watch, name="parent", daemon=True).start()


def _web_server(config: Any) -> Any:
    import uvicorn

    class Server(uvicorn.Server):
        """Leaves the signals as `main` set them."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    return Server(config)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m atropos_exp.engine.hf_server", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--device", required=True, help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--num-threads", type=int, required=True)
    parser.add_argument("--max-batch-tokens", type=int, required=True)
    parser.add_argument("--batching-wait-seconds", type=float, required=True)
    parser.add_argument("--max-sequence-length", type=int, required=True)
    parser.add_argument("--heartbeat-seconds", type=float, required=True, help="sign of life to a waiting client")
    parser.add_argument("--socket-fd", type=int, required=True, help="listening socket")
    parser.add_argument("--weights-fd", type=int, help="shared memory for new weights")
    parser.add_argument("--weights-folder", type=Path, help="folder for new weights")
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--parent-death-signal", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
