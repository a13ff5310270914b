"""A run's checkpoints as a whole: the state of the trainer and of the rollout source."""

from collections.abc import Callable
from pathlib import Path

from atropos_exp.interfaces import PolicyTrainer, RolloutSource
from atropos_exp.runs.checkpoints import Checkpoints


class Snapshots:
    """The `Checkpointer` of a run, over `Checkpoints`."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        *,
        trainer: PolicyTrainer,
        source: RolloutSource,
        describe: Callable[[Path], None],
        is_zero: bool,
    ) -> None:
        """`describe(target)` adds what makes weights a model that others load: config, tokenizer."""
        self._checkpoints = checkpoints
        self._trainer = trainer
        self._source = source
        self._describe = describe
        self._is_zero = is_zero
        self.resumed_from: str | None = None
        self.is_restored = False  # from then on the run goes on from where it is
        self._saved_step: int | None = None

    def restore(self) -> int:
        """Load the newest intact checkpoint; returns the number of finished steps, 0 for a new run."""
        newest = self._checkpoints.latest()
        if newest is not None:
            self._trainer.load(newest.folder)
            self._source.restore(newest.state["source"])
            self.resumed_from = newest.folder.name
            self._saved_step = newest.step
        self.is_restored = True
        return newest.step if newest is not None else 0

    def save(self, step: int) -> None:
        """Save trainer and source after `step` finished steps, unless that is done already."""
        if step == self._saved_step:
            return
        self._checkpoints.save(step, self._write, {"source": self._source.state()})
        self._saved_step = step

    def _write(self, folder: Path) -> None:
        self._trainer.save(folder)
        if self._is_zero:
            self._describe(folder / "model")
