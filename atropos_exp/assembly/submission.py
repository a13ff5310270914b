"""How a run gets its ranks: here and now, or from a queue, with its folder and its configuration fixed beforehand."""

import json
import os
from datetime import datetime
from pathlib import Path

from atropos_exp.assembly.check import Checked
from atropos_exp.config.command_line import job_command
from atropos_exp.config.freeze import config_hash, freeze_config
from atropos_exp.runs.atomic import write_atomic
from atropos_exp.runs.folder import SUBMITTED, find_run_folder, new_folder


def launch(checked: Checked) -> int | None:
    """Run or submit all ranks and return the exit code; None if this process is itself the (or a) rank."""
    cluster = checked.parts.cluster
    queue = cluster.queue
    if queue is None or "WORLD_SIZE" in os.environ:
        return cluster.launch(job_command())
    identity = config_hash(checked.config)
    if queue.dry_run:
        folder = _existing(checked, identity) or _base(checked) / f"{datetime.now():%Y-%m-%d/%H-%M-%S}"
        arguments: tuple[str, ...] = ()
    else:
        folder = (_existing(checked, identity) or new_folder(_base(checked))).absolute()
        write_atomic(folder / SUBMITTED, json.dumps({"config_hash": identity}) + "\n")
        arguments = freeze_config(checked.config, folder / "slurm" / "config.yaml", run_dir=folder)
    return queue.submit_run(name=checked.run.name, arguments=arguments, run_folder=folder)


def _base(checked: Checked) -> Path:
    return Path(checked.run.output_dir).expanduser().absolute() / checked.run.name


def _existing(checked: Checked, identity: str) -> Path | None:
    run = checked.run
    return find_run_folder(
        base=_base(checked), run_dir=run.run_dir, resume=run.resume, config_hash=identity, submitted=True
    )
