"""Locks that are files. The kernel frees them when their holder dies, even after kill -9."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def try_hold(path: Path, *, holder: str | None = None) -> IO[str] | None:
    """Take the lock `path` now: the open file, which holds it until it is closed; None while another process has it.

    `holder` is written into the file for those who come later, who read it with `path.read_text()`:

        lock = try_hold(folder / "lock", holder=f"process {os.getpid()}")
        if lock is None:
            raise UserError(f"{folder} is in use by {(folder / 'lock').read_text()}")
    """
    lock = open(path, "a+")  # noqa: SIM115 - its holder keeps it open
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        return None
    if holder is not None:
        lock.truncate(0)
        lock.write(holder)
        lock.flush()
    return lock


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the lock `path` in this block. Waits for it without a deadline: only for blocks that last a moment."""
    with open(path, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def is_held(path: Path) -> bool:
    """Whether a living process holds the lock `path`. Creates and changes nothing."""
    try:
        with open(path) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
