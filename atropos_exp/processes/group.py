"""A process group whose leader this process did not start itself, and so cannot wait for as for a child."""

import contextlib
import os
import signal
import time
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class _Process:
    group: int
    born: int  # clock ticks after the machine's start: with the id, it tells a process from a later one
    is_gone: bool  # a zombie, all its threads ended: it holds no memory, file or port


class ProcessGroup:
    """The group that the process `leader` leads, which must have started a session of its own.

    A process that was killed goes on holding its ports and its memory until the kernel is done with all its threads,
    which for a large one takes a while. Example:

        group = ProcessGroup(pid)
        if not group.end(seconds=15.0):
            raise UserError(f"process {pid} cannot be killed")
    """

    def __init__(self, leader: int) -> None:
        self._leader = leader
        process = _look(leader)
        self._born = process.born if process else None

    def end(self, seconds: float) -> bool:
        """Kill every process of the group and wait until all are gone, up to `seconds`. Returns whether they are."""
        deadline = time.monotonic() + seconds
        while members := self._members():
            if time.monotonic() > deadline:
                return False
            for pid in members:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        return True

    def _members(self) -> list[int]:
        """Those that are not gone. The kernel gives a group's id to no other process while the group has members."""
        leader = _look(self._leader)
        if leader is not None and leader.born != self._born:
            return []  # somebody else's by now
        pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
        found = {pid: process for pid in pids if (process := _look(pid)) is not None}
        return [pid for pid, process in found.items() if process.group == self._leader and not process.is_gone]


def _look(pid: int) -> _Process | None:
    """What the kernel tells of a process; None if there is none."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()  # from the third on: the second is a name in brackets
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, group, num_threads, born = fields[0], int(fields[2]), int(fields[17]), int(fields[19])
    # A leader is a zombie as soon as its own thread has ended, while others may still hold what they share.
    return _Process(group=group, born=born, is_gone=state in "ZX" and num_threads <= 1)
