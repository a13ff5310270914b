"""A sweep from its plan to its last run: make or find its folder, submit what is left, watch, stop."""

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from atropos_exp.assembly.options import ClusterPart
from atropos_exp.config.build import build, refuse_moved
from atropos_exp.config.freeze import config_hash, freeze_config, resolved
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
        return self._num_left() <= 0

    def submit(self, *, attached: bool) -> int:
        """Start every run that is unfinished or failed, and no finished one. Returns the number of jobs."""
        if self.is_search:
            num_workers = min(self.settings.parallel, self._num_left())
            jobs = [
                self._job(number, f"worker_{number}", worker_command(self.folder, number))
                for number in range(num_workers)
            ]
        else:
            states = self.states()
            jobs = [
                self._job(record.number, record.folder, run_command(self.folder, record.number), record.num_devices)
                for record in self.folder.records()
                if not states[record.number].phase.is_done
            ]
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

    def _num_left(self) -> int:
        states = self.states()
        total = int(self.settings.trials) if self.is_search else len(states)
        return total - sum(state.phase.is_done for state in states.values())

    def _job(self, number: int, folder: str, command: list[str], num_devices: int = 1) -> Job:
        return Job(
            number=number, name=f"{self.request.name} {folder.replace('_', ' ')}", command=command,
            cwd=Path(self.request.cwd), log=self.folder.log_path(folder), run_folder=self.folder.path / folder,
            num_devices=num_devices,
        )  # fmt: skip

    def _trial_state(self, record: RunRecord, events: Sequence[Mapping[str, Any]]) -> RunState:
        times = {event["event"]: event["time"] for event in events if event["number"] == record.number}  # the last ones
        started = times.get("trial started")
        if (end := read_trial_end(self.folder.run_folder(record.number))) is not None:
            return RunState(phase=end.phase, reason=end.reason, started=started, ended=times.get("trial ended"))
        if trial_is_claimed(self.folder, record.number):
            return RunState(phase=Phase.RUNNING, started=started)
        lost = "its worker ended first; resuming the sweep continues it"
        return RunState(phase=Phase.STOPPED, reason=lost, started=started)


def open_or_create(plan: Plan, command: Sequence[str]) -> SweepFolder:
    """Return the folder of the newest sweep over exactly these runs, or a new one with all of them frozen in it."""
    found = _find(plan)
    folder = found or SweepFolder(_new_folder(plan))
    folder.write_request(
        Request(
            kind="optuna" if plan.search is not None else "grid", identity=plan.identity, name=plan.checked.run.name,
            created=found.request().created if found else datetime.now().isoformat(timespec="seconds"),
            command=[redact(word) for word in command], cwd=str(Path.cwd()),
            axes=[axis.lstrip("+") for axis in plan.axes], baseline=plan.baseline, settings=plan.settings_node,
            cluster=resolved(plan.checked.config)["cluster"],
        )
    )  # fmt: skip
    _freeze(folder, plan)  # of one that was found: what an interrupted start left out
    return folder


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
    resume = plan.checked.run.resume
    if resume == "never":
        return None
    if resume != "auto":
        found = SweepFolder.open(Path(resume).expanduser())
        if found.request().identity != plan.identity:
            raise UserError(f"resume: {found.path} is a sweep over other runs; python -m atropos_exp.sweep resume "
                            f"{found.path} continues it as it was")  # fmt: skip
        return found
    if plan.settings.dir is not None:
        candidates = [Path(plan.settings.dir).expanduser()]
    else:
        candidates = sorted((file.parent for file in _base(plan).glob("*/*/sweep.json")), reverse=True)
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
    return new_folder(_base(plan), what="sweeps", setting="sweep.dir").absolute()


def _base(plan: Plan) -> Path:
    return Path(plan.checked.run.output_dir).expanduser() / "sweeps" / plan.checked.run.name


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
        record.label: f"{state.phase}: {state.reason or 'no reason is known'}"
        for record in sweep.folder.records()
        if not (state := states[record.number]).phase.is_done and not state.phase.is_open
    }
