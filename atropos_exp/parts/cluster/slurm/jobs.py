"""Submit runs to Slurm, ask for their state, cancel them: what a single run and a sweep have in common."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from atropos_exp.errors import UserError
from atropos_exp.parts.cluster.slurm.control import ask_slurm
from atropos_exp.parts.cluster.slurm.rank import RankJob
from atropos_exp.parts.cluster.slurm.script import parameters, python_of
from atropos_exp.parts.cluster.slurm.settings import SlurmSettings

ACTIVE = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "STOPPED", "RESIZING", "SIGNALING")
REQUEUED = ("REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")


@dataclass(frozen=True, kw_only=True, slots=True)
class JobSpec:
    """A run to submit, which Slurm starts once per rank."""

    name: str
    arguments: tuple[str, ...]  # what follows the interpreter, such as ("-m", "atropos_exp.run", ...)
    run_folder: Path  # has the logs; a run says in its summary.json whether it is finished
    environment: Mapping[str, str] = field(default_factory=dict)  # on top of the submitting process's


@dataclass(frozen=True, kw_only=True, slots=True)
class JobState:
    """The state of a job, in Slurm's own terms."""

    state: str  # PENDING, RUNNING, COMPLETED, FAILED, TIMEOUT, ...; UNKNOWN: Slurm has forgotten it, or never knew it
    reason: str  # why it waits, or ended; "" for none
    exit_code: str  # <code>:<signal>; "" if not known

    @property
    def is_active(self) -> bool:
        """Whether the job waits or runs, so that its run may still go on."""
        return self.state in ACTIVE or self.state in REQUEUED


def submit(
    jobs: Sequence[JobSpec], settings: SlurmSettings, *, folder: Path, name: str | None = None, cwd: Path | None = None
) -> list[str]:
    """Queue `jobs` as one array, or as a plain job if there is one. Returns their ids in order, at once.

    `cwd`: where they start; by default where this process is. submitit's files go to `folder`; the output of each
    rank goes to log/ of its run folder. Raises UserError with Slurm's own words if it refuses.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError
    from submitit.slurm.slurm import SlurmExecutor

    assert jobs
    folder.mkdir(parents=True, exist_ok=True)
    executor = SlurmExecutor(folder, python=python_of(settings))
    folders = [job.run_folder for job in jobs]
    asked = parameters(settings, name=name or jobs[0].name, folder=folder, run_folders=folders)
    if cwd is not None:
        asked["additional_parameters"]["chdir"] = str(cwd)
    executor.update_parameters(**asked)
    contents = [
        RankJob(
            arguments=job.arguments,
            run_folder=str(job.run_folder.absolute()),
            environment=tuple(job.environment.items()),
            settings=settings,
        )
        for job in jobs
    ]
    try:
        if len(contents) == 1:
            return [str(executor.submit(contents[0]).job_id)]
        with executor.batch():
            submitted = [executor.submit(content) for content in contents]
    except (FailedJobError, FailedSubmissionError) as error:
        words = [line for line in str(error).splitlines() if "error" in line.lower()]
        raise UserError(
            f"Slurm refused the job: {'; '.join(words) or str(error).strip()}. See the settings of cluster=slurm; "
            "cluster.dry_run=true prints the script"
        ) from error
    return [str(job.job_id) for job in submitted]


def states(job_ids: Iterable[str]) -> dict[str, JobState]:
    """Return the state of every job.

    The queue is asked first, then the accounting, which a cluster may not have; then jobs that ended some minutes ago
    are UNKNOWN, and their run folders tell.
    """
    wanted = list(job_ids)
    if not wanted:
        return {}
    found = _from_queue(wanted)
    if missing := [job_id for job_id in wanted if job_id not in found]:
        found = _from_accounting(missing) | found
    unknown = JobState(state="UNKNOWN", reason="", exit_code="")
    return {job_id: found.get(job_id, unknown) for job_id in wanted}


def cancel(job_ids: Iterable[str]) -> None:
    """Remove jobs from the queue, or end them; those that have ended already are ignored."""
    if wanted := list(job_ids):
        ask_slurm("scancel", "--quiet", *wanted)


def _from_queue(job_ids: Sequence[str]) -> dict[str, JobState]:
    # One call for all: asking by id makes squeue fail for a job that it has forgotten.
    text = ask_slurm("squeue", "--noheader", "--array", "--me", "--states=all", "--format=%i|%T|%r") or ""
    found = {}
    for line in text.splitlines():
        job_id, _, rest = line.partition("|")
        state, _, reason = rest.partition("|")
        if job_id in job_ids:
            found[job_id] = JobState(state=state, reason="" if reason == "None" else reason, exit_code="")
    return found


def _from_accounting(job_ids: Sequence[str]) -> dict[str, JobState]:
    numbers = ",".join(sorted({job_id.split("_")[0] for job_id in job_ids}))
    columns = "--format=JobID,State,ExitCode,Reason"
    text = ask_slurm("sacct", "--allocations", "--noheader", "--parsable2", "--array", columns, "--jobs", numbers) or ""
    found = {}
    for line in text.splitlines():
        parts = line.split("|")
        if len(parts) == 4:
            state = (re.match(r"\w+", parts[1]) or [""])[0]  # such as "CANCELLED by 0"
            found[parts[0]] = JobState(state=state, reason="" if parts[3] == "None" else parts[3], exit_code=parts[2])
    return found
