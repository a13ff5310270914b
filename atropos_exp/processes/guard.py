"""Stands between a run and a program that it started: `python -I -S guard.py CONTROL_FD program arguments…`.

The program, and everything that it starts in turn, ends when the run does, however that happened: the kernel closes
the run's end of the control socket, also after kill -9, and the guard kills the whole tree. Orphans of the program
become children of the guard (a "subreaper"), so that none escapes. Should the guard be killed, the kernel kills the
program. Standard library only, and no import of this package: it starts in a few hundredths of a second.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time

KILL_SECONDS = 10.0  # until killed processes are gone
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
# A copy of lifeline.JOB_SIGNALS: a signal to the whole job is for the run, which decides when its programs go.
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main() -> int:
    """Run the program of the command line to its end, or to that of the run, whichever comes first."""
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)

    guard = os.getpid()

    def before_program() -> None:
        for number in (*_IGNORED, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guard:  # it was killed before this call
            os._exit(1)

    try:
        program = subprocess.Popen(
            sys.argv[2:],
            close_fds=False,  # what the run handed down is for the program
            start_new_session=True,  # Ctrl-C in the terminal is for the run
            preexec_fn=before_program,  # safe: one thread
        )
    except OSError as error:
        _tell(control, {"error": f"{sys.argv[2]}: {error.strerror}"})
        return 127
    _tell(control, {"pid": program.pid})
    while program.poll() is None:
        ready, _, _ = select.select([control, woken], [], [], 5.0)
        if woken in ready:
            woken.recv(4096)
        if control in ready:
            order = control.recv(64)
            if not order:
                break
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGTERM)
        _reap(program.pid)
    _kill_everything(program)
    _tell(control, {"code": program.returncode})
    return 0


def _tell(control: socket.socket, message: dict[str, object]) -> None:
    with contextlib.suppress(OSError):  # the run is gone
        control.sendall(json.dumps(message).encode() + b"\n")


def _kill_everything(program: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + KILL_SECONDS
    while (left := _descendants()) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        program.poll()
        _reap(program.pid)
        time.sleep(0.01)
    program.poll()


def _reap(program_pid: int) -> None:
    """Orphans that became ours; the program itself is left to its Popen."""
    for pid in _children_of(os.getpid()):
        if pid != program_pid:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def _descendants() -> list[int]:
    found: list[int] = []
    todo = [os.getpid()]
    while todo:
        children = _children_of(todo.pop())
        found += children
        todo += children
    return found


def _children_of(pid: int) -> list[int]:
    children: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{task}/children") as file:
                children += map(int, file.read().split())
    return children


if __name__ == "__main__":
    sys.exit(main())
