"""Ranks on this machine: the run starts itself once per rank when it wants more than one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import ClassVar

from atropos_exp.config.settings import Few, Settings
from atropos_exp.processes.lifeline import dying_with_parent
from atropos_exp.processes.ports import HeldPort

GRACE_SECONDS = 30.0  # for the other ranks to end after one has failed; they may hang in a collective with it


class Local(Settings):
    """Settings of `cluster=local`: the trainer's ranks are processes of this machine.

    Not torchrun, which kills ranks 30 s after a SIGTERM, however long the step and the checkpoint take that they are
    to finish; a run started by torchrun works as well.
    """

    num_processes: Few

    target_device: ClassVar[None] = None  # it runs on this machine
    queue: ClassVar[None] = None  # at once

    def preflight(self) -> list[str]:
        """Return a problem if torchrun has started another number of ranks than `num_processes`."""
        world = os.environ.get("WORLD_SIZE")
        if world is not None and self.num_processes not in (1, int(world)):
            return [f"num_processes: got {self.num_processes}, but WORLD_SIZE is {world}; give one of the two"]
        return []

    def launch(self, command: Sequence[str], environ: Mapping[str, str] = os.environ) -> int | None:
        """Run all ranks to their end and return the exit code; None if this process is itself a rank.

        `command` starts one rank, such as `[sys.executable, "-m", "atropos_exp.run", *sys.argv[1:]]`. SIGINT,
        SIGTERM and SIGHUP are handed on, so that every rank finishes its step; there is no deadline, as a run may take
        days. After a failure the others get `GRACE_SECONDS`. The first failure is the exit code.
        """
        if self.num_processes == 1 or "WORLD_SIZE" in environ:
            return None
        port = HeldPort()  # rank 0 listens on it once it has loaded its libraries
        shared: dict[str, object] = {"WORLD_SIZE": self.num_processes, "LOCAL_WORLD_SIZE": self.num_processes}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port.number}
        if "OMP_NUM_THREADS" not in environ:
            shared["OMP_NUM_THREADS"] = max(1, len(os.sched_getaffinity(0)) // self.num_processes)
        ranks: list[subprocess.Popen[bytes]] = []

        def hand_on(number: int, _frame: FrameType | None) -> None:
            for rank in ranks:
                rank.send_signal(number)

        stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {
            number: signal.signal(number, hand_on)
            for number in stops
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN  # nohup
        }
        try:
            for rank in range(self.num_processes):
                own = {**shared, "RANK": rank, "LOCAL_RANK": rank}
                ranks.append(_start(command, {**environ, **{key: str(value) for key, value in own.items()}}))
            return _wait(ranks)
        finally:
            for process in ranks:
                if process.poll() is None:
                    process.kill()
                    process.wait()
            for number, handler in before.items():
                signal.signal(number, handler)


def _start(command: Sequence[str], environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C in a terminal then reaches a rank once, through us.
    return subprocess.Popen(command, env=environ, start_new_session=True, preexec_fn=dying_with_parent())


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    first_failure = 0
    deadline = None
    while None in [rank.poll() for rank in ranks]:  # a list: each is asked every time
        failed = [rank.returncode for rank in ranks if rank.returncode]
        if failed and deadline is None:
            first_failure, deadline = failed[0], time.monotonic() + GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            waiting = [number for number, rank in enumerate(ranks) if rank.returncode is None]
            print(f"Ranks {waiting} did not end {GRACE_SECONDS:.0f} s after a failure: killed", file=sys.stderr)
            break
        time.sleep(0.05)
    codes = [first_failure, *(rank.returncode or 0 for rank in ranks)]
    code = next((code for code in codes if code), 0)
    return code if code >= 0 else 128 - code
