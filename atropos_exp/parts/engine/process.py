"""One server process of an engine: its command, address, token and restarts."""

import contextlib
import secrets
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from atropos_exp.errors import EngineError
from atropos_exp.processes.child import ENGINE_DEVICES, Child, child_environment
from atropos_exp.processes.ports import HeldPort

TOKEN_VARIABLE = "ATROPOS_EXP_ENGINE_TOKEN"  # in the child's environment: its bearer token
PORT_SECONDS = 15.0  # until nothing of a killed server listens on its port any more


class ServerProcess:
    """Runs `python -m module arguments` on a free loopback port, which it keeps over restarts.

        process = ServerProcess("atropos_exp.parts.engine.hf.server", ["--model", "folder", ...], python=None,
                                environment={}, log=Path("log/engine.log"))
        process.address  # "http://127.0.0.1:40123"

    The server inherits the listening socket (`--socket-fd`) and finds its bearer token in the environment. Its output
    goes to `log`. It ends with this process, see `Child`; `child` is the one that runs now.
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
        """`python`: the interpreter, None for this process's. `environment`: variables besides this process's.
        `inherited_fds`: descriptors that the server inherits. Raises UserError if the interpreter cannot be started."""
        self.log = log
        self.token = secrets.token_urlsafe(32)
        self.num_restarts = 0
        self._command = [python or sys.executable, "-m", module, *arguments]
        self._environment = {**child_environment(python), TOKEN_VARIABLE: self.token, **environment}
        if devices := self._environment.pop(ENGINE_DEVICES, ""):
            self._environment["CUDA_VISIBLE_DEVICES"] = devices
        self._inherited_fds = tuple(inherited_fds)
        self._port = HeldPort()
        self.child = self._spawn()

    def restart(self, *arguments: str) -> None:
        """Kill what is left of the process and start it again at the same address, with additional arguments. Raises
        EngineError if the old one does not give up its port."""
        self.child.stop()
        self.num_restarts += 1
        self.child = self._spawn(*arguments)

    def _spawn(self, *more: str) -> Child:
        with self._listen() as listener:
            return Child(
                [*self._command, *more, "--socket-fd", str(listener.fileno())],
                log=self.log,
                environment=self._environment,
                pass_fds=(listener.fileno(), *self._inherited_fds),
            )
        # Our copy of the socket is closed then: once the child is dead, connections are refused instead of queued.

    def _listen(self) -> socket.socket:
        """A listening socket on the port, as soon as whoever inherited the last one is gone."""
        deadline = time.monotonic() + PORT_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                return self._port.listen()
            time.sleep(0.05)
        try:
            return self._port.listen()
        except OSError as error:
            raise EngineError(
                f"the engine cannot be started anew: {error}. Something that its old process {self.pid} started still "
                f"listens on port {self._port.number} after {PORT_SECONDS:g} s; `ss -ltnp` names it"
            ) from error

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port.number}"

    @property
    def pid(self) -> int:
        return self.child.pid

    def stop(self) -> None:
        """Kill the process and its children, which hold nothing that has to be saved, and release the port. May be
        called twice; there is no restart after it."""
        self.child.stop()
        self._port.close()
