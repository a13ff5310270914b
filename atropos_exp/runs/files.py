"""The run folder's own records: metrics.jsonl (the truth about a run), samples/, summary.json.

Always written, whatever `logger` is. JSON has no NaN, so a value that is not finite is null.
"""

import json
import logging
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from atropos_exp.runs.atomic import write_atomic
from atropos_exp.runs.redaction import redact
from atropos_exp.types import SampleRecord, StepMetrics

log = logging.getLogger(__name__)


class Row(dict[str, float | None]):
    """A line of metrics.jsonl: metrics by name, None for a value that was not finite, and "step"."""

    @property
    def step(self) -> int:
        """The step that the line is about; 0 is the untrained policy."""
        return int(self["step"] or 0)


class RunFiles:
    """The records of one run folder: metrics.jsonl and samples/. Only rank 0 writes them.

    A full disk stops the run, for without these files nobody can know what it did.
    """

    def __init__(self, folder: Path, *, first_step: int) -> None:
        """`first_step`: the step that comes next, 0 for a new run. What an interrupted process recorded of it and of
        later steps is forgotten, for it will be done again, and so is a torn last line. Rollout journals stay."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics_path = folder / "metrics.jsonl"
        _forget_steps(self._metrics_path, first_step)
        for path in (folder / "samples").glob("step_*.jsonl"):
            digits = path.stem.removeprefix("step_")
            if digits.isdigit() and int(digits) >= first_step:
                path.unlink()

    def log(self, metrics: StepMetrics) -> None:
        """Append one line, whole or not at all, visible to readers on return."""
        row = {"step": metrics.step} | {name: _finite(value) for name, value in metrics.values.items()}
        with self._metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def samples(self, step: int, records: Sequence[SampleRecord]) -> None:
        """Write the sample rollouts of a step to samples/step_000012.jsonl."""
        lines = [json.dumps(_jsonable(asdict(record)), ensure_ascii=False, allow_nan=False) for record in records]
        write_atomic(self.folder / "samples" / f"step_{step:06d}.jsonl", "".join(line + "\n" for line in lines))


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write summary.json atomically, also where no step was ever recorded."""
    text = json.dumps(_jsonable(dict(summary)), indent=2, allow_nan=False, ensure_ascii=False)
    write_atomic(folder / "summary.json", text + "\n")


def note_command(folder: Path, argv: Sequence[str]) -> None:
    """Add the command line of this attempt to command.txt, without its secrets. The report shows it."""
    with (folder / "command.txt").open("a", encoding="utf-8") as file:
        file.write(redact(shlex.join(argv)) + "\n")


def read_metrics(path: Path) -> tuple[list[Row], int]:
    """Return the rows of a metrics.jsonl and the number of its other lines, such as torn ones. No file: no rows."""
    found, num_bad = read_json_lines(path)
    rows = [Row(line) for line in found if isinstance(line.get("step"), int)]
    return rows, num_bad + len(found) - len(rows)


def read_rows(folder: Path) -> list[Row]:
    """Return the rows of a run folder's metrics.jsonl, torn lines left out."""
    return read_metrics(folder / "metrics.jsonl")[0]


def by_step(rows: Iterable[Row]) -> list[Row]:
    """Return one row a step, in the order of the steps; of a step that was recorded twice, the later row."""
    return sorted({row.step: row for row in rows}.values(), key=lambda row: row.step)


def last_step(rows: Iterable[Row], *, default: int = 0) -> int:
    """Return the newest step among `rows`, or `default` if there is none."""
    return max((row.step for row in rows), default=default)


def run_status(folder: Path) -> tuple[str | None, str]:
    """Return `status` and `error` of a run's summary.json; (None, "") if there is none, or none that can be read."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
        return str(summary["status"]), str(summary.get("error") or "")
    except (OSError, ValueError, KeyError, TypeError):
        return None, ""


def read_json_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the objects in a file of one JSON object a line, and the number of its other lines. No file: no objects.

    A writer that was killed leaves a torn last line, so a reader must expect one.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    records: list[dict[str, Any]] = []
    # not splitlines(), which also splits at separators that JSON strings may hold as they are
    lines = [line for line in text.split("\n") if line.strip()]
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records, len(lines) - len(records)


def _forget_steps(path: Path, first_step: int) -> None:
    """Keep only the lines of steps before `first_step`, in one atomic move."""
    rows, num_bad = read_metrics(path)
    kept = [row for row in rows if row.step < first_step]
    if len(kept) == len(rows) and not num_bad:
        return
    num_forgotten = len(rows) - len(kept)
    log.info("%s: removed %d lines from step %d on and %d torn lines", path, num_forgotten, first_step, num_bad)
    write_atomic(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept))


def _finite(value: float) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, float):
        return _finite(value)
    if isinstance(value, str):
        # a byte-level tokenizer cut in half may yield lone surrogates, which are no UTF-8
        return value.encode("utf-8", "replace").decode("utf-8")
    return value
