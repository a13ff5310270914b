"""A program that a run starts, with its log and its exit code. It never outlives the run: `guard.py` sees to that."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atropos_exp.errors import UserError
from atropos_exp.processes.group import ProcessGroup

TAIL_LINES = 12
TAIL_BYTES = 8192
START_SECONDS = 30.0  # until the guard says that the program runs
STOP_SECONDS = 15.0  # until a killed program and all that it started are gone
# What a launcher set up for the trainer's ranks, and secrets that a server of local weights has no use for.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
ENGINE_DEVICES = "ATROPOS_EXP_ENGINE_DEVICES"  # set by a launcher that keeps devices of rank 0's node for the engine
SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
IMPORT_ROOT = Path(__file__).resolve().parents[2]  # holds the package: a checkout, or site-packages
_GUARD = Path(__file__).with_name("guard.py")


class Child:
    """A running program whose output is appended to a log. Thread-safe.

    child = Child([sys.executable, "-m", "my.server"], log=folder / "log" / "server.log", environment=environment)
    if child.wait(5.0) is not None:
        raise UserError(f"the server ended: {child.state()}")
    child.stop(grace_seconds=2.0)
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        log: Path,
        environment: Mapping[str, str],
        pass_fds: Sequence[int] = (),
        cwd: Path | None = None,
    ) -> None:
        """Returns when the program has been started. Raises UserError if it cannot be."""
        self.log = log
        self.argv = tuple(argv)
        self._lock = threading.Lock()
        self._code: int | None = None
        self._pending = b""
        log.parent.mkdir(parents=True, exist_ok=True)

        def start() -> dict[str, Any] | None:
            return self._start(environment, pass_fds, cwd)

        first = start() or start()  # a guard that is killed before it says anything is not the program's fault
        if first is None or "error" in first:
            raise UserError(f"cannot be started: {first['error'] if first else 'its guard died'}")
        self.pid = int(first["pid"])
        self._remains = ProcessGroup(self.pid)

    def _start(
        self, environment: Mapping[str, str], pass_fds: Sequence[int], cwd: Path | None
    ) -> dict[str, Any] | None:
        """Start the guard with the program. Returns its first message; None if it died before."""
        self._control, theirs = socket.socketpair()
        with theirs, self.log.open("ab") as output:
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_GUARD), str(theirs.fileno()), *self.argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                cwd=cwd,
                pass_fds=(theirs.fileno(), *pass_fds),
                start_new_session=True,
            )
        self._control.settimeout(START_SECONDS)
        try:
            first = self._message()
        except TimeoutError:
            self._guard.kill()
            self._guard.wait(STOP_SECONDS)
            self._control.close()
            raise UserError(
                f"{self.argv[0]} did not start within {START_SECONDS:g} s; is the machine overloaded?"
            ) from None
        self._control.setblocking(False)
        if first is None or "error" in first:
            self._guard.wait(STOP_SECONDS)
            self._control.close()
        return first

    def poll(self) -> int | None:
        """Return the exit code (negative: killed by that signal), or None while the program runs."""
        with self._lock:
            if self._code is None:
                try:
                    message = self._message()
                except BlockingIOError:
                    return None
                self._control.close()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._guard.wait(STOP_SECONDS)
                if message is None:  # the guard itself was killed, so nobody has seen to the rest
                    self._remains.end(STOP_SECONDS)
                self._code = -signal.SIGKILL if message is None else int(message["code"])
            return self._code

    def wait(self, seconds: float) -> int | None:
        """Wait up to `seconds` for the end, and return what `poll` returns then."""
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return code

    def stop(self, grace_seconds: float = 0.0) -> None:
        """End the program with everything that it has started. May be called twice.

        `grace_seconds`: how long the program has to end by itself after a SIGTERM; with 0 it is killed at once.
        """
        if self.poll() is None and grace_seconds > 0:
            with contextlib.suppress(OSError):
                self._control.send(b"T")
            self.wait(grace_seconds)
        if self.poll() is None:
            with contextlib.suppress(OSError):
                self._control.shutdown(socket.SHUT_WR)
            if self.wait(STOP_SECONDS) is None:
                self._guard.kill()
                self._guard.wait(STOP_SECONDS)
                self.poll()

    def state(self) -> str:
        """Describe how the program is, with the end of its log, for an error message."""
        code = self.poll()
        if code is None:
            how = f"its process {self.pid} is still there"
        elif code < 0:
            how = f"its process was killed by {signal.Signals(-code).name}"
        else:
            how = f"its process ended with exit code {code}"
        return f"{how}. Last lines of {self.log}:\n{self.log_tail()}"

    def log_tail(self, num_lines: int = TAIL_LINES) -> str:
        """Return the last `num_lines` lines of the log, indented."""
        try:
            with self.log.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL_BYTES))
                lines = log.read().decode(errors="replace").splitlines()
        except OSError as error:
            return f"  (unreadable: {error})"
        return "\n".join(f"  {line}" for line in lines[-num_lines:]) or "  (empty)"

    def _message(self) -> dict[str, Any] | None:
        """The guard's next line; None if it is gone. Blocks as the socket does."""
        while b"\n" not in self._pending:
            data = self._control.recv(4096)
            if not data:
                return None
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message


def child_environment(python: str | None, *, with_secrets: bool = False) -> dict[str, str]:
    """Return the environment variables for a program that this process starts.

    `python` is its interpreter, None this process's own. What a launcher has set for the trainer's ranks is left out,
    and so are secrets unless `with_secrets`. A checkout of this package is made importable.
    """
    unwanted = RANK_VARIABLES if with_secrets else (*RANK_VARIABLES, *SECRETS)
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in unwanted and not name.startswith("TORCHELASTIC_")
    }
    # A checkout is importable for any interpreter; another environment's site-packages must not shadow its own.
    if python is None or IMPORT_ROOT.name not in ("site-packages", "dist-packages"):
        paths = [str(IMPORT_ROOT), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment
