"""`logger=wandb`: Weights & Biases beside the console, from a process of its own (`remote.py` says why)."""

import secrets
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from atropos_exp.config.settings import Count, Seconds, Settings
from atropos_exp.parts.logger.console import Console, ConsoleLogger
from atropos_exp.parts.logger.remote import RemoteLogger
from atropos_exp.runs.atomic import write_atomic
from atropos_exp.runs.redaction import redact

RUN_ID_FILE = "wandb_run_id.txt"


class Mode(Enum):
    """Where W&B records."""

    auto = "auto"  # online if there is an API key, else offline
    online = "online"
    offline = "offline"
    disabled = "disabled"


class Wandb(Settings):
    """Settings of `logger=wandb`."""

    live: bool | None
    every: Count
    mode: Mode
    project: Annotated[str, Field(min_length=1, description="the name of a project")]
    entity: str | None
    group: str | None
    job_type: str | None
    tags: list[str]
    init_timeout: Seconds
    finish_timeout: Seconds
    queue_size: Count

    def start(
        self,
        *,
        run_folder: Path,
        config: Mapping[str, Any],
        name: str,
        resumed: bool,
        total_steps: int,
        group: str | None = None,
    ) -> ConsoleLogger | RemoteLogger:
        """Return the logger of a run. Secrets in `config` are redacted here.

        A resumed run continues its W&B run, whose id lies in the run folder.
        """
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
        return RemoteLogger(
            "W&B",
            "atropos_exp.parts.logger.wandb_process",
            console,
            settings=settings,
            log=run_folder / "log" / "wandb.log",
            queue_size=self.queue_size,
            finish_timeout=self.finish_timeout,
        )


def _run_id(run_folder: Path, resumed: bool) -> str:
    path = run_folder / RUN_ID_FILE
    if resumed and path.is_file() and (known := path.read_text().strip()):
        return known
    fresh = secrets.token_hex(4)
    write_atomic(path, fresh + "\n")
    return fresh
