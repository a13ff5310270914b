"""`logger=wandb`: Weights & Biases beside the console, from a process of its own.

wandb may hang, raise, retry for minutes or block the interpreter's exit; in another process it can do none of that to
the run. The run only puts messages into a bounded queue; a thread feeds them to the process (`wandb_process.py`).
If the run is killed, the process sees its input end and still uploads what it has.
"""

from __future__ import annotations

import logging
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from math import isfinite
from pathlib import Path
from typing import Any

from atropos_exp.errors import UserError
from atropos_exp.parts.logger.console import Console, ConsoleLogger
from atropos_exp.parts.logger.feeder import Feeder
from atropos_exp.runs.atomic import write_atomic
from atropos_exp.runs.redaction import redact
from atropos_exp.types import SampleRecord, StepMetrics

log = logging.getLogger(__name__)

RUN_ID_FILE = "wandb_run_id.txt"


class Mode(Enum):
    """Where W&B records."""

    auto = "auto"  # online if there is an API key, else offline
    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass(frozen=True, kw_only=True)
class Wandb:
    """Settings of `logger=wandb`."""

    live: bool | None
    every: int
    mode: Mode
    project: str
    entity: str | None
    group: str | None
    job_type: str | None
    tags: list[str]
    init_timeout: float
    finish_timeout: float
    queue_size: int

    def __post_init__(self) -> None:
        if not self.project:
            raise UserError("logger.project: W&B needs the name of a project; got an empty one")
        for key in ("init_timeout", "finish_timeout", "queue_size"):
            if not getattr(self, key) > 0:
                raise UserError(f"logger.{key}: must be above 0; got {getattr(self, key)}")

    def start(
        self,
        *,
        run_folder: Path,
        config: Mapping[str, Any],
        name: str,
        resumed: bool,
        total_steps: int,
        group: str | None = None,
    ) -> ConsoleLogger | WandbLogger:
        """`config` is redacted here. A resumed run continues its W&B run, whose id lies in the run folder."""
        console = Console(live=self.live, every=self.every).start(
            run_folder=run_folder, config=config, name=name, resumed=resumed, total_steps=total_steps, group=None
        )
        if self.mode is Mode.disabled:
            return console
        settings = {
            "mode": self.mode.value,
            "folder": str(run_folder.absolute()),
            "id": _run_id(run_folder, resumed),
            "name": name,
            "project": self.project,
            "entity": self.entity,
            "group": group if self.group is None else self.group,
            "job_type": self.job_type,
            "tags": list(self.tags),
            "config": redact(config),
            "init_timeout": self.init_timeout,
            "finish_timeout": 0.8 * self.finish_timeout,  # so that the process can still say what is missing
        }
        feeder = Feeder(
            # -P: the folder of the script, where this file is called wandb too, stays off the import path
            [sys.executable, "-P", str(Path(__file__).with_name("wandb_process.py"))],
            name="W&B",
            log_path=run_folder / "log" / "wandb.log",
            queue_size=self.queue_size,
            tell=console.say,
        )
        feeder.put(settings)
        return WandbLogger(console, feeder, finish_timeout=self.finish_timeout)


class WandbLogger:
    """A `Logger` that tells the console and W&B."""

    def __init__(self, console: ConsoleLogger, feeder: Feeder, *, finish_timeout: float) -> None:
        self._console = console
        self._feeder = feeder
        self._finish_timeout = finish_timeout

    @property
    def num_dropped(self) -> int:
        """Messages that W&B did not take in time."""
        return self._feeder.num_dropped

    def log(self, metrics: StepMetrics) -> None:
        values = {name: value for name, value in metrics.values.items() if isfinite(value)}
        self._feeder.put({"kind": "metrics", "values": {"step": metrics.step} | values})
        self._console.log(metrics)

    def samples(self, step: int, records: Sequence[SampleRecord]) -> None:
        """A table of this step's sample rollouts."""
        rows = [asdict(record) for record in records]
        self._feeder.put({"kind": "samples", "step": step, "rows": rows})

    def close(self, summary: Mapping[str, Any]) -> None:
        """Wait at most `finish_timeout` for W&B to finish, then end it."""
        self._console.close(summary)
        self._feeder.close({"kind": "finish", "summary": redact(summary)}, timeout=self._finish_timeout)


def _run_id(run_folder: Path, resumed: bool) -> str:
    path = run_folder / RUN_ID_FILE
    if resumed and path.is_file() and (known := path.read_text().strip()):
        return known
    fresh = secrets.token_hex(4)
    write_atomic(path, fresh + "\n")
    return fresh
