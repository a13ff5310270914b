"""`logger=wandb`: Weights & Biases beside the console, from a process of its own (`remote.py` says why)."""

import secrets
from enum import Enum
from pathlib import Path

from atropos_exp.config.settings import Seconds
from atropos_exp.parts.logger.console import ConsoleLogger
from atropos_exp.parts.logger.remote import RemoteLogger, RemoteSettings
from atropos_exp.parts.logger.wandb_process import resolved, unreachable
from atropos_exp.runs.atomic import write_atomic
from atropos_exp.types import RunDescription

RUN_ID_FILE = "wandb_run_id.txt"
CONNECT_SECONDS = 3.0


class Mode(Enum):
    """Where W&B records."""

    auto = "auto"  # online if there is an API key, else offline
    online = "online"
    offline = "offline"
    disabled = "disabled"


class Wandb(RemoteSettings):
    """Settings of `logger=wandb`."""

    mode: Mode
    entity: str | None
    job_type: str | None
    tags: list[str]
    init_timeout: Seconds

    def environment_variables(self, run_folder: Path) -> dict[str, str]:
        """With which other programs of the run record as it does: in its mode, offline where the server is out of
        reach."""
        mode = resolved(self.mode.value)
        if mode == "online" and unreachable(CONNECT_SECONDS) is not None:
            mode = "offline"
        variables = {"WANDB_MODE": mode, "WANDB_DIR": str(run_folder.absolute()), "WANDB_SILENT": "true"}
        return variables if self.entity is None else {**variables, "WANDB_ENTITY": self.entity}

    def start(self, run: RunDescription) -> ConsoleLogger | RemoteLogger:
        """Return the logger of a run. A resumed run continues its W&B run, whose id lies in the run folder."""
        if self.mode is Mode.disabled:
            return self.console(run)
        facts = {
            "mode": self.mode.value,
            "folder": str(run.folder.absolute()),
            "id": _run_id(run.folder, run.resumed),
            "name": run.name,
            "entity": self.entity,
            "job_type": self.job_type,
            "tags": self.tags,
            "init_timeout": self.init_timeout,
            "finish_timeout": 0.8 * self.finish_timeout,  # so that the process can still say what is missing
        }
        return RemoteLogger(self, run, library="wandb", name="W&B", facts=facts)


def _run_id(run_folder: Path, resumed: bool) -> str:
    path = run_folder / RUN_ID_FILE
    if resumed and path.is_file() and (known := path.read_text().strip()):
        return known
    fresh = secrets.token_hex(4)
    write_atomic(path, fresh + "\n")
    return fresh
