"""A TCP port kept for a server that is still to start, or to start again."""

import os
import socket
import weakref

BACKLOG = 2048  # connections that wait while a server starts, or is busy


class HeldPort:
    """A free port, bound but not listened on: connections are refused, yet no other program is given it.

    A port that was merely found free may be somebody's a moment later, above all as the near end of a connection.
    A server can listen on this one all the same, since servers bind with SO_REUSEADDR. Held until `close`, at most as
    long as the object lives.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        """`host`: the address of this machine; "" stands for all."""
        self._host = host
        with socket.socket() as bound:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((host, 0))
            self.number: int = bound.getsockname()[1]
            self._close = weakref.finalize(self, os.close, bound.detach())

    def listen(self) -> socket.socket:
        """A listening socket on it, to hand to a server. Raises OSError while somebody listens already."""
        return socket.create_server((self._host, self.number), backlog=BACKLOG)

    def close(self) -> None:
        """Give the port back. May be called twice."""
        self._close()
