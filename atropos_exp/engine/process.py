"""A server process that an engine client started: its address, its log, its end."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

TOKEN_VARIABLE = "ATROPOS_EXP_ENGINE_TOKEN"  # in the child's environment: its bearer token
DEVICES_VARIABLE = "ATROPOS_EXP_ENGINE_DEVICES"  # set by a launcher that keeps devices for engines alone
TAIL_LINES = 12
# What a launcher set up for the trainer's ranks, and secrets that a server of local weights has no use for.
NOT_FOR_SERVERS = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"),
)


class ServerProcess:
    """Runs `python -m module arguments` on a free loopback port, bound before the start so that nobody else gets it.

    The child inherits the listening socket (`--socket-fd`), learns its parent (`--parent-pid`) and finds its bearer
    token in the environment. Its output goes to `log`.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        python: str | None,
        environment: dict[str, str],
        log: Path,
        inherited_fds: Sequence[int] = (),
    ) -> None:
        self.log = log
        self.token = secrets.token_urlsafe(32)
        log.parent.mkdir(parents=True, exist_ok=True)
        with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener, log.open("ab") as output:
            self.address = f"http://127.0.0.1:{listener.getsockname()[1]}"
            command = [python or sys.executable, "-m", module, *arguments]
            command += ["--socket-fd", str(listener.fileno()), "--parent-pid", str(os.getpid())]
            # The kernel's parent-death signal follows the *thread* that starts the child: safe for the main one only.
            if threading.current_thread() is threading.main_thread():
                command.append("--parent-death-signal")
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**child_environment(python), TOKEN_VARIABLE: self.token, **environment},
                pass_fds=(listener.fileno(), *inherited_fds),
                start_new_session=True,  # Ctrl-C in the terminal is for the trainer
            )
        # Our copy of the socket is closed: once the child is dead, connections are refused instead of queued.

    @property
    def pid(self) -> int:
        return self._process.pid

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def wait(self, seconds: float) -> None:
        """Wait for a process that is about to end."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=seconds)

    def state(self) -> str:
        """For an error message: how the process is, and the end of its log."""
        code = self._process.poll()
        if code is None:
            how = f"its process {self.pid} is still there"
        elif code < 0:
            how = f"its process was killed by {signal.Signals(-code).name}"
        else:
            how = f"its process ended with exit code {code}"
        return f"{how}. Last lines of {self.log}:\n{self._tail()}"

    def stop(self) -> None:
        """Kill the process: it holds nothing that needs a goodbye. May be called twice."""
        with contextlib.suppress(ProcessLookupError):
            if self._process.poll() is None:
                os.killpg(self.pid, signal.SIGKILL)
        self._process.wait(timeout=30)

    def _tail(self) -> str:
        try:
            with self.log.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - 8192))
                lines = log.read().decode(errors="replace").splitlines()
        except OSError as error:
            return f"  (unreadable: {error})"
        return "\n".join(f"  {line}" for line in lines[-TAIL_LINES:]) or "  (empty)"


def child_environment(python: str | None) -> dict[str, str]:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in NOT_FOR_SERVERS and not name.startswith("TORCHELASTIC_")
    }
    if (devices := environment.pop(DEVICES_VARIABLE, "")) != "":
        environment["CUDA_VISIBLE_DEVICES"] = devices
    root = Path(__file__).resolve().parents[2]
    # A checkout is importable for any interpreter; another environment's site-packages must not shadow its own.
    if python is None or root.name not in ("site-packages", "dist-packages"):
        paths = [str(root), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment
