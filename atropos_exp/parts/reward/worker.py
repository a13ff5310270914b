"""The processes of a reward pool: `python -m atropos_exp.parts.reward.worker FD`.

The *template* loads the reward once and then only forks, kills and reaps. Each *worker* is a fork of it, so a new
one costs milliseconds however heavy the reward's libraries are, and their memory is shared. Workers score; if an answer
makes one hang, crash or eat memory, its whole process group is killed.

No process outlives the run: the template kills all workers and leaves when the pool's end of its socket closes, which
the kernel does for a killed pool; a worker is killed by the kernel when the template is gone.
"""

import contextlib
import gc
import math
import os
import pickle
import resource
import select
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

from atropos_exp.errors import UserError
from atropos_exp.interfaces import Reward
from atropos_exp.processes import lifeline

SCORE, NON_FINITE, ERROR, USER_ERROR = range(4)  # kinds of a result
RESULT = struct.Struct("<BdH")  # kind, score, length of the text that follows
SIZE = struct.Struct("<Q")  # before a pickled chunk
LONGEST_PACKET = 1 << 20
TRACEBACK_CHARACTERS = 3000
# The environment variables that a child sees. Others may hold keys and tokens.
ENVIRONMENT = (
    "PATH", "HOME", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONHOME",
    "PYTHONHASHSEED", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX", "HF_HOME", "HF_HUB_OFFLINE",
)  # fmt: skip
ENVIRONMENT_PREFIXES = ("LC_", "XDG_")


def environment() -> dict[str, str]:
    """The environment variables of a template that is started from this process."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in ENVIRONMENT or name.startswith(ENVIRONMENT_PREFIXES)
    }
    return kept | {
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "OMP_NUM_THREADS": "1",  # also keeps the template free of threads, which do not survive a fork
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }


def main(control: socket.socket) -> None:
    """Run the template. Its commands are pickled objects, one a packet: first (reward, bytes of memory), then "fork"
    with the worker's socket attached, or ("kill", process id)."""
    lifeline.ignore()
    packet = control.recv(LONGEST_PACKET)
    if not packet:
        return
    try:
        pickled_reward, memory_bytes = pickle.loads(packet)
        reward: Reward = pickle.loads(pickled_reward)
        reward.warm_up()
    except BaseException as error:
        control.send(pickle.dumps(f"{type(error).__name__}: {error}"[:4000]))
        raise
    gc.collect()
    gc.freeze()  # keeps the shared pages shared
    control.send(pickle.dumps(None))

    children: set[int] = set()
    try:
        for command, descriptors in _commands(control):
            if command == "fork":
                child = os.fork()
                if child == 0:
                    control.close()
                    _work(reward, socket.socket(fileno=descriptors[0]), memory_bytes, os.getppid())
                os.close(descriptors[0])
                with contextlib.suppress(PermissionError, ProcessLookupError):
                    os.setpgid(child, child)  # as the child does: whoever comes first
                children.add(child)
                control.send(pickle.dumps(child))
            elif command[1] in children:  # not one of a template before this one
                _kill(command[1])
                children.remove(command[1])
    finally:
        for child in children:
            _kill(child)


def _commands(control: socket.socket) -> Iterator[tuple[Any, list[int]]]:
    """The pool's commands with their file descriptors, until the pool closes its end or its process is gone."""
    parent = os.getppid()
    while os.getppid() == parent:
        if select.select([control], [], [], 1.0)[0]:
            packet, descriptors, _, _ = socket.recv_fds(control, LONGEST_PACKET, 1)
            if not packet:
                return
            yield pickle.loads(packet), descriptors


def _kill(process: int) -> None:
    """Kill a worker with everything it started. Only this function reaps it, so its id still belongs to it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process, signal.SIGKILL)
    for _ in range(200):  # a killed process in an uninterruptible read may linger; it must not hold up the others
        if os.waitpid(process, os.WNOHANG)[0]:
            return
        time.sleep(0.001)


def _work(reward: Reward, channel: socket.socket, memory_bytes: int, template: int) -> NoReturn:
    """Run a worker: score chunks until its socket closes, then exit without returning to the template's code."""
    try:
        os.setpgid(0, 0)
        lifeline.die_with_parent()
        if os.getppid() != template:
            os._exit(0)
        with open("/proc/self/statm", "rb") as file:
            in_use = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + memory_bytes,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        while (size := _receive(channel, SIZE.size)) is not None:
            chunk = _receive(channel, SIZE.unpack(size)[0])
            if chunk is None:
                break
            for answer, prompt in pickle.loads(chunk):
                channel.sendall(_score(reward, answer, prompt))
    finally:
        os._exit(0)


def _score(reward: Reward, answer: str, prompt: Any) -> bytes:
    try:
        score = float(reward(answer, prompt))
    except UserError as error:
        return _result(USER_ERROR, text=str(error))
    except BaseException as error:  # SystemExit and the like too: each becomes a counted reason
        return _result(ERROR, text=f"{type(error).__name__}\n{_end_of_traceback(error)}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)  # an alarm of this answer must not hit the next
    return _result(SCORE, score) if math.isfinite(score) else _result(NON_FINITE)


def _end_of_traceback(error: BaseException) -> str:
    """Without the frame of this file."""
    try:
        where = error.__traceback__ and error.__traceback__.tb_next
        return "".join(traceback.format_exception(type(error), error, where))[-TRACEBACK_CHARACTERS:]
    except Exception:  # whatever its own __str__ does
        return ""


def _result(kind: int, score: float = 0.0, text: str = "") -> bytes:
    encoded = text.encode(errors="replace")[:4000]
    return RESULT.pack(kind, score, len(encoded)) + encoded


def _receive(channel: socket.socket, size: int) -> bytes | None:
    """Read exactly `size` bytes; None at the end of the stream."""
    parts = bytearray()
    while len(parts) < size:
        part = channel.recv(min(size - len(parts), 1 << 20))
        if not part:
            return None
        parts += part
    return bytes(parts)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
