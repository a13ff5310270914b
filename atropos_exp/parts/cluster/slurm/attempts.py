"""The attempts of one run under Slurm: a line per event in slurm/attempts.jsonl. Written by rank 0's launcher alone.

    {"event": "start", "attempt": "12.0", "step": 7, ...}     step: the last one in metrics.jsonl, -1 for none
    {"event": "signal", "attempt": "12.0", "signal": "SIGUSR2"}
    {"event": "end", "attempt": "12.0", "how": "requeued", "step": 9, "code": 0, "reason": "..."}

Every line has the `time`, in seconds since the epoch. An attempt without an end was killed: by a node failure, for its
memory, or after the time it had to save; `earlier_until` of the next start is its last sign of life.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atropos_exp.runs.files import last_step, read_json_lines, read_rows

FILE = Path("slurm") / "attempts.jsonl"
# How an attempt may end. After the first group the run is over or waits for its user; `failed` counts as a failure.
ENDS = ("finished", "stopped", "gave_up", "requeued", "failed")


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """What is known of one attempt at a run."""

    name: str  # <job id>.<restart>
    start_step: int
    end_step: int | None  # None: killed, or still running
    signals: tuple[str, ...]
    how: str | None  # of ENDS; None: killed, or still running
    reason: str
    began: float  # seconds since the epoch
    until: float  # its end, or the last that is known of it

    @property
    def is_failure(self) -> bool:
        """Whether it failed, or was killed without a warning: the end of one that was asked to stop says nothing."""
        return self.how == "failed" or (self.how is None and not self.signals)


class Attempts:
    """The attempts of the run in `run_folder`."""

    def __init__(self, run_folder: Path, name: str) -> None:
        """`name`: of the attempt that is going on, unique within the folder."""
        self._folder = run_folder
        self._name = name

    def last_step(self) -> int:
        """Return the last step recorded in metrics.jsonl; -1 for none."""
        return last_step(read_rows(self._folder), default=-1)

    def start(self, **facts: Any) -> None:
        """Note the start of this attempt."""
        self._write("start", step=self.last_step(), **facts)

    def signal(self, name: str) -> None:
        """Note a signal that this attempt received."""
        self._write("signal", signal=name)

    def end(self, how: str, *, code: int, reason: str = "") -> None:
        """Note how this attempt ended; `how` is one of `ENDS`."""
        assert how in ENDS, how
        self._write("end", how=how, step=self.last_step(), code=code, reason=reason)

    def failures_without_progress(self) -> int:
        """Return how many attempts have failed since the run last got further than ever before.

        The current attempt does not count, nor one that was asked to stop; after one that gave up the count starts
        again.
        """
        attempts = [attempt for attempt in read_attempts(self._folder) if attempt.name != self._name]
        furthest, number = -2, 0
        for at, attempt in enumerate(attempts):
            following = attempts[at + 1].start_step if at + 1 < len(attempts) else self.last_step()
            reached = following if attempt.end_step is None else attempt.end_step
            if reached > furthest:
                furthest, number = reached, 0
            if attempt.how in ("finished", "stopped", "gave_up"):
                number = 0
            number += attempt.is_failure
        return number

    def _write(self, event: str, **facts: Any) -> None:
        path = self._folder / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        line = {"event": event, "attempt": self._name, "time": round(time.time(), 3), **facts}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_attempts(run_folder: Path) -> list[Attempt]:
    """Return the attempts at the run in `run_folder`, in order."""
    found: dict[str, dict[str, Any]] = {}
    for row in read_json_lines(run_folder / FILE)[0]:
        blank = {"start_step": -1, "end_step": None, "signals": (), "how": None, "reason": "", "began": row["time"]}
        earlier = list(found.values())[-1:]
        known = found.setdefault(row["attempt"], blank)
        known["until"] = row["time"]
        if row["event"] == "start":
            known["start_step"] = row["step"]
            for lost in earlier:
                if lost["how"] is None:
                    lost["until"] = max(lost["until"], row.get("earlier_until") or 0.0)
        elif row["event"] == "signal":
            known["signals"] += (row["signal"],)
        else:
            known |= {"end_step": row["step"], "how": row["how"], "reason": row["reason"]}
    return [Attempt(name=name, **known) for name, known in found.items()]
