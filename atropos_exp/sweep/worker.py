"""A worker of a search: claims trials until there are enough, and watches the run of each."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from atropos_exp.assembly.check import validate
from atropos_exp.config.build import build
from atropos_exp.config.freeze import config_hash, freeze_config
from atropos_exp.errors import UserError
from atropos_exp.processes.lifeline import dying_with_parent
from atropos_exp.runs.atomic import write_atomic
from atropos_exp.runs.files import Row, read_rows
from atropos_exp.runs.summary import eval_accuracy
from atropos_exp.runs.sweep_folder import TRIAL_END, Phase, RunRecord, SweepFolder, TrialEnd, outcome, read_trial_end
from atropos_exp.sweep.commands import run_command
from atropos_exp.sweep.search import Claim, Search
from atropos_exp.sweep.settings import OptunaSweep

POLL_SECONDS = 0.2


class Worker:
    """Runs one trial at a time.

    After SIGTERM the run finishes its step and saves, and the trial waits for the next worker.
    """

    def __init__(self, sweep: SweepFolder, settings: OptunaSweep, *, number: int) -> None:
        self._sweep = sweep
        self._settings = settings
        self._number = number
        self._search = Search(sweep, settings)
        self._stopping = False

    def work(self) -> int:
        """Run trials until the search has enough of them. Returns the exit code."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        while not self._stopping:
            claim = self._search.claim()
            if claim is None:
                return 0
            try:
                self._run(claim)
            finally:
                claim.lock.close()
        return 0

    def _stop(self, number: int, frame: object) -> None:
        self._stopping = True

    def _run(self, claim: Claim) -> None:
        number = claim.trial.number
        record = self._freeze(claim)
        log = self._sweep.log_path(record.folder)
        folder = self._sweep.run_folder(number)
        if (end := read_trial_end(folder)) is not None:  # its worker was killed before it could tell the study
            self._tell(claim, end)
            return
        print(f"trial {number}: {json.dumps(record.values)} -> {folder}", flush=True)
        started = time.time()
        self._sweep.note(event="trial started", number=number, time=started, worker=self._number)
        with log.open("ab") as output:
            process = subprocess.Popen(
                run_command(self._sweep, number), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True, preexec_fn=dying_with_parent(),
            )  # fmt: skip
        try:
            pruned_at, late = self._watch(claim, process, folder, record.max_steps)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        phase, reason = outcome(code=process.returncode, request=late, folder=folder, log=log, since=started)
        values = self._report(claim, folder, {})
        if phase is Phase.FINISHED:
            if values:
                self._end(claim, Phase.FINISHED, values[max(values)], "")
            else:
                self._end(claim, Phase.FAILED, None, f"it recorded no {self._settings.metric or 'held-out accuracy'}")
        elif pruned_at is not None and phase is Phase.STOPPED:
            self._end(claim, Phase.PRUNED, values[max(values)], f"behind the others at step {pruned_at}")
        elif self._stopping:  # the trial stays open; whoever claims it continues the run
            self._sweep.note(event="trial stopped", number=number, time=time.time())
        else:
            self._end(claim, Phase.FAILED, None, reason)

    def _freeze(self, claim: Claim) -> RunRecord:
        """Write the trial's configuration and its line of the manifest, unless an earlier worker did."""
        number = claim.trial.number
        found = [record for record in self._sweep.records() if record.number == number]
        if found and self._sweep.config_path(number).exists():
            return found[0]
        checked = validate(self._search.space.config(claim.values))
        freeze_config(checked.config, self._sweep.config_path(number), run_dir=self._sweep.run_folder(number))
        record = RunRecord(
            number=number, point=number, values={key.lstrip("+"): item for key, item in claim.values.items()},
            seed=checked.run.seed, config_hash=config_hash(checked.config),
            max_steps=checked.parts.trainer.max_steps, num_devices=checked.sizes.world_size,
        )  # fmt: skip
        if not found:
            self._sweep.add_record(record)
        return record

    def _watch(
        self, claim: Claim, process: subprocess.Popen[bytes], folder: Path, max_steps: int
    ) -> tuple[int | None, str]:
        """Until the run ends. The step at which it was ended for lagging behind, if so; and why it was too slow."""
        told: dict[int, float] = {}
        limit_s = 60 * (self._settings.timeout_minutes or float("inf"))
        deadline, kill_at = time.monotonic() + limit_s, float("inf")
        pruned_at, late = None, ""
        while process.poll() is None:
            told = self._report(claim, folder, told)
            step = max(told, default=0)
            if kill_at == float("inf"):
                if time.monotonic() > deadline:
                    late = f"timeout: it took more than {limit_s / 60:g} minutes"
                elif 0 < step < max_steps and claim.trial.should_prune():
                    pruned_at = step
                if late or pruned_at is not None or self._stopping:
                    process.send_signal(signal.SIGTERM)
                    kill_at = time.monotonic() + self._settings.stop_grace_s
            elif time.monotonic() > kill_at:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            time.sleep(POLL_SECONDS)
        return pruned_at, late

    def _report(self, claim: Claim, folder: Path, told: dict[int, float]) -> dict[int, float]:
        """Tell Optuna of evaluations that it does not know; all of them by step, the untrained policy's left out."""
        found = {row.step: value for row in read_rows(folder) if (value := self._value(row)) is not None}
        found.pop(0, None)
        for step in sorted(found.keys() - told.keys()):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a continued trial reports some steps again
                claim.trial.report(found[step], step)
        return found

    def _value(self, row: Row) -> float | None:
        return row.get(self._settings.metric) if self._settings.metric else eval_accuracy(row)

    def _end(self, claim: Claim, phase: Phase, value: float | None, reason: str) -> None:
        number, end = claim.trial.number, TrialEnd(phase=phase, value=value, reason=reason)
        write_atomic(self._sweep.run_folder(number) / TRIAL_END, json.dumps(asdict(end)) + "\n")
        self._sweep.note(event="trial ended", number=number, time=time.time(), **asdict(end))
        print(f"trial {number}: {phase} {'' if value is None else f'{value:.4g}'} {reason}".rstrip(), flush=True)
        self._tell(claim, end)

    def _tell(self, claim: Claim, end: TrialEnd) -> None:
        import optuna

        state = optuna.trial.TrialState
        told = {Phase.FINISHED: state.COMPLETE, Phase.PRUNED: state.PRUNED}.get(end.phase, state.FAIL)
        self._search.study.tell(claim.trial.number, end.value if told is state.COMPLETE else None, state=told)


def main(arguments: Sequence[str]) -> int:
    """Run `SWEEP NUMBER`. Returns the exit code: 0, or 2 with one message."""
    try:
        sweep = SweepFolder.open(Path(arguments[0]))
        return Worker(sweep, build(sweep.request().settings, "sweep"), number=int(arguments[1])).work()
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
