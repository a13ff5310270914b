"""A stop that the user asked for reaches whatever waits, wherever in the process that is."""

import time

from atropos_exp.errors import StopRequested

SLICE_SECONDS = 0.2  # within which a wait notices

_requested = False


def request(requested: bool = True) -> None:
    """Let every `sleep` of this process end. Safe in a signal handler, which no lock is."""
    global _requested
    _requested = requested


def check() -> None:
    """Raise StopRequested if a stop is requested."""
    if _requested:
        raise StopRequested


def sleep(seconds: float) -> None:
    """Sleep between two looks at something that may never come. Raises StopRequested once a stop is requested."""
    end = time.monotonic() + seconds
    while True:
        check()
        if (left := end - time.monotonic()) <= 0:
            return
        time.sleep(min(left, SLICE_SECONDS))
