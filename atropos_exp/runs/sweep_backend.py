"""What executes the runs of a sweep: this machine (`sweep/local.py`), or the scheduler of a cluster."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from atropos_exp.runs.sweep_folder import RunState


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One command to execute: a run of a grid, or a worker of a search.

    The same command may be given again after it ended early: it continues where it was. SIGTERM makes it finish its
    step, save and exit.
    """

    number: int  # unique in the sweep; jobs of a search number its workers
    name: str  # for people and log files
    command: list[str]
    cwd: Path
    log: Path  # its stdout and stderr are appended here
    run_folder: Path  # holds summary.json when it ends; of a worker, a folder that never has one
    num_devices: int = 1


class Backend(Protocol):
    """Executes jobs that outlive the process which submits them. Numbers are those of `Job.number`."""

    def submit(self, jobs: Sequence[Job], *, attached: bool) -> None:
        """Queue jobs and return at once.

        `attached`: the submitter stays and waits; if it dies, its jobs are stopped, where the backend can do that.
        Raises UserError if the jobs cannot be taken, for instance while earlier ones still run.
        """

    def states(self) -> Mapping[int, RunState]:
        """Return the state of every job that was ever submitted for this sweep, by number; of its last attempt."""

    def cancel(self, numbers: Sequence[int] | None = None) -> None:
        """Ask jobs (None: all) to finish their step, save and end. Returns at once; ended ones are left alone."""

    def kill(self) -> None:
        """End all jobs now, without waiting for anything."""
