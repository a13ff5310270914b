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

from atropos_exp.child import child_environment

TOKEN_VARIABLE = "ATROPOS_EXP_ENGINE_TOKEN"  # in the child's environment: its bearer token
DEVICES_VARIABLE = "ATROPOS_EXP_ENGINE_DEVICES"  # set by a launcher that keeps devices for engines alone
TAIL_LINES = 12
BACKLOG = 2048  # connections that wait while the server loads


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
        self.num_restarts = 0
        self._command = [python or sys.executable, "-m", module, *arguments, "--parent-pid", str(os.getpid())]
        self._environment = {**child_environment(python), TOKEN_VARIABLE: self.token, **environment}
        if devices := self._environment.pop(DEVICES_VARIABLE, ""):
            self._environment["CUDA_VISIBLE_DEVICES"] = devices
        self._inherited_fds = tuple(inherited_fds)
        log.parent.mkdir(parents=True, exist_ok=True)
        with socket.create_server(("127.0.0.1", 0), backlog=BACKLOG) as listener:
            self._port: int = listener.getsockname()[1]
            self._process = self._spawn(listener, ())

    def restart(self, *arguments: str) -> None:
        """Kill what is left of the process and start it again at the same address, with these arguments too."""
        self.stop()
        self.num_restarts += 1
        with socket.create_server(("127.0.0.1", self._port), backlog=BACKLOG) as listener:
            self._process = self._spawn(listener, arguments)

    def _spawn(self, listener: socket.socket, more: Sequence[str]) -> subprocess.Popen[bytes]:
        self._is_stopped = False
        command = [*self._command, *more, "--socket-fd", str(listener.fileno())]
        # The kernel's parent-death signal follows the *thread* that starts the child: safe for the main one only.
        if threading.current_thread() is threading.main_thread():
            command.append("--parent-death-signal")
        with self.log.open("ab") as output:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment,
                pass_fds=(listener.fileno(), *self._inherited_fds),
                start_new_session=True,  # Ctrl-C in the terminal is for the trainer
            )
        # Our copy of the socket is closed then: once the child is dead, connections are refused instead of queued.

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}"

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
        """Kill the process and its children: they hold nothing that needs a goodbye. May be called twice."""
        if not self._is_stopped:
            self._is_stopped = True
            with contextlib.suppress(ProcessLookupError):
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
