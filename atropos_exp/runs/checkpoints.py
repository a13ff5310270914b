"""Checkpoints that survive a crash at any moment: written aside, hashed, flushed, renamed, then old ones removed.

    checkpoints/step_000010/         a checkpoint: what the trainer wrote + manifest.json
    checkpoints/tmp.step_000012.…    being written or removed, or left so by a crash; never read
    checkpoints/old.step_000010.…    being replaced by a newer one of the same step; read only if that is missing

One process writes to a folder at a time; any number may read it.
"""

import logging
import re
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from atropos_exp.errors import UserError
from atropos_exp.interfaces import JSON
from atropos_exp.processes.ranks import ALONE, Ranks
from atropos_exp.runs import manifest
from atropos_exp.runs.atomic import fsync
from atropos_exp.runs.manifest import DamagedError

Value = TypeVar("Value")
_NAME = re.compile(r"(old\.)?step_(\d{6,})(\.[0-9a-f]+)?")
_logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written. The earlier ones are untouched."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose every file has been verified."""

    folder: Path
    step: int  # finished steps
    state: JSON  # as given to `Checkpoints.save`


class Checkpoints:
    """The checkpoints of one run. With several ranks every method is collective.

    Rank 0 alone touches the disk, apart from what `write` does. `damaged` lists, after `latest`, what was skipped and
    why.

        checkpoints = Checkpoints(run_folder / "checkpoints", keep=2)
        checkpoints.save(10, trainer.save, {"source": source.state()})
        newest = checkpoints.latest()  # newest.step == 10
    """

    def __init__(self, folder: Path, *, keep: int, ranks: Ranks = ALONE) -> None:
        if keep < 1:
            raise UserError(f"the number of checkpoints to keep must be at least 1; got {keep}")
        self.folder = folder
        self.damaged: dict[Path, str] = {}
        self._keep = keep
        self._ranks = ranks

    def save(self, step: int, write: Callable[[Path], None], state: JSON) -> Path:
        """Publish `step_<step>` with what `write` puts into the folder it is given, and `state`; returns its path.

        `write` is called on every rank with the same folder (`PolicyTrainer.save`); it must end its collective
        operations on all ranks before it raises. As many bytes as the newest checkpoint has must be free on the disk.
        Raises CheckpointError on every rank if rank 0 met an I/O error; any other error of `write` passes through.
        """
        temporary = self._on_rank_0(lambda: self._begin(step))
        failure: Exception | None = None
        try:
            write(temporary)
        except Exception as error:
            if not self._ranks.is_zero:
                raise
            failure = error  # the other ranks must hear of it before this one leaves

        def publish() -> Path:
            if failure is not None:
                raise failure
            return self._publish(temporary, step, state)

        try:
            return self._on_rank_0(publish)
        finally:
            if self._ranks.is_zero:
                shutil.rmtree(temporary, ignore_errors=True)  # gone already if it was published

    def latest(self) -> Checkpoint | None:
        """Return the newest checkpoint whose every file is intact; damaged ones are logged and skipped, not removed."""

        def search() -> Checkpoint | None:
            found, self.damaged = find_latest(self.folder)
            return found

        return self._on_rank_0(search)

    def _begin(self, step: int) -> Path:
        created = not self.folder.is_dir()
        self.folder.mkdir(parents=True, exist_ok=True)
        if created:
            fsync(self.folder.parent)
        for leftover in self.folder.glob("tmp.*"):
            _remove(leftover)
        needed = self._size_of_newest()
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise CheckpointError(
                f"no room for the checkpoint of step {step}: {self.folder} has {free / 1e9:.2f} GB free, "
                f"it needs {needed / 1e9:.2f} GB. Free some space, or keep fewer checkpoints (now {self._keep})"
            )
        temporary = self.folder / f"tmp.step_{step:06d}.{uuid.uuid4().hex}"
        temporary.mkdir()
        return temporary

    def _publish(self, temporary: Path, step: int, state: JSON) -> Path:
        manifest.seal(temporary, {"step": step, "state": state})
        final = self.folder / f"step_{step:06d}"
        if final.exists():  # of an earlier attempt; stays readable until the new one is in place
            final.rename(self.folder / f"old.{final.name}.{uuid.uuid4().hex}")
        temporary.rename(final)
        fsync(self.folder)
        self._rotate(step)
        return final

    def _rotate(self, step: int) -> None:
        """Remove all but the newest `keep` up to `step`, which is on the disk now. A failure costs space only."""
        older = [entry for entry in _list(self.folder) if entry[0] <= step]
        whole = [folder for _, replaced, folder in older if not replaced and folder not in self.damaged]
        for _, _, folder in older:
            if folder not in whole[: self._keep]:
                _remove(folder)
                self.damaged.pop(folder, None)

    def _size_of_newest(self) -> int:
        for _, _, folder in _list(self.folder):
            with suppress(DamagedError):
                return manifest.num_bytes(folder)
        return 0

    def _on_rank_0(self, work: Callable[[], Value]) -> Value:
        """Run `work` on rank 0 and give every rank its result, or every rank its error."""

        def checked() -> Value:
            try:
                return work()
            except Exception as error:
                # safetensors wraps the operating system's error in a class of its own, which is no OSError
                if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
                    raise CheckpointError(f"could not write a checkpoint to {self.folder}: {error}") from error
                raise

        try:
            return self._ranks.on_zero(checked)
        except UserError as error:
            if self._ranks.is_zero:
                raise
            raise CheckpointError(str(error)) from error


def open_checkpoint(folder: Path) -> Checkpoint:
    """Verify and return the checkpoint in `folder`. Raises DamagedError with the file that is missing or changed."""
    about = manifest.verify(folder)
    return Checkpoint(folder=folder, step=about["step"], state=about["state"])


def find_latest(folder: Path) -> tuple[Checkpoint | None, dict[Path, str]]:
    """Return the newest intact checkpoint under `folder`, and the damaged ones that are newer, with the reason. Only
    reads.
    """
    damaged: dict[Path, str] = {}
    for _, _, candidate in _list(folder):
        try:
            return open_checkpoint(candidate), damaged
        except DamagedError as error:
            damaged[candidate] = str(error)
            _logger.warning("skipping the damaged checkpoint %s: %s", candidate, error)
    return None, damaged


def newest_step(folder: Path) -> int:
    """Return the step of the newest checkpoint under `folder`, intact or not; 0 if there is none."""
    return max((step for step, _, _ in _list(folder)), default=0)


def _list(folder: Path) -> list[tuple[int, bool, Path]]:
    """(step, being replaced, folder), newest step first, and of one step the replacement first."""
    entries = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            entries.append((int(match[2]), match[1] is not None, path))
    return sorted(entries, key=lambda entry: (-entry[0], entry[1], entry[2]))


def _remove(folder: Path) -> None:
    """Under a `tmp.` name first: a removal that stops half way must not leave half a checkpoint behind."""
    try:
        if not folder.name.startswith("tmp."):
            folder = folder.rename(folder.with_name(f"tmp.{folder.name}.{uuid.uuid4().hex}"))
        shutil.rmtree(folder)
    except OSError as error:
        _logger.warning("could not remove %s, which only costs space: %s", folder, error)
