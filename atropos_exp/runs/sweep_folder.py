"""The folder of one sweep: what was asked for, its runs, and their state.

sweep.json          the request: axes, baseline, settings, how it was started
manifest.jsonl      one line per run: its point, seed and overrides; written before it starts
configs/003.yaml    the frozen configuration of run 3; later edits of conf/ do not change it
003/                the run folder
events.jsonl        when runs were queued, started and ended, and why
log/003.log         what the run printed

sweep = SweepFolder.open(Path("outputs/sweeps/demo/2025-01-31/12-00-00"))
unfinished = [record for record in sweep.records() if run_status(sweep.run_folder(record.number))[0] != "finished"]
"""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from atropos_exp.errors import UserError
from atropos_exp.runs.atomic import write_atomic
from atropos_exp.runs.files import read_json_lines, run_status

REQUEST = "sweep.json"
TRIAL_END = "trial_end.json"  # of a run folder: what the search made of the run


class Phase(StrEnum):
    """The state of a run of a sweep."""

    PENDING = "pending"  # not started, or queued
    RUNNING = "running"
    FINISHED = "finished"  # reached its last step
    PRUNED = "pruned"  # a search ended it early, on purpose
    STOPPED = "stopped"  # ended well but early, on request
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"
    FAILED = "failed"
    KILLED = "killed"  # by a signal, or with the machine

    @property
    def is_open(self) -> bool:
        """Whether the run waits or runs, so that its state will still change by itself."""
        return self in (Phase.PENDING, Phase.RUNNING)

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do, so that resuming the sweep leaves this run alone."""
        return self in (Phase.FINISHED, Phase.PRUNED)


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a sweep was asked to do."""

    kind: str  # grid | optuna
    identity: str  # of the frozen configurations: the same command finds the same sweep
    name: str
    created: str  # ISO time
    command: list[str]
    cwd: str  # where relative paths of the configurations start
    axes: list[str]  # keys that differ between points
    baseline: int | None  # a point; None in a search
    settings: dict[str, Any]  # the node `sweep` of the configuration
    cluster: dict[str, Any]  # the node `cluster`, the same for all runs


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """One run of a sweep, as manifest.jsonl lists it."""

    number: int
    point: int  # runs of one point differ by their seed only
    values: dict[str, Any]  # axis -> value
    seed: int
    config_hash: str
    max_steps: int
    num_devices: int  # that it keeps busy

    @property
    def folder(self) -> str:
        """The name of the run's folder within the sweep's."""
        return f"{self.number:03d}"

    @property
    def label(self) -> str:
        """The run as people see it: its folder, its point, its seed."""
        return f"{self.folder} {describe_point(self.values)}, seed={self.seed}"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """The phase of a run, with the reason if it did not finish."""

    phase: Phase
    reason: str = ""
    started: float | None = None  # seconds since the epoch, of the last attempt
    ended: float | None = None
    seconds: float | None = None  # of its processes, over all attempts; None: as events.jsonl has it


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialEnd:
    """How a trial of a search ended: finished, pruned or failed, and its last value."""

    phase: Phase
    value: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class SweepFolder:
    """The files of one sweep."""

    path: Path

    @classmethod
    def open(cls, path: Path) -> SweepFolder:
        """Return the sweep in `path`. Raises UserError if there is none."""
        if not (path / REQUEST).is_file():
            raise UserError(f"{path} is not the folder of a sweep: it has no {REQUEST}")
        return cls(path.absolute())

    def request(self) -> Request:
        """Read sweep.json."""
        return Request(**json.loads((self.path / REQUEST).read_text()))

    def write_request(self, request: Request) -> None:
        """Write sweep.json."""
        write_atomic(self.path / REQUEST, json.dumps(asdict(request), indent=2) + "\n")

    def records(self) -> list[RunRecord]:
        """Return the runs by number, as far as they have been added to manifest.jsonl."""
        return [RunRecord(**line) for line in read_json_lines(self.path / "manifest.jsonl")[0]]

    def add_record(self, record: RunRecord) -> None:
        """Append a run to manifest.jsonl."""
        _append(self.path / "manifest.jsonl", asdict(record))

    def config_path(self, number: int) -> Path:
        """Return where the frozen configuration of run `number` lies."""
        return self.path / "configs" / f"{number:03d}.yaml"

    def run_folder(self, number: int) -> Path:
        """Return the run folder of run `number`."""
        return self.path / f"{number:03d}"

    def log_path(self, name: str) -> Path:
        """Return the log called `name`; its folder exists then."""
        (self.path / "log").mkdir(exist_ok=True)
        return self.path / "log" / f"{name}.log"

    def log_of(self, record: RunRecord) -> Path:
        """Return what the run printed, relative to the sweep; a cluster's launcher keeps it in the run folder."""
        own = Path("log") / f"{record.folder}.log"
        return own if (self.path / own).exists() else Path(record.folder) / "log" / "rank_0.log"

    def note(self, **event: Any) -> None:
        """Append one line to events.jsonl."""
        _append(self.path / "events.jsonl", event)

    def events(self) -> list[dict[str, Any]]:
        """Return the lines of events.jsonl, in order."""
        return read_json_lines(self.path / "events.jsonl")[0]

    def states(self, backend: Mapping[int, RunState]) -> dict[int, RunState]:
        """Return the state of every run by number.

        A run's own summary says whether it finished; otherwise `backend`, which executes the runs, says how it stands,
        and for runs that it does not know, their summaries do.
        """
        return {record.number: self._state(record, backend.get(record.number)) for record in self.records()}

    def _state(self, record: RunRecord, told: RunState | None) -> RunState:
        status, error = run_status(self.run_folder(record.number))
        if status == "finished":
            return replace(told or RunState(phase=Phase.FINISHED), phase=Phase.FINISHED, reason="")
        if told is not None:
            return told
        if status == "failed":
            return RunState(phase=Phase.FAILED, reason=error)
        return RunState(phase=Phase.STOPPED if status == "stopped" else Phase.PENDING)


def read_trial_end(folder: Path) -> TrialEnd | None:
    """Return how the search ended the trial in `folder`; None while it has not."""
    try:
        content = json.loads((folder / TRIAL_END).read_text())
    except (OSError, ValueError):
        return None
    return TrialEnd(phase=Phase(content["phase"]), value=content["value"], reason=content["reason"])


def outcome(*, code: int, request: str, folder: Path, log: Path, since: float) -> tuple[Phase, str]:
    """Return the phase of a run that has just ended, with the reason.

    `code`: of its process, negative for a signal. `request`: why it was asked to stop, "timeout ...", "cancelled ..."
    or "". `since`: when the attempt started, in seconds since the epoch; an older summary.json is not its own.
    """
    status, error = run_status(folder)
    try:
        fresh = (folder / "summary.json").stat().st_mtime >= since - 1
    except OSError:
        fresh = False
    if status == "finished":
        return Phase.FINISHED, ""
    if request:
        return (Phase.TIMEOUT if request.startswith("timeout") else Phase.CANCELLED), request
    if code < 0 or code > 128:  # a shell, and a run of several ranks, say 128 + signal
        return Phase.KILLED, f"killed by {_signal_name(-code if code < 0 else code - 128)}"
    if fresh and status == "stopped":
        return Phase.STOPPED, "stopped on request"
    if fresh and status == "failed":
        return Phase.FAILED, error
    return Phase.FAILED, last_line(log) or f"exit code {code}, without a word"


def last_line(log: Path) -> str:
    """Return the last line of `log` that is not blank, cut to 300 characters; "" if there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 8192))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


def describe_point(values: Mapping[str, Any]) -> str:
    """Return the values of a point in one line, such as "advantage=grpo, learning_rate=0.001".

    The last name of a key is enough unless two keys share it.
    """
    last = [key.rsplit(".", 1)[-1] for key in values]
    names = [name if last.count(name) == 1 else key for name, key in zip(last, values, strict=True)]
    return ", ".join(f"{name}={shown(value)}" for name, value in zip(names, values.values(), strict=True)) or "(as is)"


def shown(value: Any) -> str:
    """Return one value of a point as text, floats with four digits."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _append(path: Path, line: Mapping[str, Any]) -> None:
    with path.open("ab", buffering=0) as file:  # one write, so that several writers never mix their lines
        file.write((json.dumps(line) + "\n").encode())
