"""The folder of one run: a new one, or the unfinished one of the same configuration. One writer at a time."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO

from atropos_exp.errors import UserError
from atropos_exp.processes.locks import is_held, try_hold

IDENTITY = "run.json"  # written first: what this folder belongs to


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFolder:
    path: Path
    resumed: bool  # the folder existed and held this configuration's unfinished run
    lock: IO[str] | None  # rank 0: held until the process ends; the kernel frees it even after kill -9


def open_run_folder(*, output_dir: Path, name: str, run_dir: str | None, resume: str, config_hash: str) -> RunFolder:
    """Choose the folder, create it, lock it, write who it belongs to.

    `resume=auto` continues the newest unfinished run of the same configuration under `output_dir/name`;
    `never` starts afresh; a path continues exactly that folder, whatever its configuration.
    `run_dir` fixes the folder; with `resume=auto` it is continued if it holds this configuration.
    """
    if resume not in ("auto", "never"):
        path = Path(resume).expanduser()
        if not (path / IDENTITY).is_file():
            raise UserError(f"resume: {path} is not a run folder (no {IDENTITY} in it); give one, or auto, or never")
        return _claim(path, resumed=True, config_hash=None)
    if run_dir is not None:
        return _open_fixed(Path(run_dir).expanduser(), resume=resume, config_hash=config_hash)
    base = output_dir.expanduser() / name
    if resume == "auto":
        for path in sorted(base.glob(f"*/*/{IDENTITY}"), reverse=True):
            if is_unfinished(path.parent, config_hash) and not is_held(path.parent / "lock"):
                return _claim(path.parent, resumed=True, config_hash=config_hash)
    return _claim(new_folder(base), resumed=False, config_hash=config_hash)


def new_folder(base: Path) -> Path:
    """Make base/<date>/<time>, which nobody has had before."""
    now = datetime.now()
    stem = base / now.strftime("%Y-%m-%d") / now.strftime("%H-%M-%S")
    for suffix in ("", *(f"-{number}" for number in range(2, 100))):
        path = stem.with_name(stem.name + suffix)
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise UserError(f"{stem}: 99 runs started in the same second; set run_dir")


def _open_fixed(path: Path, *, resume: str, config_hash: str) -> RunFolder:
    holds_run = (path / IDENTITY).is_file()
    if holds_run and resume == "never":
        raise UserError(f"run_dir: {path} already holds a run; choose another, or resume=auto to continue it")
    if holds_run and json.loads((path / IDENTITY).read_text())["config_hash"] != config_hash:
        raise UserError(
            f"run_dir: {path} holds a run of another configuration; choose another folder, "
            f"or resume={path} to continue that run under this configuration"
        )
    if holds_run and not is_unfinished(path, config_hash):
        raise UserError(f"run_dir: the run in {path} is finished; choose another folder, or read its report")
    path.mkdir(parents=True, exist_ok=True)
    return _claim(path, resumed=holds_run, config_hash=config_hash)


def is_unfinished(path: Path, config_hash: str) -> bool:
    """Whether `path` holds a run of this configuration that has not reached its last step."""
    try:
        if json.loads((path / IDENTITY).read_text())["config_hash"] != config_hash:
            return False
    except (OSError, ValueError, KeyError):
        return False  # killed before it had written who it was: nothing to continue
    try:
        return bool(json.loads((path / "summary.json").read_text())["status"] != "finished")
    except (OSError, ValueError, KeyError):
        return True


def _claim(path: Path, *, resumed: bool, config_hash: str | None) -> RunFolder:
    lock = try_hold(path / "lock", holder=f"process {os.getpid()} on {socket.gethostname()}")
    if lock is None:
        holder = (path / "lock").read_text().strip() or "another process"
        raise UserError(f"{path} is in use by {holder}; wait for it, stop it, or choose another run_dir")
    if config_hash is not None:
        temporary = path / f".{IDENTITY}.tmp"
        temporary.write_text(json.dumps({"config_hash": config_hash}) + "\n")
        os.replace(temporary, path / IDENTITY)
    return RunFolder(path=path, resumed=resumed, lock=lock)
