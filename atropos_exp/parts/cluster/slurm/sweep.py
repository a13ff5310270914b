"""The runs of a sweep as job arrays. slurm/jobs.jsonl of the sweep says which job has which run."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from atropos_exp.errors import UserError
from atropos_exp.parts.cluster.slurm.attempts import Attempt, read_attempts
from atropos_exp.parts.cluster.slurm.jobs import JobSpec, JobState, cancel, states, submit
from atropos_exp.parts.cluster.slurm.rank import UNFINISHED
from atropos_exp.parts.cluster.slurm.settings import SlurmSettings
from atropos_exp.runs.files import read_json_lines
from atropos_exp.runs.sweep_backend import Job
from atropos_exp.runs.sweep_folder import Phase, RunState, SweepFolder

ASK_SECONDS = 3.0  # the controller serves a whole cluster: it is not asked more often
QUEUED_ENDS = {"finished": Phase.FINISHED, "stopped": Phase.STOPPED, "gave_up": Phase.FAILED, "failed": Phase.FAILED}


class SlurmBackend:
    """The `Backend` of a sweep on Slurm: an array, of which `array_parallelism` jobs run at a time. It outlives the
    submitter.
    """

    def __init__(self, sweep: SweepFolder, settings: SlurmSettings) -> None:
        self._sweep = sweep
        self._settings = settings
        self._path = sweep.path / "slurm" / "jobs.jsonl"
        self._asked_at = float("-inf")
        self._answer: dict[str, JobState] = {}

    def submit(self, jobs: Sequence[Job], *, attached: bool) -> None:
        """Submit the jobs as one array. Raises UserError while an earlier job of the sweep waits or runs."""
        active = sorted({job_id.split("_")[0] for job_id, state in self._ask().items() if state.is_active})
        if active:
            raise UserError(
                f"{self._sweep.path}: Slurm still has jobs of this sweep ({', '.join(active)}); wait for them "
                "(sweep wait), or sweep cancel"
            )
        specs = [
            JobSpec(
                name=job.name,
                arguments=tuple(job.command[1:]),  # less the interpreter: the nodes may have another
                run_folder=job.run_folder,
            )
            for job in jobs
        ]
        folder = self._sweep.path / "slurm"
        ids = submit(specs, self._settings, folder=folder, name=self._sweep.request().name, cwd=jobs[0].cwd)
        with self._path.open("a", encoding="utf-8") as file:
            for job, job_id in zip(jobs, ids, strict=True):
                row = {"number": job.number, "job_id": job_id, "run_folder": str(job.run_folder), "time": time.time()}
                file.write(json.dumps(row) + "\n")
        self._asked_at = float("-inf")

    def states(self) -> Mapping[int, RunState]:
        """Return the state of each run by number."""
        answer = self._ask()
        return {
            number: _with_times(run_state(answer[job_id], attempts), attempts)
            for number, (job_id, folder) in self._jobs().items()
            for attempts in [read_attempts(folder)]
        }

    def cancel(self, numbers: Sequence[int] | None = None) -> None:
        """Cancel jobs (None: all). Their ranks save; the cluster (KillWait) decides how long they may take."""
        cancel(job_id for number, (job_id, _) in self._jobs().items() if numbers is None or number in numbers)
        self._asked_at = float("-inf")

    def kill(self) -> None:
        """Cancel all jobs."""
        self.cancel()

    def _jobs(self) -> dict[int, tuple[str, Path]]:
        """number -> (newest job, run folder)."""
        rows = read_json_lines(self._path)[0]
        return {int(row["number"]): (str(row["job_id"]), Path(row["run_folder"])) for row in rows}

    def _ask(self) -> dict[str, JobState]:
        if time.monotonic() - self._asked_at > ASK_SECONDS:
            self._answer = states([job_id for job_id, _ in self._jobs().values()])
            self._asked_at = time.monotonic()
        return self._answer


def _with_times(state: RunState, attempts: Sequence[Attempt]) -> RunState:
    """The start of the last attempt, and the time that all of them took."""
    if not attempts:
        return state
    last, now = attempts[-1], time.time()
    runs_on = state.phase is Phase.RUNNING and last.how is None
    seconds = sum(attempt.until - attempt.began for attempt in attempts[:-1])
    seconds += (now if runs_on else last.until) - last.began
    return replace(state, started=last.began, ended=None if runs_on else last.until, seconds=seconds)


def run_state(job: JobState, attempts: Sequence[Attempt]) -> RunState:
    """Return the state of a run from what Slurm says of its job.

    Where Slurm has forgotten the job or gives no reason, the launcher's own record counts.
    """
    last = attempts[-1] if attempts else None
    reason = last.reason if last is not None else ""
    if job.is_active:
        return RunState(phase=Phase.PENDING if job.state in ("PENDING", "CONFIGURING") else Phase.RUNNING)
    if job.state == "COMPLETED":
        return RunState(phase=Phase.FINISHED)
    if job.state == "FAILED":
        stopped = job.exit_code == f"{UNFINISHED}:0"
        return RunState(phase=Phase.STOPPED if stopped else Phase.FAILED, reason=reason or f"exit code {job.exit_code}")
    if job.state in ("TIMEOUT", "DEADLINE"):
        return RunState(phase=Phase.TIMEOUT, reason="it did not save within cluster.signal_seconds")
    if job.state == "CANCELLED":
        return RunState(phase=Phase.CANCELLED, reason="cancelled")
    if job.state != "UNKNOWN":
        return RunState(phase=Phase.KILLED, reason=job.state.lower().replace("_", " "))
    if last is not None and last.how in QUEUED_ENDS:
        return RunState(phase=QUEUED_ENDS[last.how], reason=reason)
    return RunState(phase=Phase.KILLED, reason="Slurm no longer knows its job, which left no word of its end")
