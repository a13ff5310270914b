"""waiting.json: what the step that waits for rollouts has seen so far. It is there only while a step waits, or after
a run that ended waiting."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

from atropos_exp.runs.atomic import write_atomic

WAITING = "waiting.json"


def write_waiting(
    folder: Path, *, step: int, seconds: float, counters: Mapping[str, int], dropped: Mapping[str, int]
) -> None:
    """`counters` of this wait; `dropped` rollouts, by reason, that no row of metrics.jsonl has yet."""
    content = {"step": step, "seconds": round(seconds, 1), "counters": dict(counters), "dropped": dict(dropped)}
    write_atomic(folder / WAITING, json.dumps(content, indent=1) + "\n")


def end_waiting(folder: Path) -> None:
    """The rollouts have come."""
    (folder / WAITING).unlink(missing_ok=True)


def dropped_while_waiting(folder: Path) -> dict[str, int]:
    """The dropped rollouts of a step that still waits, by reason."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        found = json.loads((folder / WAITING).read_text(encoding="utf-8"))["dropped"]
        return {str(reason): int(num) for reason, num in found.items()}
    return {}
