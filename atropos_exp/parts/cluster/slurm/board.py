"""How the launchers of one attempt communicate: small files in slurm/attempt_<name>/ of the run folder.

    rendezvous.json     rank 0's address and port, for torch.distributed
    failed_<task>.json  this task's rank has failed
    alive               touched by rank 0's launcher
    verdict.json        what rank 0's launcher has decided: all others end

A shared file system is needed for the run folder anyway; nothing here is read more than once a second.
"""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from atropos_exp.runs.atomic import write_atomic

POLL_SECONDS = 1.0


class Board:
    """The files of attempt `name`."""

    def __init__(self, run_folder: Path, name: str) -> None:
        self._folder = run_folder / "slurm" / f"attempt_{name}"

    def begin(self) -> float | None:
        """Delete the files of earlier attempts. Only rank 0's launcher calls this.

        Returns the last sign of life of those attempts, in seconds since the epoch, or None if it is not known.
        """
        beats = []
        for old in self._folder.parent.glob("attempt_*"):
            if old != self._folder:
                if (alive := old / "alive").exists():
                    beats.append(alive.stat().st_mtime)
                shutil.rmtree(old, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        return max(beats, default=None)

    def beat(self) -> None:
        """Give a sign of life of rank 0's launcher."""
        (self._folder / "alive").touch()

    def last_beat(self) -> int:
        """Return the time of the last sign of life in ns, by the clock of its writer; 0 for none."""
        try:
            return (self._folder / "alive").stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def meet(self, *, address: str, port: int) -> None:
        """Publish rank 0's address and port."""
        self._write("rendezvous", {"address": address, "port": port})

    def wait_for_meeting(self, *, seconds: float, give_up: Callable[[], bool]) -> tuple[str, int] | None:
        """Return rank 0's address and port; None if there is a verdict already, or if `give_up()`.

        Raises TimeoutError after `seconds`.
        """
        deadline = time.monotonic() + seconds
        while (found := self._read("rendezvous")) is None:
            if self.verdict() is not None or give_up():
                return None
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"no address of rank 0 in {self._folder} within {seconds:.0f} s; does the first node see the same "
                    "run folder as this one?"
                )
            time.sleep(POLL_SECONDS)
        return str(found["address"]), int(found["port"])

    def fail(self, task: int, reason: str) -> None:
        """Publish that the rank of a task has failed."""
        self._write(f"failed_{task}", {"task": task, "reason": reason})

    def failures(self) -> list[str]:
        """Return the reasons of failed ranks, by task."""
        found = [self._read(path.stem) for path in sorted(self._folder.glob("failed_*.json"))]
        return [str(row["reason"]) for row in found if row is not None]

    def decide(self, code: int) -> None:
        """Publish the exit code with which all launchers end."""
        self._write("verdict", {"code": code})

    def verdict(self) -> int | None:
        """Return the published exit code; None while there is none."""
        found = self._read("verdict")
        return None if found is None else int(found["code"])

    def _write(self, name: str, content: dict[str, Any]) -> None:
        write_atomic(self._folder / f"{name}.json", json.dumps(content) + "\n")

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            content: dict[str, Any] = json.loads((self._folder / f"{name}.json").read_text())
        except FileNotFoundError:
            return None
        return content


class Pulse:
    """Watches rank 0's launcher by the clock of this machine, as the clocks of two nodes may differ."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._seen = board.last_beat()
        self._changed_at = time.monotonic()

    def silent_for(self) -> float:
        """Return the seconds since the last sign of life was noticed."""
        now = self._board.last_beat()
        if now != self._seen:
            self._seen, self._changed_at = now, time.monotonic()
        return time.monotonic() - self._changed_at
