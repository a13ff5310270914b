"""A logger whose library works in a process of its own: what `logger=wandb` and `logger=trackio` have in common.

A tracking library may hang, raise, retry for minutes or block the interpreter's exit; in another process it can do none
of that to the run. The run only puts messages into a bounded queue; a thread feeds them to the process
(`remote_process.py`). If the run is killed, the process sees its input end and still uploads what it has.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

from atropos_exp.parts.logger.console import ConsoleLogger
from atropos_exp.parts.logger.feeder import Feeder
from atropos_exp.runs.redaction import redact
from atropos_exp.types import SampleRecord, StepMetrics


class RemoteLogger:
    """A `Logger` that writes to the console and to a library in another process."""

    def __init__(
        self,
        name: str,
        module: str,
        console: ConsoleLogger,
        *,
        settings: Mapping[str, Any],
        log: Path,
        queue_size: int,
        finish_timeout: float,
    ) -> None:
        """Start `module` with `settings` as its first message. `name` stands before what the process reports, `log`
        takes what the library prints."""
        self._console = console
        self._finish_timeout = finish_timeout
        # -P: the working directory, where W&B makes a folder called wandb, stays off the import path
        command = [sys.executable, "-P", "-m", module]
        self._feeder = Feeder(command, name=name, log_path=log, queue_size=queue_size, tell=console.say)
        self._feeder.put(settings)

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
