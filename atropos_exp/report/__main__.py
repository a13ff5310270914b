"""`python -m atropos_exp.report RUN [RUN …] [--out FILE]`: one HTML file of one or more runs, to open offline."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from atropos_exp.errors import UserError
from atropos_exp.report.page import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 with one message if a path is no run."""
    parser = argparse.ArgumentParser(prog="python -m atropos_exp.report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder, or a folder of runs (a sweep)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="default: report.html in RUN, comparison.html beside several",
    )
    given = parser.parse_args(arguments)
    try:
        print(write_report(given.runs, given.out))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"report: {error.filename}: {error.strerror}; --out names another file", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
