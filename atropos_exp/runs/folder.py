"""The folder of one run: a new one, or the unfinished one of the same configuration. One writer at a time."""

import json
import os
import shutil
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO

from atropos_exp.errors import UserError
from atropos_exp.processes.locks import is_held, try_hold
from atropos_exp.runs.atomic import write_atomic
from atropos_exp.runs.files import run_status

IDENTITY = "run.json"  # written first: the configuration whose run the folder holds
SUBMITTED = Path("slurm") / "submitted.json"  # likewise, of a run that waits in a queue and has not begun
LOCK = "lock"  # held while a process works on the run
# What a start writes into the folder of a run before the run begins or goes on.
REWRITTEN = (LOCK, IDENTITY, "config.yaml", "command.txt", "quarantine.jsonl")
# What may be in a folder before a run has written whose it is: of a sweep, a queue, a start that was killed; or
# journals that it is given.
_EARLY = {LOCK, "slurm", "log", "rollouts", "trial_end.json"}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFolder:
    """The folder of a run, held by this process."""

    path: Path
    resumed: bool  # the folder existed and held this configuration's unfinished run
    lock: IO[str] | None  # rank 0: held until the process ends; the kernel frees it even after kill -9
    made: tuple[Path, ...] = ()  # the folders that were made for it, the innermost first
    before: Mapping[str, bytes] = field(default_factory=dict)  # of REWRITTEN, what was there

    def withdraw(self) -> None:
        """Undo what the start of a run has written that was then refused: a new folder goes, one that is continued has
        its files as they were."""
        if not self.resumed:
            shutil.rmtree(self.path, ignore_errors=True)
            if not self.made:
                self.path.mkdir(exist_ok=True)  # the user's own, which was empty
            with suppress(OSError):  # another run has made use of them
                for folder in self.made[1:]:
                    folder.rmdir()
            return
        for name in REWRITTEN:
            path = self.path / name
            if name in self.before:
                path.write_bytes(self.before[name])
            else:
                path.unlink(missing_ok=True)


def open_run_folder(*, output_dir: Path, name: str, run_dir: str | None, resume: str, config_hash: str) -> RunFolder:
    """Find the folder of a run or make a new one, lock it, and write whose it is. See `find_run_folder`.

    folder = open_run_folder(
        output_dir=Path("outputs"), name="demo", run_dir=None, resume="auto", config_hash=config_hash(config)
    )  # outputs/demo/2025-01-31/12-00-00, and folder.resumed says whether it holds an unfinished run
    """
    base = output_dir.expanduser() / name
    path = find_run_folder(base=base, run_dir=run_dir, resume=resume, config_hash=config_hash)
    place = base if path is None else path
    there = {one for one in (place, *place.parents, *(base.glob("*") if path is None else ())) if one.exists()}
    path = path or new_folder(base)
    path.mkdir(parents=True, exist_ok=True)
    made = tuple(one for one in (path, *path.parents) if one not in there)
    is_named = resume not in ("auto", "never")  # it keeps its identity, whatever the configuration is now
    return _claim(path, made=made, config_hash=None if is_named else config_hash)


def find_run_folder(
    *, base: Path, run_dir: str | None, resume: str, config_hash: str, submitted: bool = False
) -> Path | None:
    """The folder that a command names, or that holds the unfinished run of its configuration; None for a new one.

    `resume=auto` continues the newest unfinished run of the same configuration among `base`/<date>/<time>;
    `never` starts a new one; a path continues exactly that folder, whatever its configuration.
    `run_dir` fixes the folder; with `resume=auto` it is continued if it holds this configuration.
    Raises UserError if the folder that is named cannot be used.

    `submitted`: the run is for a scheduler. Then a folder counts from its submission on, and one whose job waits or
    runs is found too, so that the caller can say so; otherwise a run that a process is working on is passed over.
    """
    if resume not in ("auto", "never"):
        path = Path(resume).expanduser()
        if path.parent.name == "checkpoints" and (path.parents[1] / IDENTITY).is_file():
            raise UserError(
                f"resume: {path} is a checkpoint; resume={path.parents[1]} continues its run, from the newest one"
            )
        if not (path / IDENTITY).is_file():
            raise UserError(f"resume: {path} is not a run folder (no {IDENTITY} in it); give one, or auto, or never")
        return path
    if run_dir is not None:
        path = Path(run_dir).expanduser()
        found = _identity(path, submitted)
        if found is not None and resume == "never":
            raise UserError(f"run_dir: {path} already holds a run; choose another, or resume=auto to continue it")
        if found is None and (own := _foreign(path)):
            raise UserError(f"run_dir: {path} is no run folder, and holds {own}; choose a new or an empty folder")
        if found is not None and found != config_hash:
            raise UserError(
                f"run_dir: {path} holds a run of another configuration; choose another folder, "
                f"or resume={path} to continue that run under this configuration"
            )
        if found is not None and not _is_unfinished(path):
            raise UserError(f"run_dir: the run in {path} is finished; choose another folder, or read its report")
        return path
    for path in sorted(base.glob("*/*"), reverse=True) if resume == "auto" else ():
        is_ours = _identity(path, submitted) == config_hash and _is_unfinished(path)
        if is_ours and (submitted or not is_held(path / LOCK)):
            return path
    return None


def new_folder(base: Path, *, what: str = "runs", setting: str = "run_dir") -> Path:
    """Make `base`/<date>/<time>, which has never existed before. `what` and `setting` are for the error message."""
    now = datetime.now()
    stem = base / now.strftime("%Y-%m-%d") / now.strftime("%H-%M-%S")
    for suffix in ("", *(f"-{number}" for number in range(2, 100))):
        path = stem.with_name(stem.name + suffix)
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise UserError(f"{stem}: 99 {what} started in the same second; set {setting}")


def _identity(path: Path, submitted: bool) -> str | None:
    """The hash of the configuration whose run `path` holds or, if `submitted`, is to hold."""
    for name in (Path(IDENTITY), SUBMITTED) if submitted else (Path(IDENTITY),):
        try:
            return str(json.loads((path / name).read_text())["config_hash"])
        except (OSError, ValueError, KeyError):
            continue  # killed before it had written whose it was: nothing to continue
    return None


def _is_unfinished(path: Path) -> bool:
    return run_status(path)[0] != "finished"


def _foreign(path: Path) -> str:
    """What `path` holds that no run has put there, as a clause; "" for nothing, or no folder."""
    names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    foreign = [name for name in names if name not in _EARLY]
    return f"{foreign[0]}{f' and {len(foreign) - 1} more' if foreign[1:] else ''}" if foreign else ""


def _claim(path: Path, *, made: tuple[Path, ...], config_hash: str | None) -> RunFolder:
    resumed = (path / IDENTITY).is_file()
    before = {name: (path / name).read_bytes() for name in REWRITTEN if resumed and (path / name).is_file()}
    lock = try_hold(path / LOCK, holder=f"process {os.getpid()} on {socket.gethostname()}")
    if lock is None:
        holder = (path / LOCK).read_text().strip() or "another process"
        raise UserError(f"{path} is in use by {holder}; wait for it, stop it, or choose another run_dir")
    if config_hash is not None:
        write_atomic(path / IDENTITY, json.dumps({"config_hash": config_hash}) + "\n")
    return RunFolder(path=path, resumed=resumed, lock=lock, made=made, before=before)
