"""The commands of the jobs of a sweep."""

import sys

from atropos_exp.config.freeze import FROZEN
from atropos_exp.runs.sweep_folder import SweepFolder


def run_command(sweep: SweepFolder, number: int) -> list[str]:
    """Return the command that starts, or continues, one run from its frozen configuration."""
    return [sys.executable, "-m", "atropos_exp.run", FROZEN, str(sweep.config_path(number))]


def worker_command(sweep: SweepFolder, number: int) -> list[str]:
    """Return the command that starts a worker of a search."""
    return [sys.executable, "-m", "atropos_exp.sweep.worker", str(sweep.path), str(number)]
