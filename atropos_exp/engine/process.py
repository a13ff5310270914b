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
TAIL_LINES = 12


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
