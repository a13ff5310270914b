"""The commands of a sweep's jobs."""

from __future__ import annotations

import sys

from atropos_exp.config_save import FROZEN
from atropos_exp.sweep_folder import SweepFolder


def run_command(sweep: SweepFolder, number: int) -> list[str]:
    """Starts, or continues, one run from its frozen configuration."""
    return [sys.executable, "-m", "atropos_exp.run", FROZEN, str(sweep.config_path(number))]


def worker_command(sweep: SweepFolder, number: int) -> list[str]:
    """Starts a worker of a search."""
    return [sys.executable, "-m", "atropos_exp.sweep.worker", str(sweep.path), str(number)]
