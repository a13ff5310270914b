"""The run folder's own records: metrics.jsonl (the truth about a run), samples/, summary.json. Pure.

Always written, whatever `logger` is. JSON has no NaN, so a value that is not finite is null.
"""

from __future__ import annotations

import json
import logging
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from atropos_exp.runs.atomic import write_atomic
from atropos_exp.runs.redaction import redact
from atropos_exp.types import SampleRecord, StepMetrics

log = logging.getLogger(__name__)

Row = dict[str, float | None]  # a line of metrics.jsonl: "step" and metrics by name


class RunFiles:
    """A `Logger` of one run folder. Rank 0 only. A full disk stops the run: there is no truth without it."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        """`first_step`: the step that comes next, 0 for a new run. What an interrupted process recorded of it and of
        later steps is forgotten, for it will be done again, and so is a torn last line. Rollout journals stay."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics_path = folder / "metrics.jsonl"
        _forget_steps(self._metrics_path, first_step)
        for path in (folder / "samples").glob("step_*.jsonl"):
            if _step_of(path) >= first_step:
                path.unlink()

    def log(self, metrics: StepMetrics) -> None:
        """Append one line, whole or not at all, visible to readers on return."""
        row = {"step": metrics.step} | {name: _finite(value) for name, value in metrics.values.items()}
        with self._metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def samples(self, step: int, records: Sequence[SampleRecord]) -> None:
        """Write samples/step_000012.jsonl."""
        lines = [json.dumps(_jsonable(asdict(record)), ensure_ascii=False, allow_nan=False) for record in records]
        write_atomic(self.folder / "samples" / f"step_{step:06d}.jsonl", "".join(line + "\n" for line in lines))

    def journal_path(self, step: int) -> Path:
        """Where the rollout journal of `step` lies; see `journal.py`."""
        return self.folder / "rollouts" / f"step_{step:06d}.parquet"

    def rows(self) -> list[Row]:
        """Everything logged so far, earlier attempts included."""
        return read_metrics(self._metrics_path)[0]

    def close(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json (see `summary.py`). May be called again with a better summary."""
        write_summary(self.folder, summary)


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write summary.json atomically, also where no step was ever recorded."""
    text = json.dumps(_jsonable(dict(summary)), indent=2, allow_nan=False, ensure_ascii=False)
    write_atomic(folder / "summary.json", text + "\n")


def note_command(folder: Path, argv: Sequence[str]) -> None:
    """Add the command line of this attempt to command.txt, without its secrets. The report shows it."""
    with (folder / "command.txt").open("a", encoding="utf-8") as file:
        file.write(redact(shlex.join(argv)) + "\n")


def read_metrics(path: Path) -> tuple[list[Row], int]:
    """The rows of a metrics.jsonl and the number of its lines that are torn or no row. No file: no rows."""
    rows: list[Row] = []
    num_bad = 0
    for line in _lines(path) if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            num_bad += 1
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        else:
            num_bad += 1
    return rows, num_bad


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The records of one samples file; lines that are no record are left out."""
    records = []
    for line in _lines(path):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _lines(path: Path) -> list[str]:
    # not splitlines(), which also splits at separators that JSON strings may hold as they are
    return [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]


def _forget_steps(path: Path, first_step: int) -> None:
    """Keep only the lines of steps before `first_step`, in one atomic move."""
    rows, num_bad = read_metrics(path)
    kept = [row for row in rows if (row["step"] or 0) < first_step]
    if len(kept) == len(rows) and not num_bad:
        return
    num_forgotten = len(rows) - len(kept)
    log.info("%s: removed %d lines from step %d on and %d torn lines", path, num_forgotten, first_step, num_bad)
    write_atomic(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept))


def _step_of(path: Path) -> int:
    digits = path.stem.removeprefix("step_")
    return int(digits) if digits.isdigit() else -1


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
