"""What every engine server process does around its model: command line, signals, the web server.

The process listens on a loopback socket that it inherited and answers only requests that carry its bearer token.
"""

import argparse
import contextlib
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from atropos_exp.parts.engine.process import TOKEN_VARIABLE
from atropos_exp.parts.engine.serving.app import Service, make_app
from atropos_exp.parts.engine.serving.backend import Backend
from atropos_exp.processes import lifeline
from atropos_exp.weights.group import BACKENDS, GroupSource
from atropos_exp.weights.receiver import BucketSource, inherited

logger = logging.getLogger(__name__)
B = TypeVar("B", bound=Backend)


def prepare(options: argparse.Namespace) -> str:
    """Set up the log and signals, first thing in the process. Returns the bearer token."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    lifeline.ignore()
    return os.environ.pop(TOKEN_VARIABLE)


def serve(backend: Backend, options: argparse.Namespace, *, token: str) -> None:
    """Answer requests with the backend until the process ends."""
    import uvicorn

    service = Service(backend=backend, heartbeat_seconds=options.heartbeat_seconds)
    config = uvicorn.Config(
        make_app(service, token=token),
        lifespan="off",
        log_level="warning",
        access_log=False,
        timeout_keep_alive=3600,
        ws="none",
    )

    class Server(uvicorn.Server):
        """Leaves the signals as `prepare` set them."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    logger.info("serving %s on %s as %s", options.model, options.device, options.dtype)
    Server(config).run(sockets=[socket.socket(fileno=options.socket_fd)])


def serve_from_thread(
    make: Callable[[argparse.Namespace], B], run: Callable[[B], None], options: argparse.Namespace
) -> None:
    """Make a backend and `run` it, both on the thread that owns its model, as a CUDA device belongs to a thread; and
    answer requests with it until the process ends."""
    token = prepare(options)
    made: Future[B] = Future()

    def own_the_model() -> None:
        backend = make(options)
        made.set_result(backend)
        run(backend)

    run_model_thread(own_the_model)
    serve(made.result(), options, token=token)


def run_model_thread(work: Callable[[], None]) -> None:
    """Run `work` in the thread that owns the model. If it ends, the process does: requests would wait for nothing."""

    def run() -> None:
        try:
            work()
        except BaseException:
            logger.exception("the model thread ended")
            os._exit(70)

    threading.Thread(target=run, name="model", daemon=True).start()


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """The command line options that every server has. `module`: how the server is started."""
    options = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    options.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    options.add_argument("--trust-remote-code", action="store_true", help="run Python code that the folder has")
    options.add_argument("--device", required=True, help="cpu, cuda or cuda:N")
    options.add_argument("--dtype", required=True)
    options.add_argument("--num-threads", type=int, required=True)
    options.add_argument("--max-sequence-length", type=int, required=True)
    options.add_argument("--heartbeat-seconds", type=float, required=True, help="sign of life to a waiting client")
    options.add_argument("--problem", help="refuse to sample until an update has arrived, for this reason")
    options.add_argument("--socket-fd", type=int, required=True, help="listening socket")
    options.add_argument("--weights-fd", type=int, help="shared memory for new weights")
    options.add_argument("--weights-folder", type=Path, help="folder for new weights")
    options.add_argument("--weights-cuda-ipc", action="store_true", help="new weights lie in device memory")
    options.add_argument("--group-backend", choices=BACKENDS, help="new weights are sent to a group of processes")
    options.add_argument("--group-fd", type=int, help="memory file through which the group finds together")
    options.add_argument("--group-rank", type=int, help="of this server's first receiver in the group")
    return options


def bucket_source(options: argparse.Namespace) -> BucketSource:
    """Where buckets of weights arrive, from the options that the sender's transport gave this server."""
    group = None
    store = inherited(options.group_fd)
    if store is not None:
        group = GroupSource(backend=options.group_backend, store=store, first_rank=options.group_rank)
    return BucketSource(
        shm=inherited(options.weights_fd),
        folder=options.weights_folder,
        cuda_ipc=options.weights_cuda_ipc,
        group=group,
    )
