"""Feeds JSON lines to a child process without ever waiting for it: what a full queue cannot take is counted."""

import json
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Thread
from time import monotonic, sleep
from typing import IO, Any

from atropos_exp.processes.child import child_environment

log = logging.getLogger(__name__)


class Feeder:
    """A child process that reads messages on its standard input and reports on its standard output.

    Both are JSON objects, one a line; a report is `{"text": ..., "level": "info" | "warning"}`. A report of level info
    goes to `tell`, in another thread; what the process writes to standard error goes to `log_path`. It runs in a
    session of its own, so a Ctrl-C in the terminal does not reach it. No method but `close` waits, and `close` has a
    deadline.
    """

    def __init__(
        self, command: Sequence[str], *, name: str, log_path: Path, queue_size: int, tell: Callable[[str], None]
    ) -> None:
        self._name = name
        self._tell = tell
        self._queue: Queue[Mapping[str, Any] | None] = Queue(queue_size)
        self.num_dropped = 0
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("ab") as log_file:
            self._process = subprocess.Popen(
                command,
                env=child_environment(None, with_secrets=True),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log_file,
                start_new_session=True,
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._writer = Thread(target=self._write, args=(self._process.stdin,), name=f"{name}-write", daemon=True)
        self._reader = Thread(target=self._read, args=(self._process.stdout,), name=f"{name}-read", daemon=True)
        self._writer.start()
        self._reader.start()

    def put(self, message: Mapping[str, Any]) -> None:
        """Queue a message; if the queue is full, drop it and count it."""
        try:
            self._queue.put_nowait(message)
        except Full:
            self.num_dropped += 1
            if self.num_dropped == 1:
                log.warning("%s cannot keep up: messages are dropped (metrics.jsonl has them all)", self._name)

    def close(self, last: Mapping[str, Any], *, timeout: float) -> None:
        """Send `last`, wait up to `timeout` seconds for the process to end by itself, then kill its whole session."""
        self._put_last(last)
        self._put_last(None)
        if not self._ended_within(timeout):
            log.warning("%s did not finish within %.0f s and was ended", self._name, timeout)
        # all of its session, what the process started itself included; not yet reaped, so the id is still its own
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(5.0)
        self._writer.join(5.0)
        self._reader.join(5.0)
        if self.num_dropped:
            log.warning("%s missed %d messages", self._name, self.num_dropped)

    def _ended_within(self, timeout: float) -> bool:
        deadline = monotonic() + timeout
        while os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if monotonic() > deadline:
                return False
            sleep(0.02)
        return True

    def _put_last(self, message: Mapping[str, Any] | None) -> None:
        """The end must get in, if need be in place of the oldest message that waits."""
        while True:
            try:
                self._queue.put_nowait(message)
                return
            except Full:
                try:
                    self._queue.get_nowait()
                    self.num_dropped += 1
                except Empty:
                    continue

    def _write(self, pipe: IO[bytes]) -> None:
        try:
            with pipe:
                while (message := self._queue.get()) is not None:
                    pipe.write(json.dumps(message, default=str).encode() + b"\n")
                    pipe.flush()
        except OSError as error:  # the process is gone; from now on the queue fills up and drops
            log.debug("%s takes no more messages: %s", self._name, error)

    def _read(self, pipe: IO[bytes]) -> None:
        with pipe:
            for line in pipe:
                try:
                    report = json.loads(line)
                    text, level = str(report["text"]), report.get("level")
                except (ValueError, KeyError, TypeError, AttributeError):
                    continue  # not a report; a library printed something
                if level == "warning":
                    log.warning("%s: %s", self._name, text)
                else:
                    self._tell(f"{self._name}: {text}")
