"""The whole run, saved and restored: what the trainer owns and where the rollout source stands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from atropos_exp.runs.checkpoints import Checkpoints

if TYPE_CHECKING:
    from atropos_exp.interfaces import PolicyTrainer, RolloutSource


class Snapshots:
    """A `Checkpointer` over `Checkpoints`."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        *,
        trainer: PolicyTrainer,
        source: RolloutSource,
        model_folder: Path,
        describe: Callable[[Path, Path], None],
        is_zero: bool,
    ) -> None:
        """`describe(model_folder, target)` copies what makes weights a model that others load: config, tokenizer."""
        self._checkpoints = checkpoints
        self._trainer = trainer
        self._source = source
        self._model_folder = model_folder
        self._describe = describe
        self._is_zero = is_zero
        self.resumed_from: str | None = None
        self._saved_step: int | None = None

    def restore(self) -> int:
        newest = self._checkpoints.latest()
        if newest is None:
            return 0
        self._trainer.load(newest.folder)
        self._source.restore(newest.state["source"])
        self.resumed_from = newest.folder.name
        self._saved_step = newest.step
        return newest.step

    def save(self, step: int) -> None:
        if step == self._saved_step:
            return
        self._checkpoints.save(step, self._write, {"source": self._source.state()})
        self._saved_step = step

    def _write(self, folder: Path) -> None:
        self._trainer.save(folder)
        if self._is_zero:
            self._describe(self._model_folder, folder / "model")
