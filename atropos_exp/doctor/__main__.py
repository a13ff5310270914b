"""What a run needs before it starts, and how one that started is doing.

    python -m atropos_exp.doctor [group=option] [key=value] …      before: everything this configuration needs
    python -m atropos_exp.doctor RUN_FOLDER [--patience SECONDS]   during and after: what happened, with the evidence

Each line is ok, warn or fail, with what to do. The exit code is that of the worst: 0, 1 or 2.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from atropos_exp.assembly.check import mistakes_of
from atropos_exp.config.command_line import hydra_main
from atropos_exp.config.sources import Sources
from atropos_exp.doctor.line import counts, worst
from atropos_exp.errors import UserError


def before(config: DictConfig) -> int:
    """Examine a configuration and print what was found; returns the exit code."""
    from atropos_exp.doctor.before import examine

    start, lines = time.monotonic(), []
    for line in examine(config):
        print(line, flush=True)
        lines.append(line)
    print(f"{counts(lines)} in {time.monotonic() - start:.1f} s")
    return worst(lines)


def after(arguments: list[str]) -> int:
    """Explain a run from its folder; returns the exit code."""
    from atropos_exp.doctor.after import explain

    parser = argparse.ArgumentParser(prog="python -m atropos_exp.doctor", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("--patience", type=float, metavar="SECONDS", help="without news a run counts as stalled")
    given = parser.parse_args(arguments)
    lines = explain(given.run, patience=given.patience)
    print(*lines, counts(lines), sep="\n")
    return worst(lines)


def refuse_sweep(overrides: Sequence[str], sources: Sources) -> int:
    """Raise UserError for the overrides of a sweep: the doctor examines one run."""
    raise UserError("the doctor looks at one configuration; leave -m and +sweeps= away")


def main() -> None:
    """Run the program; returns the exit code."""
    if len(sys.argv) > 1 and Path(sys.argv[1]).is_dir() and "=" not in sys.argv[1]:
        sys.exit(after(sys.argv[1:]))
    hydra_main(before, refuse_sweep, mistakes_of)()


if __name__ == "__main__":
    main()
