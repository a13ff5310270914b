"""A run that is still going on: is there progress, and if not, which of its processes is it waiting for?"""

import os
import re
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

from atropos_exp.doctor.line import Line, fail, ok
from atropos_exp.runs.files import Row, last_step

LEAST_PATIENCE, FIRST_PATIENCE = 60.0, 300.0  # seconds; the second until the first step
_WATCH_SECONDS = 0.5
_TICKS = os.sysconf("SC_CLK_TCK")  # a second, of /proc/PID/stat
# What a run starts: the module, or another word, in its command line; its role; the file of its log.
ROLES = (
    ("atropos_exp.parts.engine.", "engine server", "engine.log"),
    ("atropos_exp.parts.gateway.server", "gateway", "gateway.log"),
    ("atropos_exp.parts.reward.worker", "reward worker", ""),
    ("atroposlib.cli.run_api", "Atropos API", "atropos_api.log"),
    ("atropos_exp.parts.logger.wandb_process", "W&B process", "wandb.log"),
    ("wandb-core", "W&B process", "wandb.log"),  # which the one above starts
    ("atropos_exp.parts.logger.trackio_process", "trackio process", "trackio.log"),
    (" serve ", "environment", "environment_*.log"),
)
SAMPLER = "engine server"
_STATES = {
    "R": "computes", "S": "waits", "D": "waits for a disk or a device", "T": "is stopped (SIGSTOP)",
    "t": "is stopped by a debugger", "Z": "is dead", "I": "is idle",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """A process of the run, as the kernel shows it."""

    pid: int
    role: str
    state: str  # letter of /proc/PID/stat
    waits_in: str  # kernel function, "" if it is not told
    busy: float  # share of one core over a moment

    def __str__(self) -> str:
        place = f" in {self.waits_in}" if self.waits_in and self.state in "SD" else ""
        busy = f", {self.busy:.0%} of a core" if self.busy >= 0.05 else ""
        return f"{self.role} (process {self.pid}) {_STATES.get(self.state, self.state)}{place}{busy}"


def look_at_running(folder: Path, rows: Sequence[Row], *, patience: float | None) -> list[Line]:
    """Return one line if there is progress; if not, the process that the run waits for, and every other process.

    `patience`: seconds without progress after which a run counts as stalled; None derives them from its steps so far.
    """
    done = last_step(rows)
    seconds = [float(row["time/step_s"] or 0) for row in rows if row.step and row.get("time/step_s")]
    usual = median(seconds) if seconds else None
    age = time.time() - _newest(folder)
    if patience is None:
        patience = max(LEAST_PATIENCE, 5 * max(seconds)) if seconds else FIRST_PATIENCE
    news = f"running, {done} steps done, last news {age:.0f} s ago"
    if age <= patience:
        return [ok("run", news + (f" ({usual:.1f} s a step is usual)" if usual else ""))]
    holder = (folder / "lock").read_text().strip()
    pid = int(match[1]) if (match := re.search(r"process (\d+)", holder)) else 0
    if not holder.endswith(f" on {socket.gethostname()}"):
        return [fail("run", f"stalled: {news}; its trainer is {holder}", f"ask again on {holder.rpartition(' ')[2]}")]
    processes = watch(pid)
    stage, partner = _stage(folder, done)
    if partner == SAMPLER and any(process.role == "environment" for process in processes):
        stage, partner = "waiting for groups from Atropos", "environment"
    culprit = _culprit(processes, partner)
    log = _log_of(folder, culprit.role) if culprit else ""
    who = str(culprit) if culprit else f"there is no {partner} among its processes: it has died"
    text = f"no news for {age:.0f} s (patience {patience:.0f} s) in step {done + 1}, while {stage}: {who}{log}"
    others = [ok("process", str(process)) for process in processes if process is not culprit]
    return [fail("stalled", text, _remedy(culprit, pid)), *others]


def watch(pid: int) -> list[Process]:
    """Look at the process `pid` and everything below it, over half a second."""
    before = {one: _stat(one) for one in _tree(pid)}
    time.sleep(_WATCH_SECONDS)
    found = []
    for one, was in before.items():
        role, now = "trainer" if one == pid else _role(one), _stat(one)
        if role is None or now is None:
            continue
        busy = (now.ticks - (was.ticks if was else 0)) / _TICKS / _WATCH_SECONDS
        found.append(Process(pid=one, role=role, state=now.state, waits_in=_text(one, "wchan"), busy=busy))
    return found


def _stage(folder: Path, done: int) -> tuple[str, str]:
    """What the step that is not done is at, and who does it: by the files that are there."""
    if any((folder / "checkpoints").glob("tmp.*")):
        return "a checkpoint is being written", "trainer"
    if (folder / "rollouts" / f"step_{done + 1:06d}.parquet").is_file():
        return "the policy is updated and synced (its rollouts are there)", "trainer"
    if not any(folder.glob("metrics.jsonl")):
        return "trainer and engine start", SAMPLER
    return "waiting for rollouts", SAMPLER


def _culprit(processes: Sequence[Process], partner: str) -> Process | None:
    """Stopped or dead ones first, then who is stuck in a device, then who does the stage's work."""
    stuck = (process for states in ("Tt", "Z", "D") for process in processes if process.state in states)
    return next(stuck, next((process for process in processes if process.role == partner), None))


def _remedy(culprit: Process | None, pid: int) -> str:
    again = f"kill {pid} and type the same command again: no step is lost"
    if culprit is None or culprit.state == "Z":
        return f"its log/ tells why it died; {again}"
    if culprit.state in "Tt":
        return f"kill -CONT {culprit.pid} lets it go on"
    if culprit.state == "R" or culprit.busy >= 0.05:
        return "it works: wait, or give it more cores or less to do; --patience sets when a run counts as stalled"
    return again


def _newest(folder: Path) -> float:
    """When anything that tells of progress was last written; logs of waiting servers do not."""
    paths = [folder / name for name in ("metrics.jsonl", "run.json", "lock", "config.yaml")]
    paths += [*folder.glob("rollouts/*"), *folder.glob("checkpoints/*")]
    return max(map(_written, paths))


def _written(path: Path) -> float:
    """0 where it is gone: a running run renames drafts and deletes old checkpoints."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _log_of(folder: Path, role: str) -> str:
    pattern = next((log for _, name, log in ROLES if name == role and log), "")
    logs = sorted(folder.glob(f"log/{pattern}"), key=lambda path: -path.stat().st_mtime) if pattern else []
    if not logs:
        return ""
    age = time.time() - logs[0].stat().st_mtime
    tail = [line for line in logs[0].read_text(errors="replace").splitlines() if line.strip()][-1:]
    return f"; {logs[0].name}, written {age:.0f} s ago" + (f", ends: {tail[0][:200]}" if tail else ", is empty")


def _tree(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        if stat := _stat(int(path.name)):
            children.setdefault(stat.parent, []).append(int(path.name))
    found, todo = [], [pid]
    while todo:
        one = todo.pop()
        found.append(one)
        todo += sorted(children.get(one, []))
    return sorted(found)


def _role(pid: int) -> str | None:
    """None: a guard or another helper that only watches."""
    command = _text(pid, "cmdline").replace("\0", " ")
    if "guard.py" in command:
        return None
    return next((role for word, role, _ in ROLES if word in command), f"{command.strip()[:60] or 'a dead child'}")


class _Stat(NamedTuple):
    state: str
    parent: int
    ticks: int  # of computation


def _stat(pid: int) -> _Stat | None:
    """None: it is gone."""
    fields = _text(pid, "stat").rpartition(")")[2].split()
    return _Stat(fields[0], int(fields[1]), int(fields[11]) + int(fields[12])) if fields else None


def _text(pid: int, name: str) -> str:
    try:
        text = Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""
    return "" if text == "0" else text
