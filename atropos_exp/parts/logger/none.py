"""`logger=none`: prints and sends nothing; metrics.jsonl and summary.json are written all the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from atropos_exp.config.settings import Settings
from atropos_exp.types import RunDescription, SampleRecord, StepMetrics


class NoLogger(Settings):
    """Settings of `logger=none`, which has none."""

    project: ClassVar[None] = None  # nothing is tracked outside the run folder
    group: ClassVar[None] = None

    def start(self, run: RunDescription) -> SilentLogger:
        """Return a logger that does nothing."""
        return SilentLogger()


class SilentLogger:
    """A `Logger` that does nothing."""

    def log(self, metrics: StepMetrics) -> None: ...

    def samples(self, step: int, records: Sequence[SampleRecord]) -> None: ...

    def close(self, summary: Mapping[str, Any]) -> None: ...
