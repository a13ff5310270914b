"""A logger whose library works in a process of its own: what `logger=wandb` and `logger=trackio` have in common.

A tracking library may hang, raise, retry for minutes or block the interpreter's exit; in another process it can do none
of that to the run. The run only puts messages into a bounded queue; a thread feeds them to the process
(`remote_process.py`). If the run is killed, the process sees its input end and still uploads what it has.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from typing import Annotated, Any

from pydantic import Field

from atropos_exp.config.settings import Count, Seconds, Settings
from atropos_exp.parts.logger.console import Console, ConsoleLogger
from atropos_exp.parts.logger.feeder import Feeder
from atropos_exp.runs.redaction import redact
from atropos_exp.types import RunDescription, SampleRecord, StepMetrics


class RemoteSettings(Settings):
    """Settings that all loggers with a process of their own have."""

    live: bool | None
    every: Count
    project: Annotated[str, Field(min_length=1, description="the name of a project")]
    group: str | None
    finish_timeout: Seconds
    queue_size: Annotated[int, Field(ge=1, le=10**7)]

    def console(self, run: RunDescription) -> ConsoleLogger:
        """Return the logger that prints beside this one."""
        return Console(live=self.live, every=self.every).start(run)


class RemoteLogger:
    """A `Logger` that writes to the console and to a library in another process."""

    def __init__(
        self, settings: RemoteSettings, run: RunDescription, *, library: str, name: str, facts: Mapping[str, Any]
    ) -> None:
        """Start the program `<library>_process.py`, whose first message holds `facts` and what every tracker needs;
        secrets of the run's configuration are redacted in it. `name` stands before what the process reports."""
        self._console = settings.console(run)
        self._finish_timeout = settings.finish_timeout
        self._feeder = Feeder(
            # -P: the working directory, where W&B makes a folder called wandb, stays off the import path
            [sys.executable, "-P", "-m", f"atropos_exp.parts.logger.{library}_process"],
            name=name,
            log_path=run.folder / "log" / f"{library}.log",
            queue_size=settings.queue_size,
            tell=self._console.say,
        )
        group = run.group if settings.group is None else settings.group
        seen = run.folder / "log" / f"{library}_steps.json"
        if not run.resumed:
            seen.unlink(missing_ok=True)
        start = {"project": settings.project, "group": group, "config": redact(run.config), "seen": str(seen)}
        self._feeder.put({**start, **facts})

    @property
    def num_dropped(self) -> int:
        """Messages that the process did not take in time."""
        return self._feeder.num_dropped

    def log(self, metrics: StepMetrics) -> None:
        """Send the finite metrics of a step to the process, and show them on the console."""
        values = {name: value for name, value in metrics.values.items() if isfinite(value)}
        self._feeder.put({"kind": "metrics", "values": {"step": metrics.step} | values})
        self._console.log(metrics)

    def samples(self, step: int, records: Sequence[SampleRecord]) -> None:
        """Send the step's sample rollouts, which become a table."""
        self._feeder.put({"kind": "samples", "step": step, "rows": [asdict(record) for record in records]})

    def close(self, summary: Mapping[str, Any]) -> None:
        """Wait at most `finish_timeout` seconds for the process to finish, then end it."""
        self._console.close(summary)
        self._feeder.close({"kind": "finish", "summary": redact(summary)}, timeout=self._finish_timeout)
