"""`cluster=slurm`: runs and sweeps as jobs of Slurm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from atropos_exp.parts.cluster.slurm.settings import SlurmSettings

if TYPE_CHECKING:
    from atropos_exp.parts.cluster.slurm.sweep import SlurmBackend
    from atropos_exp.runs.sweep_folder import SweepFolder


class Slurm(SlurmSettings):
    """Submits what its settings describe."""

    @property
    def queue(self) -> Slurm:
        """Jobs are submitted to it, rather than started."""
        return self

    def submit_run(self, *, name: str, arguments: Sequence[str], run_folder: Path) -> int:
        """Submit one run (or print what would be), follow it if `wait`; the exit code.

        `arguments`: what follows the interpreter in the command line of one rank.
        """
        from atropos_exp.parts.cluster.slurm.jobs import JobSpec
        from atropos_exp.parts.cluster.slurm.single import submit_single

        return submit_single(JobSpec(name=name, arguments=tuple(arguments), run_folder=run_folder), self)

    def sweep_backend(self, sweep: SweepFolder, settings: object) -> SlurmBackend:
        """Executes the runs of a sweep as job arrays; `settings` of the sweep say nothing that Slurm needs."""
        from atropos_exp.parts.cluster.slurm.sweep import SlurmBackend

        return SlurmBackend(sweep, self)
