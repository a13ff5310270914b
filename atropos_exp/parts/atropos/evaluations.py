"""What environments measured themselves: `BaseEnv.evaluate_log` writes it to a file of the run, again and again."""

import json
import math
from pathlib import Path

from atropos_exp.metrics import slug

RESULTS = "metrics.json"  # as atroposlib calls it


class Evaluations:
    """The results in the subfolders of `folder`, each read once. A file that cannot be read yet is read next time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        before = folder.glob(f"*/{RESULTS}")  # of an earlier attempt at the run, whose metrics have them
        self._read: dict[Path, int] = {path: _written(path) for path in before}

    def collect(self) -> dict[str, float]:
        """`environment/<name>/<metric>` of each evaluation since the last call."""
        values: dict[str, float] = {}
        for path in sorted(self._folder.glob(f"*/{RESULTS}")):
            written = _written(path)
            if written == self._read.get(path):
                continue
            try:
                results = json.loads(path.read_text(encoding="utf-8"))["results"]["all"].items()
            except (OSError, ValueError, KeyError, TypeError, AttributeError):  # it is being written
                continue
            self._read[path] = written
            values |= {
                f"environment/{slug(path.parent.name)}/{slug(name)}": float(value)
                for name, value in results
                if isinstance(value, int | float) and math.isfinite(value)
            }
        return values


def _written(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
