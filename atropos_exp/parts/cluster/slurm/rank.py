"""What srun starts in every task of a job: one launcher, which runs one rank and looks after its end.

A rank is a process of its own, so that its death (out of memory, a crash of a library) is seen, noted and answered.
Slurm sends its signals to every process of the job. The rank is started with SIGUSR1, SIGUSR2 and SIGTERM ignored,
which its own children inherit; the launcher hands a request to stop on as SIGTERM, again and again, because a rank
that is still importing libraries does not hear it yet.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from atropos_exp.parts.cluster.slurm import control
from atropos_exp.parts.cluster.slurm.attempts import Attempts
from atropos_exp.parts.cluster.slurm.board import POLL_SECONDS, Board, Pulse
from atropos_exp.parts.cluster.slurm.settings import SlurmSettings
from atropos_exp.processes.lifeline import dying_with_parent
from atropos_exp.processes.locks import is_held
from atropos_exp.processes.ports import HeldPort
from atropos_exp.runs.files import run_status

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
MEETING_SECONDS = 600.0  # for all tasks to start: images are pulled and file systems are slow
LOCK_SECONDS = 180.0  # for the process of an earlier attempt to let go of the run folder
AFTER_FAILURE_SECONDS = 30.0  # for a rank to end by itself after another one has failed
AFTER_VERDICT_SECONDS = 60.0  # likewise after rank 0 has ended
SILENT_SECONDS = 600.0  # without a sign of life of rank 0's launcher: it is gone, and its decision will not come
WRONG_USE = 2  # exit code of a run that its user must change: trying again would not help
UNFINISHED = 75  # exit code of a job that has saved and does not continue by itself (EX_TEMPFAIL)
EARLY_SECONDS = 60.0  # by which Slurm may send its signal too early


@dataclass(frozen=True, kw_only=True)
class RankJob:
    """The pickled content of a job. Calling it runs one task to its end."""

    arguments: tuple[str, ...]  # of the interpreter, to run one rank
    run_folder: str
    environment: tuple[tuple[str, str], ...]  # on top of the job's
    settings: SlurmSettings

    def __call__(self) -> str:
        """Returns how the run ended; leaves by SystemExit with the exit code that Slurm is to see."""
        return Launcher(self, os.environ).run()


class Launcher:
    """Runs one task of the job."""

    def __init__(self, job: RankJob, environ: Mapping[str, str]) -> None:
        self._job = job
        self._settings = job.settings
        self._layout = job.settings.layout
        self._environ = environ
        self._folder = Path(job.run_folder)
        self._job_id = environ["SLURM_JOB_ID"]
        self._restarts = int(environ.get("SLURM_RESTART_COUNT", "0"))
        name = f"{self._job_id}.{self._restarts}"
        self._board = Board(self._folder, name)
        self._attempts = Attempts(self._folder, name)
        self._place = self._layout.place(int(environ["SLURM_NODEID"]), int(environ["SLURM_LOCALID"]))
        self._is_head = self._place.rank == 0
        self._task = int(environ["SLURM_PROCID"])
        self._signals: list[signal.Signals] = []
        self._started_at = time.monotonic()
        self._first_step = -1  # the last one recorded when this attempt began
        self._killed = False  # our own rank, for it did not end in time

    def run(self) -> str:
        """Run the task to its end. Leaves by SystemExit unless the run has finished."""
        for number in STOP_SIGNALS:
            signal.signal(number, lambda number, _: self._signals.append(signal.Signals(number)))
        if self._is_head:
            try:
                return self._lead()
            except Exception:
                self._board.decide(1)
                raise
        try:
            reason = "" if self._place.rank is None else self._follow()
        except Exception as error:
            reason = f"rank {self._place.rank} on {socket.gethostname()}: {type(error).__name__}: {error}"
        if reason:
            self._say(reason)
            self._board.fail(self._task, reason)
        pulse = Pulse(self._board)
        while (code := self._board.verdict()) is None:
            if pulse.silent_for() > SILENT_SECONDS:
                self._say(f"the launcher of rank 0 has given no sign of life for {SILENT_SECONDS:.0f} s")
                raise SystemExit(1)
            time.sleep(POLL_SECONDS)
        raise SystemExit(code)

    def _follow(self) -> str:
        """Run this rank to its end: "" or why it failed."""
        meeting = self._board.wait_for_meeting(seconds=MEETING_SECONDS, give_up=lambda: bool(self._signals))
        if meeting is None:
            return ""
        code = self._run_rank(*meeting)
        return f"rank {self._place.rank} {_how(code)}" if code and not self._signals else ""

    def _lead(self) -> str:
        """Rank 0: prepare the attempt, run the rank, decide what becomes of the job."""
        earlier = self._board.begin()
        before = self._attempts.failures_without_progress()
        first = control.ask_slurm("scontrol", "show", "hostnames", self._environ["SLURM_JOB_NODELIST"])
        nodes = (first or self._environ.get("SLURMD_NODENAME", socket.gethostname())).split()
        self._first_step = self._attempts.last_step()
        self._attempts.start(nodes=nodes, earlier_until=earlier)
        if before >= self._settings.max_failures:
            reason = f"{before} attempts in a row were killed without a warning at step {self._attempts.last_step()}"
            return self._give_up(1, f"{reason}: out of memory, or failing nodes? Look at Slurm's own log of the job")
        if not self._lock_is_free():
            return self._fail(1, f"{self._folder} is still in use by a process of an earlier attempt", may_retry=True)
        if self._signals:  # nothing has been started; the others may have given up already
            for name in dict.fromkeys(number.name for number in self._signals):
                self._attempts.signal(name)
            return self._interrupted()
        if self._status() == "finished":  # by that process
            self._attempts.end("finished", code=0)
            return self._leave(0, "finished", is_over=True)
        address = control.address_of(nodes[0]) if self._layout.nodes > 1 else "127.0.0.1"
        port = HeldPort("")  # rank 0 listens on it once it has loaded its libraries
        self._board.meet(address=address, port=port.number)
        for line in self._layout.describe(address=address):
            self._say(line)
        code = self._run_rank(address, port.number)
        others = self._board.failures()
        if self._signals:
            return self._interrupted()
        if others or code:
            reason = "; ".join(([f"rank 0 {_how(code)}"] if code else []) + others)
            return self._fail(code or 1, reason, may_retry=code != WRONG_USE)
        if self._status() not in ("finished", ""):
            self._attempts.end("stopped", code=UNFINISHED, reason="stopped on request")
            return self._leave(UNFINISHED, "stopped on request, and saved")
        self._attempts.end("finished", code=0)
        return self._leave(0, "finished", is_over=True)

    def _interrupted(self) -> str:
        """Told to stop. The rank has saved, or was killed on the way: what it had not saved is done again."""
        if self._status() == "finished":
            self._attempts.end("finished", code=0)
            return self._leave(0, "finished", is_over=True)
        state = control.job_state(control.own_job(self._environ), restarts=self._restarts)
        if state == "CANCELLED" or not self._settings.requeue:
            why = "cancelled" if state == "CANCELLED" else "cluster.requeue is false"
            self._attempts.end("stopped", code=UNFINISHED, reason=why)
            return self._leave(UNFINISHED, f"{self._how_it_stopped} ({why}); the same command continues it")
        left = 60 * self._settings.time_minutes - (time.monotonic() - self._started_at)
        at_limit = left < self._settings.signal_seconds + EARLY_SECONDS
        if at_limit and self._attempts.last_step() <= self._first_step:  # as it would be again and again
            return self._fail(UNFINISHED, "the time limit came before a new step; raise time_minutes", may_retry=True)
        self._attempts.end("requeued", code=0, reason=", ".join(number.name for number in dict.fromkeys(self._signals)))
        return self._queue_again(self._how_it_stopped)

    @property
    def _how_it_stopped(self) -> str:
        return "killed before it had saved this step" if self._killed else "stopped and saved"

    def _fail(self, code: int, reason: str, *, may_retry: bool) -> str:
        number = self._attempts.failures_without_progress() + 1
        if not (may_retry and self._settings.requeue and number < self._settings.max_failures):
            return self._give_up(code, reason if number == 1 else f"{reason} (failure {number} at this step)")
        self._attempts.end("failed", code=code, reason=reason)
        return self._queue_again(f"failed: {reason} (failure {number} of {self._settings.max_failures} at this step)")

    def _give_up(self, code: int, reason: str) -> str:
        self._attempts.end("gave_up", code=code, reason=reason)
        return self._leave(code, f"failed: {reason}")

    def _queue_again(self, what: str) -> str:
        job = control.own_job(self._environ)
        if control.job_state(job, restarts=self._restarts) in ("PENDING", "REQUEUED"):  # somebody else has seen to it
            return self._leave(0, f"{what}; already in the queue again")
        if control.requeue(job):
            return self._leave(0, f"{what}; queued again")
        # In a container there may be no scontrol: the script outside looks for this file when the ranks have ended.
        (self._folder / "slurm" / f"requeue_{self._job_id}").touch()
        return self._leave(UNFINISHED, f"{what}; the job's script is to queue it again")

    def _leave(self, code: int, what: str, *, is_over: bool = False) -> str:
        self._say(what)
        self._board.decide(code)
        if not is_over:  # so that submitit writes no result
            raise SystemExit(code)
        return what

    def _run_rank(self, address: str, port: int) -> int:
        """Start the rank and wait for its end: its exit code, negative for a signal that killed it."""
        own = self._layout.environment(self._place, address=address, port=port, given=self._environ)
        if address != "127.0.0.1" and "GLOO_SOCKET_IFNAME" not in self._environ:
            interface = control.interface_towards(address)
            own |= {"GLOO_SOCKET_IFNAME": interface} if interface else {}
        log = self._folder / "log" / f"rank_{self._place.rank}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            rank = subprocess.Popen(
                [sys.executable, *self._job.arguments],
                env={**self._environ, **dict(self._job.environment), **own},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=dying_with_parent(ignoring=STOP_SIGNALS),
            )
        return self._watch(rank)

    def _watch(self, rank: subprocess.Popen[bytes]) -> int:
        """Hand on requests to stop, and end a rank that waits for ones that are gone."""
        noted = 0
        kill_at: float | None = None
        looked = 0.0
        while rank.poll() is None:
            now = time.monotonic()
            for number in self._signals[noted:]:
                self._say(f"{number.name}: finishing this step, then saving")
                if self._is_head:
                    self._attempts.signal(number.name)
            noted = len(self._signals)
            if now - looked >= POLL_SECONDS:
                looked = now
                if self._is_head:
                    self._board.beat()
                limits = [kill_at] if kill_at is not None else []
                if self._signals:
                    rank.send_signal(signal.SIGTERM)
                    # What is left of the time must suffice to queue the job again.
                    limits.append(now + 0.8 * self._settings.signal_seconds)
                if self._board.failures():
                    limits.append(now + AFTER_FAILURE_SECONDS)
                if self._board.verdict() is not None:
                    limits.append(now + AFTER_VERDICT_SECONDS)
                kill_at = min(limits, default=None)
            if kill_at is not None and now > kill_at and not self._killed:
                self._killed = True
                self._say(f"rank {self._place.rank} did not end in time: killed")
                rank.kill()
            time.sleep(0.1)
        return rank.returncode

    def _lock_is_free(self) -> bool:
        """After a node failure the old process may live on where Slurm cannot see it."""
        deadline = time.monotonic() + LOCK_SECONDS
        while not self._signals and is_held(self._folder / "lock"):
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def _status(self) -> str:
        """Of the run, as it says itself; "" for nothing, as of a program that is no run."""
        return run_status(self._folder)[0] or ""

    def _say(self, text: str) -> None:
        print(f"[{time.strftime('%H:%M:%S')} job {self._job_id} task {self._task}] {text}", flush=True)


def _how(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
