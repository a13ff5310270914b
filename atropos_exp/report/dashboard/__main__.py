"""Dashboards: a W&B workspace defined as code, or a local one without an account.

python -m atropos_exp.report.dashboard --entity TEAM [--project NAME]     create or renew the workspace at W&B
python -m atropos_exp.report.dashboard --print                            show what would be sent
python -m atropos_exp.report.dashboard --local [outputs/trackio]          open the local dashboard of logger=trackio
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from atropos_exp.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 with one message."""
    parser = argparse.ArgumentParser(
        prog="python -m atropos_exp.report.dashboard",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--local", nargs="?", type=Path, const=Path("outputs/trackio"), metavar="FOLDER")
    parser.add_argument("--port", type=int, help="of the local dashboard; default: a free one")
    parser.add_argument("--no-browser", action="store_true", help="only serve the local dashboard")
    parser.add_argument("--entity", help="team or user at W&B")
    parser.add_argument("--project", default="atropos-exp", help="at W&B; default: %(default)s")
    parser.add_argument("--name", default="GRPO", help="of the workspace; default: %(default)s")
    parser.add_argument("--eval-set", action="append", default=[], metavar="NAME", help="held-out set; may be repeated")
    parser.add_argument("--by", metavar="KEY", help="configuration key to compare by, such as advantage.norm_by_std")
    parser.add_argument("--print", action="store_true", help="print the workspace instead of sending it")
    given = parser.parse_args(arguments)
    try:
        if given.local is not None:
            from atropos_exp.report.dashboard.local import show

            show(given.local, port=given.port, open_browser=not given.no_browser)
            return 0
        return _workspace(given)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def _workspace(given: argparse.Namespace) -> int:
    from atropos_exp.report.dashboard.workspace import as_json, build

    if given.entity is None and not given.print:
        raise UserError("--entity: the workspace belongs to a team or user at W&B; name it, or use --print")
    made = build(
        entity=given.entity or "entity",
        project=given.project,
        name=given.name,
        eval_sets=tuple(given.eval_set) or ("arithmetic",),
        by=given.by,
    )
    if given.print:
        print(json.dumps(as_json(made), indent=2))
        return 0
    try:
        made.save()
    except Exception as error:  # W&B's client raises what its server and the network give; the reason is told
        raise UserError(f"W&B did not take the workspace ({type(error).__name__}: {error}); wandb login?") from error
    print(made.url)
    return 0


if __name__ == "__main__":
    sys.exit(main())
