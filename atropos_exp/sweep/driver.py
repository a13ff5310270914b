"""A sweep from its plan to its last run: make or find its folder, submit what is left, watch, stop."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from atropos_exp.assembly.options import ClusterPart
from atropos_exp.config.build import build, refuse_moved
from atropos_exp.config.freeze import config_hash, freeze_config
from atropos_exp.errors import UserError
from atropos_exp.runs.folder import new_folder
from atropos_exp.runs.redaction import redact
from atropos_exp.runs.sweep_backend import Backend, Job
from atropos_exp.runs.sweep_folder import (
    REQUEST,
    Phase,
    Request,
    RunRecord,
    RunState,
    SweepFolder,
    describe_point,
    read_trial_end,
)
from atropos_exp.sweep.commands import run_command, worker_command
from atropos_exp.sweep.local import LocalBackend
from atropos_exp.sweep.plan import Plan
from atropos_exp.sweep.search import prepare_study, trial_is_claimed
from atropos_exp.sweep.settings import OptunaSweep

POLL_SECONDS = 1.0
Watcher = Callable[["Sweep"], None]  # shows how the sweep stands; called until it ends


class Sweep:
    """A sweep that exists on disk, with the backend that executes it.

    sweep = Sweep(SweepFolder.open(path))
    sweep.submit(attached=True)
    sweep.wait(watch)
    """

    def __init__(self, folder: SweepFolder) -> None:
        self.folder = folder
        self.request = folder.request()
        refuse_moved({"sweep": self.request.settings, "cluster": self.request.cluster}, folder.path / REQUEST)
        self.settings = build(self.request.settings, "sweep")
        self.backend = _backend(folder, self.request, self.settings)

    @property
    def is_search(self) -> bool:
        """Whether workers draw the runs from a search; otherwise they are the points of a grid."""
        return isinstance(self.settings, OptunaSweep)

    def states(self) -> dict[int, RunState]:
        """Return the state of every run (in a search: trial) of the manifest, by number."""
        if not self.is_search:
            return self.folder.states(self.backend.states())
        events = self.folder.events()
        return {record.number: self._trial_state(record, events) for record in self.folder.records()}

    def is_active(self) -> bool:
        """Whether a job waits or runs."""
        return any(state.phase.is_open for state in self.backend.states().values())

    def is_complete(self) -> bool:
        """Whether nothing is left to do."""
        states = self.states()
        if self.is_search:
            return sum(state.phase.is_done for state in states.values()) >= int(self.settings.trials)
        return all(state.phase.is_done for state in states.values())

    def submit(self, *, attached: bool) -> int:
        """Start every run that is unfinished or failed, and no finished one. Returns the number of jobs."""
        jobs = self._worker_jobs() if self.is_search else self._run_jobs()
        if jobs:
            self.backend.submit(jobs, attached=attached)
        return len(jobs)

    def wait(self, watch: Watcher, *, timeout_s: float | None = None) -> bool:
        """Wait until no job runs any more; False if `timeout_s` is over before."""
        deadline = time.monotonic() + (timeout_s if timeout_s is not None else float("inf"))
        while self.is_active():
            watch(self)
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        watch(self)
        return True

    def _run_jobs(self) -> list[Job]:
        states = self.states()
        left = [record for record in self.folder.records() if not states[record.number].phase.is_done]
        return [
            Job(
                number=record.number, name=f"{self.request.name} {record.folder}",
                command=run_command(self.folder, record.number), cwd=Path(self.request.cwd),
                log=self.folder.log_path(record.folder), run_folder=self.folder.run_folder(record.number),
                num_devices=record.num_devices,
            )
            for record in left
        ]  # fmt: skip

    def _worker_jobs(self) -> list[Job]:
        left = self.settings.trials - sum(state.phase.is_done for state in self.states().values())
        return [
            Job(
                number=number, name=f"{self.request.name} worker {number}",
                command=worker_command(self.folder, number), cwd=Path(self.request.cwd),
                log=self.folder.log_path(f"worker_{number}"), run_folder=self.folder.path / f"worker_{number}",
            )
            for number in range(min(self.settings.parallel, left))
        ]  # fmt: skip

    def _trial_state(self, record: RunRecord, events: Sequence[Mapping[str, Any]]) -> RunState:
        mine = [event for event in events if event["number"] == record.number]
        started = [event["time"] for event in mine if event["event"] == "trial started"]
        times: dict[str, Any] = {"started": started[-1] if started else None}
        end = read_trial_end(self.folder.run_folder(record.number))
        if end is not None:
            ended = [event["time"] for event in mine if event["event"] == "trial ended"]
            return RunState(phase=end.phase, reason=end.reason, ended=ended[-1] if ended else None, **times)
        if trial_is_claimed(self.folder, record.number):
            return RunState(phase=Phase.RUNNING, **times)
        return RunState(phase=Phase.STOPPED, reason="its worker ended first; resuming the sweep continues it", **times)


def open_or_create(plan: Plan, command: Sequence[str], cwd: Path) -> SweepFolder:
    """Return the folder of the newest sweep over exactly these runs, or a new one with all of them frozen in it."""
    own_request = Request(
        kind="optuna" if plan.search is not None else "grid", identity=plan.identity, name=plan.name,
        created=datetime.now().isoformat(timespec="seconds"), command=[redact(word) for word in command],
        cwd=str(cwd), axes=[axis.lstrip("+") for axis in plan.axes], baseline=plan.baseline,
        settings=plan.settings_node, cluster=plan.cluster_node,
    )  # fmt: skip
    found = _find(plan)
    if found is not None:
        found.write_request(replace(own_request, created=found.request().created))
        _freeze(found, plan)  # what an interrupted start left out
        return found
    sweep = SweepFolder(_new_folder(plan))
    sweep.write_request(own_request)
    _freeze(sweep, plan)
    return sweep


def run_sweep(plan: Plan, command: Sequence[str], watch: Watcher, finish: Callable[[Sweep], None]) -> int:
    """Do the plan, or what is left of it. Returns the exit code: 0 if nothing is left (or `wait` is false), else 1."""
    folder = open_or_create(plan, command, Path.cwd())
    sweep = Sweep(folder)
    num_jobs = sweep.submit(attached=plan.settings.wait)
    print(f"Sweep: {folder.path}", flush=True)
    if not num_jobs:
        print("Nothing is left to do: all its runs are finished (resume=never starts them afresh)", flush=True)
    elif not plan.settings.wait:
        print(f"{num_jobs} {'workers' if sweep.is_search else 'runs'} queued. "
              f"python -m atropos_exp.sweep status|wait|cancel {folder.path}", flush=True)  # fmt: skip
        return 0
    return attend(sweep, watch, finish)


def attend(sweep: Sweep, watch: Watcher, finish: Callable[[Sweep], None]) -> int:
    """Wait for all jobs, then call `finish`. Returns the exit code: 0 if nothing is left to do, else 1.

    Ctrl-C stops the jobs, which save first; a second one kills them.
    """
    interrupted = False
    while True:
        try:
            sweep.wait(watch)
            break
        except KeyboardInterrupt:
            if interrupted:
                sweep.backend.kill()
                break
            interrupted = True
            print("\nRuns finish their step and save (Ctrl-C again: kill them)", file=sys.stderr, flush=True)
            sweep.backend.cancel()
    finish(sweep)
    if interrupted:
        return 130
    return 0 if sweep.is_complete() else 1


def _backend(folder: SweepFolder, request: Request, settings: Any) -> Backend:
    """The cluster's own queue, if it has one; else this machine."""
    cluster: ClusterPart = build(request.cluster, "cluster")
    if cluster.queue is not None:
        return cluster.queue.sweep_backend(folder, settings)
    timeout_minutes = None if isinstance(settings, OptunaSweep) else settings.timeout_minutes  # workers see to theirs
    return LocalBackend(
        folder, num_slots=settings.parallel, devices=settings.devices,
        timeout_s=timeout_minutes * 60 if timeout_minutes is not None else None,
        # a worker needs its own grace to wait for its run
        grace_s=settings.stop_grace_s + (30.0 if isinstance(settings, OptunaSweep) else 0.0),
    )  # fmt: skip


def _find(plan: Plan) -> SweepFolder | None:
    if plan.resume == "never":
        return None
    if plan.resume != "auto":
        found = SweepFolder.open(Path(plan.resume).expanduser())
        if found.request().identity != plan.identity:
            raise UserError(f"resume: {found.path} is a sweep over other runs; python -m atropos_exp.sweep resume "
                            f"{found.path} continues it as it was")  # fmt: skip
        return found
    if plan.settings.dir is not None:
        candidates = [Path(plan.settings.dir).expanduser()]
    else:
        base = Path(plan.output_dir).expanduser() / "sweeps" / plan.name
        candidates = sorted((file.parent for file in base.glob("*/*/sweep.json")), reverse=True)
    for path in candidates:
        if (path / "sweep.json").is_file() and SweepFolder.open(path).request().identity == plan.identity:
            return SweepFolder.open(path)
    return None


def _new_folder(plan: Plan) -> Path:
    if plan.settings.dir is not None:
        path = Path(plan.settings.dir).expanduser()
        if path.exists() and any(path.iterdir()):
            raise UserError(f"sweep.dir: {path} is not empty, and holds no sweep over these runs; choose another")
        path.mkdir(parents=True, exist_ok=True)
        return path.absolute()
    base = Path(plan.output_dir).expanduser() / "sweeps" / plan.name
    return new_folder(base, what="sweeps", setting="sweep.dir").absolute()


def _freeze(sweep: SweepFolder, plan: Plan) -> None:
    if plan.search is not None:
        assert isinstance(plan.settings, OptunaSweep)
        prepare_study(sweep, plan.search, plan.settings)
        return
    known = {record.number for record in sweep.records()}
    for number, run in enumerate(plan.runs):
        if number in known:
            continue
        config = run.config
        freeze_config(config, sweep.config_path(number), run_dir=sweep.run_folder(number))
        sweep.add_record(
            RunRecord(
                number=number, point=run.point, values=dict(run.values), seed=run.seed,
                config_hash=config_hash(config), max_steps=run.checked.parts.trainer.max_steps,
                num_devices=run.checked.sizes.world_size,
            )
        )  # fmt: skip


def unfinished(sweep: Sweep) -> Mapping[str, str]:
    """Return label -> reason of the runs that are not done and will not be without another start."""
    states = sweep.states()
    return {
        f"{record.folder} {describe_point(record.values)}, seed={record.seed}": f"{states[record.number].phase}: "
        f"{states[record.number].reason or 'no reason is known'}"
        for record in sweep.folder.records()
        if not states[record.number].phase.is_done and not states[record.number].phase.is_open
    }
