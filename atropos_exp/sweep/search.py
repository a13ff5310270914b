"""The Optuna study of a search: a journal file that all workers share, and the claims to its trials."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from atropos_exp.errors import UserError
from atropos_exp.processes.locks import held, is_held, try_hold
from atropos_exp.runs.seeds import derive_seed
from atropos_exp.runs.sweep_folder import SweepFolder
from atropos_exp.sweep.axes import Interval
from atropos_exp.sweep.search_space import SearchPlan
from atropos_exp.sweep.settings import OptunaSweep

if TYPE_CHECKING:
    import optuna

JOURNAL = "optuna.journal"
SPACE = "search.json"
STUDY = "sweep"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A trial that this process alone may run, until it closes `lock` or dies."""

    trial: optuna.Trial
    values: Mapping[str, Any]
    lock: IO[str]


class Search:
    """The study of a sweep, as one worker sees it."""

    def __init__(self, sweep: SweepFolder, settings: OptunaSweep) -> None:
        self._sweep = sweep
        self._settings = settings
        self.space = SearchPlan.from_json(json.loads((sweep.path / SPACE).read_text()))
        self.study = _open_study(sweep.path, settings)
        self._num_failed_before = self._num_failed()  # by earlier starts: somebody has looked at those

    def claim(self) -> Claim | None:
        """Claim the next trial: one that a dead worker left, else a new one; None when the total is reached.

        Raises UserError when too many trials have failed. Only one process at a time decides, so that the total is
        exact however many workers there are.
        """
        import optuna

        state = optuna.trial.TrialState
        with held(self._sweep.path / "optuna.lock"):
            trials = self.study.get_trials(deepcopy=False)
            for trial in trials:
                if trial.state is state.RUNNING and (lock := try_hold(_lock_of(self._sweep, trial.number))) is not None:
                    return self._claimed(optuna.Trial(self.study, trial._trial_id), lock)
            num_failed = self._num_failed()
            num_new = num_failed - self._num_failed_before
            if num_new > self._settings.max_failed_trials:
                raise UserError(f"{num_new} trials failed, more than sweep.max_failed_trials="
                                f"{self._settings.max_failed_trials}: the search ends")  # fmt: skip
            if len(trials) - num_failed >= self._settings.trials:
                return None
            # A sampler of its own for each trial: workers and later starts must not draw the same numbers.
            seed = derive_seed(self._settings.sampler_seed, "trial", len(trials))
            self.study.sampler = _sampler(self._settings, seed)
            asked = self.study.ask()
            new_lock = try_hold(_lock_of(self._sweep, asked.number))
            assert new_lock is not None, "nobody else knows of this trial"
            return self._claimed(asked, new_lock)

    def _num_failed(self) -> int:
        return sum(trial.state.name == "FAIL" for trial in self.study.get_trials(deepcopy=False))

    def _claimed(self, trial: optuna.Trial, lock: IO[str]) -> Claim:
        values = {key: _suggest(trial, key, item) for key, item in self.space.space.items()}
        return Claim(trial=trial, values=values, lock=lock)


def prepare_study(sweep: SweepFolder, plan: SearchPlan, settings: OptunaSweep) -> None:
    """Create the study and write its space. To be called once, before there are workers."""
    path = sweep.path / SPACE
    if not path.exists():
        path.write_text(json.dumps(plan.to_json()))
        path.chmod(0o600)  # configurations, whatever they hold
    _open_study(sweep.path, settings)


def trial_is_claimed(sweep: SweepFolder, number: int) -> bool:
    """Whether a living worker runs this trial."""
    return is_held(_lock_of(sweep, number))


def _lock_of(sweep: SweepFolder, number: int) -> Path:
    (sweep.path / "trials").mkdir(exist_ok=True)
    return sweep.path / "trials" / f"{number:03d}.lock"


def _open_study(folder: Path, settings: OptunaSweep) -> optuna.Study:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    optuna.logging.set_verbosity(logging.WARNING)
    path = str(folder / JOURNAL)
    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    if settings.prune:
        pruner = optuna.pruners.SuccessiveHalvingPruner(
            min_resource=settings.min_steps, reduction_factor=settings.reduction_factor
        )
    return optuna.create_study(
        study_name=STUDY, direction="maximize", load_if_exists=True, sampler=_sampler(settings, 0), pruner=pruner,
        storage=JournalStorage(JournalFileBackend(path, lock_obj=JournalFileOpenLock(path))),
    )  # fmt: skip


def _sampler(settings: OptunaSweep, seed: int) -> optuna.samplers.BaseSampler:
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # multivariate and constant_liar are "experimental" since 2020
        return optuna.samplers.TPESampler(
            seed=seed % 2**32, n_startup_trials=settings.startup_trials, multivariate=True, constant_liar=True
        )


def _suggest(trial: optuna.Trial, key: str, item: list[Any] | Interval) -> Any:
    """The same value again for a trial that has one. Choices go by their JSON, as Optuna takes no lists."""
    if not isinstance(item, Interval):
        labels = {json.dumps(choice): choice for choice in item}
        return labels[trial.suggest_categorical(key, list(labels))]
    if item.integer:
        return trial.suggest_int(key, int(item.low), int(item.high), log=item.log)
    return trial.suggest_float(key, item.low, item.high, log=item.log)
