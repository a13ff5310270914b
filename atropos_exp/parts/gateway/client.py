"""The trainer's side of the gateway: starts, restarts and stops its process, and sends it the trainer's requests."""

import contextlib
import http.client
import json
import secrets
import select
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atropos_exp.errors import EngineError, UserError, WireError
from atropos_exp.parts.gateway.counters import GAUGES
from atropos_exp.parts.gateway.options import CLIENT_TOKEN, ENGINE_TOKENS, PRIVATE_TOKEN, Options
from atropos_exp.parts.gateway.ports import Doors
from atropos_exp.processes.child import Child, child_environment
from atropos_exp.processes.wire import flatten, pack, unpack
from atropos_exp.types import Endpoint, Floats, Mask, Provenance, TokenIds

SERVER = "atropos_exp.parts.gateway.server"
ENGINE_KINDS = ("hf",)  # engines whose protocol `upstream.py` speaks
PIECE_TOKENS = 1 << 20  # of the sequences that are looked up in one exchange, 9 bytes each
POLL_SECONDS = 0.1  # how soon the end of the process is noticed while an answer is due


class GatewayClient:
    """Owns the gateway's process. A `Ledger`. Its methods may be called from several threads.

    Example: between `hold()` and `release()` no new request reaches the engine; `lookup(sequences, claim=True)` tells
    which weights sampled the sequences that an environment sent back.
    """

    def __init__(
        self,
        options: Options,
        *,
        doors: Doors,
        endpoints: Sequence[Endpoint],
        token: str | None,
        log_folder: Path,
    ) -> None:
        """Start the process with `options` and wait until it answers. Environments must send `token` as their API key.

        Raises EngineError if it does not start, UserError for an engine that it cannot talk to."""
        for endpoint in endpoints:
            if endpoint.kind not in ENGINE_KINDS:
                raise UserError(
                    f"the gateway cannot talk to an engine of kind {endpoint.kind!r} yet; got that, expected one of "
                    f"{', '.join(ENGINE_KINDS)}; choose engine=hf"
                )
        self.address = doors.address  # environments use `f"{address}/v1"` as their base URL
        self.token = token
        self.restarts = 0
        self._options = options
        self._doors = doors
        self._engine_tokens = [endpoint.token for endpoint in endpoints]
        self._log = log_folder / "gateway.log"
        self._private_token = secrets.token_urlsafe(32)
        self._lock = threading.RLock()  # of what follows
        self._held = False
        self._past: dict[str, float] = {}  # totals of processes that are gone; no gauges
        self._seen: dict[str, float] = {}  # last counters of the present one
        self.process = self._start()

    def lookup(
        self,
        sequences: Sequence[tuple[TokenIds, Mask]],
        *,
        claim: bool,
        logprobs: Sequence[Floats | None] | None = None,
    ) -> list[Provenance | None]:
        """What is known about each sequence (token ids [T], trained [T]); None for one that was not sampled here.

        `logprobs` [T] of each, where known, tell equal completions of different weights apart. `claim` marks the
        completions as returned. Raises EngineError.
        """
        if not sequences:
            return []
        hints = [None] * len(sequences) if logprobs is None else logprobs
        found: list[Provenance | None] = []
        start = num_tokens = 0
        for at, (token_ids, _) in enumerate(sequences):
            num_tokens += len(token_ids)
            if num_tokens >= PIECE_TOKENS or at == len(sequences) - 1:
                found += self._look_up(sequences[start : at + 1], hints[start : at + 1], claim=claim)
                start, num_tokens = at + 1, 0
        return found

    def _look_up(
        self, sequences: Sequence[tuple[TokenIds, Mask]], hints: Sequence[Floats | None], *, claim: bool
    ) -> list[Provenance | None]:
        token_ids, lengths = flatten([ids for ids, _ in sequences], np.int32)
        message = {
            "token_ids": token_ids,
            "lengths": lengths,
            "trained": flatten([trained for _, trained in sequences], np.bool_)[0],
            "has_logprobs": np.array([hint is not None for hint in hints]),
            "logprobs": flatten([hint for hint in hints if hint is not None], np.float32)[0],
            "claim": claim,
        }
        answer = self._binary("/ledger/lookup", message, what="what its ledger knows")
        for known, hint in zip(answer["found"], hints, strict=True):
            if known is not None and known["logprobs"] is None:  # they are those that were asked about
                known["logprobs"] = hint
        return [None if known is None else Provenance(**known) for known in answer["found"]]

    def hold(self) -> None:
        """Make new requests wait; those that the engine already has are finished. Raises EngineError."""
        with self._lock:
            self._held = True
            self._binary("/hold", {}, what="requests to be held")

    def release(self) -> None:
        """Let the waiting requests go on. Raises EngineError."""
        with self._lock:
            self._held = False
            self._binary("/release", {}, what="requests to go on")

    def counters(self) -> Mapping[str, float]:
        """Totals since the start of the run, restarts included, and gauges: see counters.py. Raises EngineError."""
        with self._lock:
            self._seen = json.loads(self._exchange("GET", "/counters", b"", what="its counters"))
            totals = {name: value + self._past.get(name, 0) for name, value in self._seen.items()}
            return {**totals, "restarts": self.restarts}

    def refusals(self) -> Mapping[str, str]:
        """What the first refused request of each reason was told, by the present process. Raises EngineError."""
        told: dict[str, str] = json.loads(self._exchange("GET", "/refusals", b"", what="its refusals"))
        return told

    def check(self) -> None:
        """Raise EngineError unless the process answers within `gateway.health_timeout_seconds`."""
        self._exchange("GET", "/counters", b"", what="an answer as a sign of health")

    def restart_if_dead(self) -> bool:
        """Start a new process if this one has ended or hangs. The new one has the same ports and hold, and an empty
        ledger. Return whether one was started."""
        with self._lock:
            try:
                self.check()
                return False
            except EngineError:
                self.process.stop()
            for name, value in self._seen.items():
                if name not in GAUGES:
                    self._past[name] = self._past.get(name, 0) + value
            self._seen = {}
            self.restarts += 1
            self.process = self._start()
            return True

    def stop(self) -> None:
        """End the process and close the sockets. A second call does nothing."""
        self.process.stop()
        self._doors.close()

    def _start(self) -> Child:
        options = self._options.model_copy(update={"incarnation": self.restarts, "held": self._held})
        process = Child(
            [sys.executable, "-m", SERVER, options.model_dump_json()],
            log=self._log,
            environment=self._environment(),
            pass_fds=options.socket_fds,
        )
        try:
            self._wait_until_ready(process)
        except BaseException:
            process.stop()
            raise
        return process

    def _environment(self) -> dict[str, str]:
        environment = {
            **child_environment(None),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",  # it computes nothing
            PRIVATE_TOKEN: self._private_token,
            ENGINE_TOKENS: json.dumps(self._engine_tokens),
        }
        if self.token is not None:
            environment[CLIENT_TOKEN] = self.token
        return environment

    def _wait_until_ready(self, process: Child) -> None:
        """Ask until there is an answer: the socket belongs to us, so it accepts connections before the process runs."""
        seconds = self._options.start_timeout_seconds
        deadline = time.monotonic() + seconds
        while True:
            if process.poll() is not None:
                raise EngineError(f"the gateway did not start: {process.state()}")
            with contextlib.suppress(OSError, http.client.HTTPException):
                self._request(process, "GET", "/counters", b"", seconds=0.5)
                return
            if time.monotonic() > deadline:
                reason = f"waited {seconds:g} s (gateway.start_timeout_seconds) for its first answer"
                raise EngineError(f"the gateway did not start: {reason}; {process.state()}")

    def _binary(self, path: str, message: dict[str, Any], *, what: str) -> dict[str, Any]:
        try:
            content = pack({**message, "incarnation": self.restarts})
            return unpack(self._exchange("POST", path, content, what=what))
        except WireError as error:
            raise EngineError(f"gateway: waited for {what}; got no message: {error}") from None

    def _exchange(self, method: str, path: str, body: bytes, *, what: str) -> bytes:
        seconds = self._options.health_timeout_seconds
        waiting = f"gateway: waited for {what}"
        process = self.process
        try:
            status, answer = self._request(process, method, path, body, seconds=seconds)
        except TimeoutError:
            reason = f"no answer for {seconds:g} s (gateway.health_timeout_seconds)"
            raise EngineError(f"{waiting}; {reason}: {process.state()}") from None
        except (OSError, http.client.HTTPException) as error:
            process.wait(1.0)
            raise EngineError(f"{waiting}; {type(error).__name__} {error}: {process.state()}") from error
        if status != 200:
            raise EngineError(f"{waiting}; it answered {status}: {answer[:300].decode(errors='replace')}")
        return answer

    def _request(self, process: Child, method: str, path: str, body: bytes, *, seconds: float) -> tuple[int, bytes]:
        """Status and body of the answer. Raises TimeoutError, another OSError or HTTPException, and ConnectionError as
        soon as the process has ended: the socket is ours, so the connection itself would never break."""
        deadline = time.monotonic() + seconds
        connection = http.client.HTTPConnection(self._doors.host, self._doors.port, timeout=seconds)
        try:
            connection.request(method, path, body, {"Authorization": f"Bearer {self._private_token}"})
            poll = select.poll()
            poll.register(connection.sock, select.POLLIN)
            while not poll.poll(POLL_SECONDS * 1000):
                if process.poll() is not None:
                    raise ConnectionError("the process has ended")
                if time.monotonic() > deadline:
                    raise TimeoutError
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()
