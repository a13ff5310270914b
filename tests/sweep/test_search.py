"""A real search with two workers: one is killed, none of its work is lost, and the total is exact and can be raised."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from atropos_exp.runs.sweep_folder import SweepFolder
from tests.sweep.test_local import assert_nothing_is_left

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STEPS = 12
BAD = 0.03  # a learning rate after whose first step no answer is right
# This seed draws the bad rate for trials 2 and 4, and no other of the first five.
LINE = (
    "-m", "sweep=optuna", f"trainer.learning_rate=1e-5,{BAD}", "loss.clip_high=interval(0.1,0.3)", "sweep.parallel=2",
    "sweep.sampler_seed=61", "sweep.min_steps=1", "sweep.reduction_factor=2", "sweep.dir=found", "eval.every=1",
    f"trainer.max_steps={STEPS}", "eval.samples_per_prompt=0",
)  # fmt: skip


def study_of(sweep: SweepFolder) -> list[optuna.trial.FrozenTrial]:
    storage = JournalStorage(JournalFileBackend(str(sweep.path / "optuna.journal")))
    return optuna.load_study(study_name="sweep", storage=storage).get_trials()


def accuracies(sweep: SweepFolder, number: int) -> dict[int, float]:
    """Of trained policies, by step."""
    rows = map(json.loads, (sweep.run_folder(number) / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["eval/arithmetic/accuracy"] for row in rows if row["step"]}


@pytest.fixture(scope="module")
def search(line: Any) -> dict[str, Any]:
    """Four trials, in the middle of which a worker is killed; then a fifth."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sweep = SweepFolder(line.folder / "found")
    first = line.sweep(*LINE, "sweep.trials=4", "sweep.wait=false")
    assert first.returncode == 0, first.stdout + first.stderr

    def events(kind: str) -> list[dict[str, Any]]:
        return [event for event in sweep.events() if event["event"] == kind]

    line.wait_until(lambda: events("trial started"), "a trial starts")
    begun = events("trial started")[0]
    number, worker = begun["number"], begun["worker"]
    line.wait_until((sweep.run_folder(number) / "metrics.jsonl").exists, "it trains")
    (pid,) = (event["pid"] for event in events("started") if event["number"] == worker)
    os.kill(pid, signal.SIGKILL)
    waited = line.after("wait", "found")
    states = {trial.number: trial for trial in study_of(sweep)}
    more = line.sweep(*LINE, "sweep.trials=5")
    return {"sweep": sweep, "killed": number, "waited": waited, "four": states, "more": more}


def test_a_killed_worker_costs_no_trial(search: dict[str, Any]) -> None:
    sweep, waited = search["sweep"], search["waited"]
    assert waited.returncode == 0, waited.stdout + waited.stderr
    assert sorted(search["four"]) == [0, 1, 2, 3], "exactly the total, though a worker died and the other did its work"
    starts = [event["number"] for event in sweep.events() if event["event"] == "trial started"]
    assert starts.count(search["killed"]) == 2
    assert len(starts) == 6, "four trials, a second start of the killed one, and the fifth"


def test_the_study_says_what_the_runs_recorded(search: dict[str, Any]) -> None:
    trials = study_of(search["sweep"])
    assert len(trials) == 5
    for trial in trials:
        found = accuracies(search["sweep"], trial.number)
        assert trial.intermediate_values == found
        if trial.state is TrialState.COMPLETE:
            assert (max(found), trial.value) == (STEPS, found[STEPS])
        else:
            assert trial.state is TrialState.PRUNED
            assert max(found) < STEPS
        config = json.loads(json.dumps(trial.params))
        frozen = search["sweep"].config_path(trial.number).read_text()
        assert f"clip_high: {config['loss.clip_high']}" in frozen


def test_what_lags_behind_is_pruned(search: dict[str, Any]) -> None:
    by_rate = {trial.number: json.loads(trial.params["trainer.learning_rate"]) for trial in study_of(search["sweep"])}
    assert by_rate == {0: 1e-5, 1: 1e-5, 2: BAD, 3: 1e-5, 4: BAD}
    for trial in study_of(search["sweep"]):
        if by_rate[trial.number] == BAD:
            assert trial.state is TrialState.PRUNED
            assert set(trial.intermediate_values.values()) == {0.0}


def test_more_trials_are_added_to_a_finished_search(search: dict[str, Any]) -> None:
    more = search["more"]
    assert more.returncode == 0, more.stdout + more.stderr
    assert "004 learning_rate=0.03" in more.stdout
    assert "000 " not in [word[:4] for word in more.stdout.splitlines() if "running" in word]
    for number, trial in search["four"].items():
        now = study_of(search["sweep"])[number]
        assert (now.state, now.value, now.datetime_complete) == (trial.state, trial.value, trial.datetime_complete)
    assert_nothing_is_left(search["sweep"])


def test_the_report_names_the_best_and_its_limits(search: dict[str, Any]) -> None:
    text = (search["sweep"].path / "report.html").read_text()
    trials = [trial for trial in study_of(search["sweep"]) if trial.state is TrialState.COMPLETE]
    best = max(trials, key=lambda trial: trial.value)
    finished = f"The best of {len(trials)} finished trials is "
    assert finished in text
    named = text.split(finished)[1].split(",")[0]
    assert f"{best.value:.3g}; " in text.split(finished)[1][:200]
    assert next(trial for trial in trials if trial.number == int(named.split(":")[0])).value == best.value
    assert "its value is optimistic and its lead unproven" in text
