"""The start of a sweep from a command line, and its end with a report."""

import sys
from collections.abc import Sequence

from atropos_exp.sweep.driver import Sweep, run_sweep, unfinished
from atropos_exp.sweep.plan import plan_sweep
from atropos_exp.sweep.table import LiveTable, counts


def start_sweep(overrides: Sequence[str], config_dir: str | None) -> int:
    """Plan a sweep, freeze its runs and run them.

    Returns the exit code: 0, or 1 if runs are left undone. Raises UserError before anything has started.
    """
    plan = plan_sweep(overrides, config_dir)
    command = ["python", "-m", "atropos_exp.run", *sys.argv[1:]]
    with LiveTable() as watch:
        return run_sweep(plan, command, watch, finish)


def finish(sweep: Sweep) -> None:
    """Print how the sweep ended, and write its report."""
    from atropos_exp.report.sweep_page import write_sweep_report

    states = sweep.states()
    print(f"{counts(states)}", flush=True)
    for label, reason in unfinished(sweep).items():
        print(f"  {label}: {reason}", flush=True)
    if not sweep.is_complete():
        print(f"To continue: python -m atropos_exp.sweep resume {sweep.folder.path}", flush=True)
    print(f"Report: {write_sweep_report(sweep.folder, states)}", flush=True)
