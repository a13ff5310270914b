"""Stands between a trainer and the API: writes down every request, and delays or loses an answer when told to."""

from __future__ import annotations

import http.client
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

UPSTREAM_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One request and what the API said."""

    at: float  # time.monotonic() when it came
    method: str
    path: str
    headers: dict[str, str]  # lower-case names
    body: bytes
    status: int  # 0: the API did not answer
    answer: bytes

    @property
    def has_batch(self) -> bool:
        return self.path == "/batch" and b'"tokens"' in self.answer


class Proxy:
    def __init__(self, port: int) -> None:
        """`port`: of the API on this machine."""
        self._upstream = port
        self._lock = threading.Lock()
        self.seen: list[Seen] = []  # in the order in which they were answered
        self.delay_next_batch = 0.0  # seconds that the next answer with a batch in it is held back
        self.lose_next_batch = False  # the API hands it out, and nobody gets it

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler) -> None:
                self._pass_on(handler)

            do_POST = do_GET

            def log_message(handler, format: str, *arguments: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(30)

    def to(self, path: str, *, method: str = "GET", after: float = 0.0) -> list[Seen]:
        with self._lock:
            return [one for one in self.seen if (one.method, one.path) == (method, path) and one.at >= after]

    def _pass_on(self, handler: BaseHTTPRequestHandler) -> None:
        at = time.monotonic()
        body = handler.rfile.read(int(handler.headers.get("content-length") or 0))
        connection = http.client.HTTPConnection("127.0.0.1", self._upstream, timeout=UPSTREAM_SECONDS)
        try:
            headers = {name: value for name, value in handler.headers.items() if name.lower() != "connection"}
            connection.request(handler.command, handler.path, body or None, headers)
            response = connection.getresponse()
            status, kind, answer = response.status, response.getheader("content-type"), response.read()
        except (OSError, http.client.HTTPException):
            status, kind, answer = 0, None, b""
        finally:
            connection.close()
        one = Seen(
            at=at,
            method=handler.command,
            path=handler.path,
            headers={name.lower(): value for name, value in handler.headers.items()},
            body=body,
            status=status,
            answer=answer,
        )
        with self._lock:
            self.seen.append(one)
            delay, lose = (self.delay_next_batch, self.lose_next_batch) if one.has_batch else (0.0, False)
            if one.has_batch:
                self.delay_next_batch, self.lose_next_batch = 0.0, False
        time.sleep(delay)
        handler.close_connection = True
        if status == 0 or lose:
            return
        handler.send_response(status)
        handler.send_header("content-type", kind or "text/plain")
        handler.send_header("content-length", str(len(answer)))
        handler.send_header("connection", "close")
        handler.end_headers()
        handler.wfile.write(answer)
