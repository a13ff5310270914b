"""Scores answers in processes that can be killed: scoring model output may hang, crash, or eat all memory."""

from __future__ import annotations

import contextlib
import logging
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from atropos_exp.errors import UserError
from atropos_exp.interfaces import Reward
from atropos_exp.parts.reward import worker as wire
from atropos_exp.parts.reward.failures import Failures
from atropos_exp.types import Prompt, RewardFailure

log = logging.getLogger(__name__)

LOAD_SECONDS = 180.0  # to import a reward's libraries
REPLY_SECONDS = 30.0  # to fork, or to accept a chunk
LONGEST_CHUNK = 64
LONGEST_STREAK = 4  # times in a row that a killed template is replaced
MEMORY_BYTES = 2 << 30  # that a worker may allocate beyond the loaded reward
Results = dict[int, float | RewardFailure]  # by the number of the item


@dataclass(kw_only=True, eq=False)
class _Worker:
    """The pool's view of one process."""

    process: int
    channel: socket.socket
    chunk: deque[int] = field(default_factory=deque)  # items it has not reported; the first is being scored
    deadline: float = 0.0  # of the first one
    buffer: bytearray = field(default_factory=bytearray)


class RewardPool:
    """A `Scorer` that runs `reward` in `num_workers` processes. It is a context manager.

    If an answer takes longer than `timeout_seconds`, its worker is killed with everything it started, and replaced; no
    other answer is affected. An answer whose worker died is scored once more, since it may have been killed from
    outside; only an answer under which two workers died is at fault. The class of `reward` must be importable, and its
    settings must be picklable. Example:

        with RewardPool(reward, num_workers=2, timeout_seconds=5.0) as pool:
            pool.score([("42", prompt), ("never ends", prompt)])  # [1.0, RewardFailure(reason="timeout")]
    """

    def __init__(
        self, reward: Reward, *, num_workers: int, timeout_seconds: float, memory_bytes: int = MEMORY_BYTES
    ) -> None:
        """Start loading the reward; the first `score` waits for it. `memory_bytes` bounds what a worker may allocate.

        Raises UserError if `reward` cannot be pickled."""
        assert num_workers >= 1 and timeout_seconds > 0
        self._name = type(reward).__name__
        self._failures = Failures(self._name)
        try:
            self._hello = pickle.dumps((pickle.dumps(reward), memory_bytes))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise UserError(f"reward {self._name} cannot be sent to the process that runs it: {error}") from error
        self._environment = wire.environment()  # as it is now: a template started later must find the same modules
        self._num_workers = num_workers
        self._timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self.num_rescored = 0  # answers that were scored again since their worker died
        self._start_template()

    def score(self, items: Sequence[tuple[str, Prompt]]) -> list[float | RewardFailure]:
        """The score of each (answer, prompt), in order, or a RewardFailure. May be called from several threads.

        Raises UserError if the reward cannot be loaded, raised one itself because it does not fit the data, or could
        score nothing for long.
        """
        with self._lock:
            if not self._ready:
                self._wait_until_ready()
            try:
                results = self._score(items)
                self._failures.judge(items, results)
                return results
            except BaseException:
                for worker in list(self._workers):  # they may hold answers of this call
                    self._drop(worker)
                raise

    def close(self) -> None:
        """Kill every process of the pool."""
        for worker in list(self._workers):
            self._forget(worker)
        self._selector.close()
        self._stop_template()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _score(self, items: Sequence[tuple[str, Prompt]]) -> list[float | RewardFailure]:
        results: Results = {}
        crashed: set[int] = set()  # items under which a worker has died
        pending = deque(range(len(items)))
        size = max(1, min(LONGEST_CHUNK, len(items) // (4 * self._num_workers)))
        while pending or any(worker.chunk for worker in self._workers):
            while pending and (idle := self._idle_worker()) is not None:
                chunk = [pending.popleft() for _ in range(min(size, len(pending)))]
                if not self._send(idle, chunk, items):
                    pending.extendleft(reversed(chunk))
            busy = [worker for worker in self._workers if worker.chunk]
            wait = min((worker.deadline for worker in busy), default=0.0) - time.monotonic()
            for key, _ in self._selector.select(max(0.0, wait)):
                if not self._read(key.data, results):
                    self._bury(key.data, crashed, results)
                    self._replace(key.data, pending)
            for worker in busy:  # after reading: what has arrived is in time
                if worker.chunk and time.monotonic() > worker.deadline:
                    results[worker.chunk.popleft()] = RewardFailure(reason="timeout")
                    self._replace(worker, pending)
        return [results[index] for index in range(len(items))]

    def _idle_worker(self) -> _Worker | None:
        for worker in self._workers:
            if not worker.chunk:
                return worker
        return self._fork() if len(self._workers) < self._num_workers else None

    def _send(self, worker: _Worker, chunk: list[int], items: Sequence[tuple[str, Prompt]]) -> bool:
        message = pickle.dumps([items[index] for index in chunk], protocol=pickle.HIGHEST_PROTOCOL)
        try:
            worker.channel.settimeout(REPLY_SECONDS)
            worker.channel.sendall(wire.SIZE.pack(len(message)) + message)
        except OSError:  # it died while it was idle, so no answer is at fault
            self._drop(worker)
            return False
        worker.channel.setblocking(False)
        worker.chunk.extend(chunk)
        worker.deadline = time.monotonic() + self._timeout_seconds
        return True

    def _read(self, worker: _Worker, results: Results) -> bool:
        """Read the worker's results. Return False if it is gone or sends something else."""
        try:
            data = worker.channel.recv(1 << 16)
        except BlockingIOError:
            return True
        except OSError:
            return False
        worker.buffer += data
        while len(worker.buffer) >= wire.RESULT.size:
            kind, score, length = wire.RESULT.unpack_from(worker.buffer)
            end = wire.RESULT.size + length
            if len(worker.buffer) < end:
                break
            if not worker.chunk or kind > wire.USER_ERROR:
                return False
            text = bytes(worker.buffer[wire.RESULT.size : end]).decode(errors="replace")
            del worker.buffer[:end]
            if kind == wire.USER_ERROR:
                raise UserError(text)
            name, _, traceback = text.partition("\n")
            reason = "non_finite" if kind == wire.NON_FINITE else f"error:{name}"
            if kind == wire.ERROR:
                self._failures.tell(reason, traceback)
            results[worker.chunk.popleft()] = score if kind == wire.SCORE else RewardFailure(reason=reason)
            worker.deadline = time.monotonic() + self._timeout_seconds
        return bool(data)

    def _bury(self, worker: _Worker, crashed: set[int], results: Results) -> None:
        """Record a failure of the answer under which `worker` died, if it is the second worker that it has cost."""
        if worker.chunk and worker.chunk[0] in crashed:
            results[worker.chunk.popleft()] = RewardFailure(reason="crashed")
        elif worker.chunk:
            crashed.add(worker.chunk[0])
            if self.num_rescored == 0:
                log.warning("reward %s: a worker died while it scored; its answer is scored once more", self._name)
            self.num_rescored += 1

    def _replace(self, worker: _Worker, pending: deque[int]) -> None:
        """Drop a worker and queue the answers again that it has not reported."""
        pending.extendleft(reversed(worker.chunk))
        self._drop(worker)

    def _drop(self, worker: _Worker) -> None:
        """Kill a worker with everything it started."""
        self._forget(worker)
        with contextlib.suppress(OSError):  # no template: then its workers are dead too
            self._control.send(pickle.dumps(("kill", worker.process)))

    def _forget(self, worker: _Worker) -> None:
        worker.chunk.clear()
        self._workers.remove(worker)
        self._selector.unregister(worker.channel)
        worker.channel.close()

    def _fork(self) -> _Worker:
        for _ in range(LONGEST_STREAK):
            try:
                return self._try_fork()
            except (OSError, EOFError):  # the template is gone, as after an out-of-memory kill, and its workers with it
                self._stop_template()
                self._start_template()
                self._wait_until_ready()
        return self._try_fork()

    def _try_fork(self) -> _Worker:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                socket.send_fds(self._control, [pickle.dumps("fork")], [theirs.fileno()])
            process = self._reply(REPLY_SECONDS)
        except BaseException:
            ours.close()
            raise
        worker = _Worker(process=process, channel=ours)
        self._selector.register(ours, selectors.EVENT_READ, worker)
        self._workers.append(worker)
        return worker

    def _start_template(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._template = subprocess.Popen(
                [sys.executable, "-P", "-m", wire.__name__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # an answer can make a scorer print without end
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env=self._environment,
            )
        self._ready = False
        with contextlib.suppress(OSError):  # it died at once: `_wait_until_ready` says so
            self._control.send(self._hello)

    def _wait_until_ready(self, *, restarts: int = LONGEST_STREAK) -> None:
        try:
            error = self._reply(LOAD_SECONDS)
        except TimeoutError:
            self._stop_template()
            error = f"no sign of it within {LOAD_SECONDS:.0f} s"
        except (OSError, EOFError):
            self._stop_template()
            if restarts and self._template.returncode == -signal.SIGKILL:  # from outside: no crash looks like that
                self._start_template()
                self._wait_until_ready(restarts=restarts - 1)
                return
            error = "it crashed"
        if error is not None:
            raise UserError(
                f"reward {self._name} cannot be loaded in the process that runs it: {error}. Its class must be "
                "importable from a module, and the libraries it needs installed"
            )
        self._ready = True

    def _reply(self, seconds: float) -> Any:
        self._control.settimeout(seconds)
        packet = self._control.recv(wire.LONGEST_PACKET)
        if not packet:
            raise EOFError
        return pickle.loads(packet)

    def _stop_template(self) -> None:
        self._control.close()  # which makes it kill its workers and leave
        try:
            self._template.wait(5.0)
        except subprocess.TimeoutExpired:  # still importing: it has no workers yet
            self._template.kill()
            self._template.wait()
