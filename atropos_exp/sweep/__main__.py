"""`python -m atropos_exp.sweep status|wait|resume|cancel|report DIR`: look at, continue or end a sweep."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from atropos_exp.errors import UserError
from atropos_exp.runs.sweep_folder import SweepFolder
from atropos_exp.sweep.driver import Sweep, unfinished
from atropos_exp.sweep.start import attend, finish
from atropos_exp.sweep.table import LiveTable, counts, print_status


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 if runs are left undone (wait, resume), 2 with one message for a mistake, 3 if wait timed out."""
    parser = argparse.ArgumentParser(prog="python -m atropos_exp.sweep", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, about) in _COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("dir", type=Path, metavar="DIR", help="the folder of a sweep: it holds sweep.json")
        if name == "wait":
            command.add_argument("--timeout", type=float, metavar="SECONDS", help="give up then; default: never")
        if name == "resume":
            command.add_argument("--no-wait", action="store_true", help="return at once")
        if name == "cancel":
            command.add_argument("--runs", type=int, nargs="+", metavar="N", help="only these; default: all")
            command.add_argument("--now", action="store_true", help="kill all, without saving anything")
        if name == "report":
            command.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the folder")
    given = parser.parse_args(arguments)
    try:
        run, _ = _COMMANDS[given.command]
        return run(Sweep(SweepFolder.open(given.dir)), given)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def _status(sweep: Sweep, given: argparse.Namespace) -> int:
    print_status(sweep)
    return 0


def _wait(sweep: Sweep, given: argparse.Namespace) -> int:
    with closing(LiveTable()) as watch:
        try:
            if not sweep.wait(watch, timeout_s=given.timeout):
                print(f"{given.dir}: not over after {given.timeout:g} s: {counts(sweep.states())}", file=sys.stderr)
                return 3
        except KeyboardInterrupt:
            print("\nThe runs go on.", file=sys.stderr)
            return 130
    finish(sweep)
    return 0 if sweep.is_complete() else 1


def _resume(sweep: Sweep, given: argparse.Namespace) -> int:
    num_jobs = sweep.submit(attached=not given.no_wait)
    if not num_jobs:
        print("Nothing is left to do: all its runs are finished")
        return 0
    if given.no_wait:
        print(f"{num_jobs} jobs queued")
        return 0
    return attend(sweep)


def _cancel(sweep: Sweep, given: argparse.Namespace) -> int:
    if given.now:
        sweep.backend.kill()
    else:
        sweep.backend.cancel(given.runs)
    print("Asked." if sweep.is_active() else "Nothing runs.")
    return 0


def _report(sweep: Sweep, given: argparse.Namespace) -> int:
    from atropos_exp.report.sweep_page import write_sweep_report

    print(write_sweep_report(sweep.folder, sweep.states(), given.out))
    for label, reason in unfinished(sweep).items():
        print(f"{label}: {reason}", file=sys.stderr)
    return 0


_COMMANDS = {
    "status": (_status, "how every run stands"),
    "wait": (_wait, "stay until the sweep is over; Ctrl-C only leaves"),
    "resume": (_resume, "start what is unfinished or failed, from the frozen configurations"),
    "cancel": (_cancel, "let running runs finish their step and save, and start no others"),
    "report": (_report, "write report.html and name it"),
}

if __name__ == "__main__":
    sys.exit(main())
