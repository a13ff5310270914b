"""One run as one job: print the job, or submit it and follow it to its end."""

import json
import sys
import time
from pathlib import Path

from atropos_exp.parts.cluster.slurm.attempts import read_attempts
from atropos_exp.parts.cluster.slurm.jobs import JobSpec, JobState, states, submit
from atropos_exp.parts.cluster.slurm.script import script_text
from atropos_exp.parts.cluster.slurm.settings import SlurmSettings
from atropos_exp.runs.atomic import write_atomic
from atropos_exp.runs.files import run_status

JOB_FILE = "job.json"  # in slurm/ of the run folder: the newest job of this run
POLL_SECONDS = 3.0
FORGOTTEN_SECONDS = 60.0  # that Slurm knows nothing of the job before its run folder is believed


def submit_single(job: JobSpec, settings: SlurmSettings) -> int:
    """Submit a job. Returns the exit code: the run's if it is followed, else 0 for a job in the queue."""
    own_folder = job.run_folder / "slurm"
    if settings.dry_run:
        print(script_text(settings, name=job.name, folder=own_folder, run_folders=[job.run_folder]))
        for line in settings.layout.describe():
            print(f"# {line}")
        print(f"# run folder: {job.run_folder}")
        return 0
    job_id, state = current_job(job.run_folder)
    if job_id is None or state is None or not state.is_active:
        (job_id,) = submit([job], settings, folder=own_folder)
        write_atomic(own_folder / JOB_FILE, json.dumps({"job_id": job_id}) + "\n")
        print(f"Job {job_id}: {job.run_folder}", flush=True)
    else:
        print(f"Job {job_id} has this run already ({state.state}); resume=never would start another", flush=True)
    if not settings.wait:
        return 0
    try:
        return follow(job_id, job.run_folder)
    except KeyboardInterrupt:
        print(f"\nJob {job_id} goes on without this terminal; to end it: scancel {job_id}", flush=True)
        return 0


def current_job(run_folder: Path) -> tuple[str | None, JobState | None]:
    """Return the newest job that was submitted for this folder, and its state."""
    try:
        job_id = str(json.loads((run_folder / "slurm" / JOB_FILE).read_text())["job_id"])
    except FileNotFoundError:
        return None, None
    return job_id, states([job_id])[job_id]


def follow(job_id: str, run_folder: Path) -> int:
    """Print what rank 0 prints until the job has ended; returns the exit code.

    A run may take days, so there is no deadline.
    """
    log = run_folder / "log" / "rank_0.log"
    position = log.stat().st_size if log.exists() else 0
    before = ""
    known_at = time.monotonic()
    while True:
        state = states([job_id])[job_id]
        position = _print_from(log, position)
        shown = state.state + (f" ({state.reason})" if state.reason and state.state == "PENDING" else "")
        if shown != before and state.state != "UNKNOWN":
            print(f"Job {job_id}: {shown}", flush=True)
            before = shown
        if state.state != "UNKNOWN":
            known_at = time.monotonic()
        if not state.is_active and (state.state != "UNKNOWN" or time.monotonic() - known_at > FORGOTTEN_SECONDS):
            return conclude(job_id, state, run_folder)
        time.sleep(POLL_SECONDS)


def conclude(job_id: str, state: JobState, run_folder: Path) -> int:
    """Print how the job ended; returns 0 if the run is finished, else 1."""
    status = run_status(run_folder)[0] or "nothing recorded"
    attempts = read_attempts(run_folder)
    reason = attempts[-1].reason if attempts else ""
    if status == "finished" and state.state in ("COMPLETED", "UNKNOWN"):
        print(f"Job {job_id}: finished after {len(attempts)} attempt(s)", flush=True)
        return 0
    why = f": {reason}" if reason else ""
    print(
        f"Job {job_id} ended as {state.state}, the run in {run_folder} is not finished ({status}){why}. "
        f"Its output: {run_folder / 'log'}, {run_folder / 'slurm'}; the same command continues it",
        file=sys.stderr,
        flush=True,
    )
    return 1


def _print_from(log: Path, position: int) -> int:
    """Print what was added to `log`; the new position."""
    if not log.exists():
        return position
    with log.open("rb") as file:
        file.seek(position)
        text = file.read()
    if text:
        print(text.decode(errors="replace"), end="", flush=True)
    return position + len(text)
