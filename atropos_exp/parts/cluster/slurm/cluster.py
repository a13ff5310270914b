"""`cluster=slurm`: runs and sweeps as jobs of Slurm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from atropos_exp.parts.cluster.slurm.jobs import JobSpec
from atropos_exp.parts.cluster.slurm.settings import SlurmSettings
from atropos_exp.parts.cluster.slurm.single import submit_single
from atropos_exp.parts.cluster.slurm.sweep import SlurmBackend
from atropos_exp.runs.sweep_folder import SweepFolder


class Slurm(SlurmSettings):
    """Settings of `cluster=slurm`, which submit the run or the sweep that they describe."""

    @property
    def queue(self) -> Slurm:
        """Jobs are submitted to it, rather than started."""
        return self

    def submit_run(self, *, name: str, arguments: Sequence[str], run_folder: Path) -> int:
        """Submit one run, or print the job with `dry_run`; follow it if `wait`. Returns the exit code.

        `arguments`: what follows the interpreter in the command line of one rank.
        """
        return submit_single(JobSpec(name=name, arguments=tuple(arguments), run_folder=run_folder), self)

    def sweep_backend(self, sweep: SweepFolder, settings: object) -> SlurmBackend:
        """Return what executes the runs of a sweep as job arrays. Slurm needs nothing of the sweep's `settings`."""
        return SlurmBackend(sweep, self)
