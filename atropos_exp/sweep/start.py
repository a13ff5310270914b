"""The start of a sweep from a command line, and its end with a report."""

import sys
from collections.abc import Sequence
from contextlib import closing

from atropos_exp.assembly.check import Checked
from atropos_exp.assembly.starting import machine_problems, refuse
from atropos_exp.config.freeze import resolved
from atropos_exp.config.sources import Sources
from atropos_exp.sweep.driver import Sweep, open_or_create, unfinished
from atropos_exp.sweep.plan import Plan, plan_sweep
from atropos_exp.sweep.table import LiveTable, counts


def start_sweep(overrides: Sequence[str], sources: Sources) -> int:
    """Plan a sweep, freeze its runs, and run what is left of them.

    Returns the exit code: 0 if nothing is left (or `wait` is false), else 1. Raises UserError before anything has
    started.
    """
    plan = plan_sweep(overrides, sources)
    if plan.checked.parts.cluster.queue is None:  # else the runs look where they run
        refuse(list(dict.fromkeys(problem for one in _different(plan) for problem in machine_problems(one))))
    sweep = Sweep(open_or_create(plan, ["python", "-m", "atropos_exp.run", *sys.argv[1:]]))
    num_jobs = sweep.submit(attached=plan.settings.wait)
    print(f"Sweep: {sweep.folder.path}", flush=True)
    if not num_jobs:
        print("Nothing is left to do: all its runs are finished (resume=never starts them afresh)", flush=True)
    elif not plan.settings.wait:
        print(f"{num_jobs} {'workers' if sweep.is_search else 'runs'} queued. "
              f"python -m atropos_exp.sweep status|wait|cancel {sweep.folder.path}", flush=True)  # fmt: skip
        return 0
    return attend(sweep)


def _different(plan: Plan) -> list[Checked]:
    """The configurations that want something else of the machine than the others."""
    needed = ("model", "data", "env", "gateway", "rollout", "atropos")
    found: dict[str, Checked] = {}
    for checked in {
        id(one): one for one in (plan.checked, *(run.checked for run in plan.runs))
    }.values():  # of all seeds
        values = resolved(checked.config)
        found.setdefault(repr([values[name] for name in needed]), checked)
    return list(found.values())


def attend(sweep: Sweep) -> int:
    """Wait for all jobs, and `finish`. Returns the exit code: 0 if nothing is left to do, else 1.

    Ctrl-C stops the jobs, which save first; a second one kills them.
    """
    interrupted = False
    with closing(LiveTable()) as watch:
        while True:
            try:
                sweep.wait(watch)
                break
            except KeyboardInterrupt:
                if interrupted:
                    sweep.backend.kill()
                    break
                interrupted = True
                print("\nRuns finish their step and save (Ctrl-C again: kill them)", file=sys.stderr, flush=True)
                sweep.backend.cancel()
        finish(sweep)
    if interrupted:
        return 130
    return 0 if sweep.is_complete() else 1


def finish(sweep: Sweep) -> None:
    """Print how the sweep ended, and write its report."""
    from atropos_exp.report.sweep_page import write_sweep_report

    states = sweep.states()
    print(counts(states), flush=True)
    for label, reason in unfinished(sweep).items():
        print(f"  {label}: {reason}", flush=True)
    if not sweep.is_complete():
        print(f"To continue: python -m atropos_exp.sweep resume {sweep.folder.path}", flush=True)
    print(f"Report: {write_sweep_report(sweep.folder, states)}", flush=True)
