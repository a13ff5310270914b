"""Listening sockets that the trainer owns: they outlive the gateway's process, and connections wait in them."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from atropos_exp.errors import UserError
from atropos_exp.processes.ports import BACKLOG


@dataclass(frozen=True, kw_only=True, slots=True)
class Doors:
    """The listening sockets of a gateway."""

    sockets: tuple[socket.socket, ...]  # the gateway's own one first

    @classmethod
    def open(cls, host: str, port: int | None, extra_ports: Sequence[int]) -> Doors:
        """Listen on `port` (None: a free one) and on each extra port. Raises UserError if one is not available."""
        wanted = [(port, "gateway.port"), *((extra, "atropos.extra_ports") for extra in extra_ports)]
        with contextlib.ExitStack() as undo:
            sockets = []
            for number, key in wanted:
                sockets.append(_bind(host, number, key))
                undo.callback(sockets[-1].close)
            undo.pop_all()
        return cls(sockets=tuple(sockets))

    @property
    def host(self) -> str:
        """The host by which programs on this machine reach the gateway."""
        bound = str(self.sockets[0].getsockname()[0])
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bound, bound)

    @property
    def port(self) -> int:
        """The port of the gateway's own socket."""
        return int(self.sockets[0].getsockname()[1])

    @property
    def address(self) -> str:
        """The gateway's URL. Environments use `f"{address}/v1"` as their base URL."""
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"

    def close(self) -> None:
        """Close all sockets."""
        for listener in self.sockets:
            listener.close()


def _bind(host: str, port: int | None, key: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port or 0), family=family, backlog=BACKLOG)
    except OSError as error:
        known = {
            errno.EADDRINUSE: "another program listens there (another run?)",
            errno.EACCES: "ports below 1024 are reserved",
        }
        what = known.get(error.errno or 0) or error.strerror or str(error)
        remedy = (
            "stop that program or choose another port (null takes a free one)"
            if key == "gateway.port"
            else "stop that program or take the port out of the list (only environments that ignore their base URL "
            "need it)"
        )
        raise UserError(f"{key}: cannot listen on {host}:{port}: {what}; {remedy}") from None
