"""How a run gets its ranks: here and now, or from a queue, with its folder and its configuration fixed beforehand."""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path

from atropos_exp.assembly.check import Checked
from atropos_exp.config.command_line import job_command
from atropos_exp.config.freeze import config_hash, freeze_config
from atropos_exp.errors import UserError
from atropos_exp.runs.atomic import write_atomic
from atropos_exp.runs.folder import IDENTITY, is_unfinished, new_folder

SUBMITTED = Path("slurm") / "submitted.json"  # the run that a job is to begin in a folder, before it has


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
    """The folder that the command names, or that this configuration's unfinished run has; None for a new one.

    Unlike a local run, it may belong to a job that is waiting or running: that is told then, not started again.
    """
    run = checked.run
    if run.resume not in ("auto", "never"):
        path = Path(run.resume).expanduser()
        if not (path / IDENTITY).is_file():
            raise UserError(f"resume: {path} is not a run folder (no {IDENTITY} in it); give one, or auto, or never")
        return path
    if run.run_dir is not None:
        path = Path(run.run_dir).expanduser()
        holds = _identity(path)
        if holds is not None and run.resume == "never":
            raise UserError(f"run_dir: {path} already holds a run; choose another, or resume=auto to continue it")
        if holds is not None and holds != identity:
            raise UserError(
                f"run_dir: {path} holds a run of another configuration; choose another folder, "
                f"or resume={path} to continue that run under this configuration"
            )
        if (path / IDENTITY).is_file() and not is_unfinished(path, holds or identity):
            raise UserError(f"run_dir: the run in {path} is finished; choose another folder, or read its report")
        return path
    if run.resume == "auto":
        for path in sorted(_base(checked).glob("*/*"), reverse=True):
            begun = (path / IDENTITY).is_file()
            if _identity(path) == identity and (is_unfinished(path, identity) or not begun):
                return path
    return None


def _identity(path: Path) -> str | None:
    """The hash of the configuration whose run `path` holds or is to hold."""
    for name in (Path(IDENTITY), SUBMITTED):
        try:
            return str(json.loads((path / name).read_text())["config_hash"])
        except (OSError, ValueError, KeyError):
            continue
    return None
