"""What ties a process to the one that started it: it dies with its parent, and leaves signals to the job to its parent.

Standard library only, for this is imported where milliseconds count. (`guard.py` imports nothing of the package and
has a copy of its own.)
"""

import ctypes
import signal
from collections.abc import Callable

PR_SET_PDEATHSIG = 1
# A scheduler, or a terminal, signals every process of a job. The run decides what ends and when, so all that it has
# started ignores these.
JOB_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def ignore(signals: tuple[signal.Signals, ...] = JOB_SIGNALS) -> None:
    """Ignore `signals` in this process and, unless they choose otherwise, in those that it starts."""
    for number in signals:
        signal.signal(number, signal.SIG_IGN)


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send `number` to this process when its parent dies, even if that is killed.

    The parent may be dead already; compare `os.getppid()` with the parent you expect after this call.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def dying_with_parent(*, ignoring: tuple[signal.Signals, ...] = ()) -> Callable[[], None]:
    """What `subprocess.Popen` takes as `preexec_fn` for a child that is killed when this process dies:

        subprocess.Popen(command, start_new_session=True, preexec_fn=dying_with_parent())

    The child also ignores the signals `ignoring`.
    """
    libc = ctypes.CDLL(None)  # loaded here: between fork and exec a child must not wait for the loader's lock

    def in_child() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        ignore(ignoring)

    return in_child
