"""A Slurm of this test session, and what a user types on it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from atropos_exp.parts.cluster.slurm.attempts import read_attempts
from tests.helpers.experiments import SMALL, final_state, metrics
from tests.helpers.paths import ROOT

SCRIPT = Path(__file__).with_name("slurm_up.sh")
NOT_OVER = ("RUNNING", "PENDING", "REQUEUED", "UNKNOWN")  # the accounting hears of everything a little later
ON_SLURM = ("cluster=slurm", "cluster.cpus_per_task=1", "cluster.time_minutes=20")


class Cluster:
    """Four nodes with eight stand-in GPUs each; partition `low` gives way to `main`."""

    def __init__(self, root: Path, **settings: str) -> None:
        self.root = root
        self._settings = {"SLURM_ROOT": str(root), "SLURM_PORT": str(_free_ports()), **settings}
        self._guard = subprocess.Popen(  # should this process be killed
            [str(SCRIPT), "wipe_after", str(os.getpid())], env={**os.environ, **self._settings}, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            self.up()
        except BaseException:
            self.wipe()
            raise

    def up(self) -> None:
        """Start it, or bring back what was killed."""
        self._run("up")

    def _run(self, what: str) -> None:
        done = subprocess.run(
            [str(SCRIPT), what], env={**os.environ, **self._settings}, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def wipe(self) -> None:
        """End it; raises AssertionError if a process of it, or of its jobs, lives on."""
        self._run("wipe")
        os.killpg(self._guard.pid, signal.SIGKILL)
        self._guard.wait()
        deadline = time.monotonic() + 60
        while left := list(self._processes()):
            assert time.monotonic() < deadline, [(entry / "cmdline").read_bytes() for entry in left]
            time.sleep(0.2)

    def _processes(self, node: str = "") -> Iterator[Path]:
        """Entries of /proc that belong to this cluster; to the jobs on `node`, if given."""
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                words = (entry / "environ").read_bytes().split(b"\0")
                is_zombie = not (entry / "cmdline").read_bytes()
            except OSError:
                continue
            is_ours = any(word.startswith(b"SLURM") and str(self.root).encode() in word for word in words)
            if is_ours and not is_zombie and (not node or f"SLURMD_NODENAME={node}".encode() in words):
                yield entry

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "SLURM_CONF": str(self.root / "etc" / "slurm.conf"),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "OMP_NUM_THREADS": "1",
        }

    def output(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout.strip()

    def type(
        self, *overrides: str, flags: tuple[str, ...] = (), timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """`python -m atropos_exp.run ...`, to its end."""
        return subprocess.run(
            [sys.executable, "-m", "atropos_exp.run", *flags, *SMALL, *overrides],
            env=self.environment, capture_output=True, text=True, timeout=timeout, cwd=ROOT, check=False,
        )  # fmt: skip

    def submit(self, folder: Path, *overrides: str, flags: tuple[str, ...] = ()) -> str:
        """Queue a run in `folder`; its job."""
        done = self.type(
            *ON_SLURM, f"output_dir={folder.parent}", f"run_dir={folder}", "cluster.wait=false", *overrides, flags=flags
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return str(json.loads((folder / "slurm" / "job.json").read_text())["job_id"])

    def state(self, job_id: str) -> str:
        """Of a job, by Slurm's accounting."""
        text = self.output("sacct", "-X", "-n", "-P", "-o", "State", "-j", job_id)
        return text.split()[0] if text else "UNKNOWN"

    def wait_for_end(self, *job_ids: str, seconds: float = 300) -> list[str]:
        """Until none of the jobs is in the queue; their states."""
        self.wait_until(lambda: not set(self.output("squeue", "-h", "-o", "%i").split()) & set(job_ids), seconds)
        ended = lambda: all(self.state(job_id) not in NOT_OVER for job_id in job_ids)  # noqa: E731
        self.wait_until(ended, 30)
        return [self.state(job_id) for job_id in job_ids]

    def wait_until(self, condition: Callable[[], object], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.output("squeue") + "\n" + self.output("sinfo")
            time.sleep(0.2)

    def wait_until_empty(self) -> None:
        """Jobs of an earlier test may still be ending."""
        self.wait_until(lambda: not self.output("squeue", "-h"))

    def preempt(self, job_id: str) -> None:
        """Let a job of partition `main` take all nodes for a moment; returns when `job_id` has given way."""
        restarts = self.restarts(job_id)
        other = self.output(
            "sbatch", "--parsable", "-p", "main", "-N4", "--exclusive", "-o", "/dev/null", "--wrap=true"
        )
        try:
            self.wait_until(lambda: self.restarts(job_id) > restarts, 150)
        finally:
            self.output("scancel", other)

    def limit(self, job_id: str, *, minutes_from_now: int) -> None:
        """Change the time limit of a job, as an administrator may; Slurm counts it from the start of the attempt."""
        found = self.output("squeue", "-h", "-j", job_id, "-o", "%M").split(":")  # such as 12:34
        elapsed = int(found[-2]) + 60 * int(found[-3] if len(found) > 2 else 0)
        self.output("scontrol", "update", f"JobId={job_id}", f"TimeLimit={elapsed + minutes_from_now}")

    def seconds_of(self, *job_ids: str) -> float:
        """That jobs ran, all attempts, by the accounting."""
        text = self.output("sacct", "-D", "-X", "-n", "-P", "-o", "ElapsedRaw", "-j", ",".join(job_ids))
        return float(sum(int(line) for line in text.split()))

    def pause(self, seconds: float) -> None:
        """A moment that no event marks."""
        time.sleep(seconds)

    def restarts(self, job_id: str) -> int:
        text = self.output("scontrol", "show", "job", "-o", job_id)
        return int(text.partition("Restarts=")[2].split()[0])

    def kill_node(self, name: str) -> None:
        """As if it lost its power: the daemon and everything that ran on it."""
        pids = [int((self.root / "run" / f"slurmd.{name}.pid").read_text())]
        pids += [int(entry.name) for entry in Path("/proc").glob("[0-9]*") if self._is_step_daemon(entry, name)]
        pids += [int(entry.name) for entry in self._processes(name)]
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def _is_step_daemon(self, entry: Path, name: str) -> bool:
        """Of node `name`: it holds that node's files open."""
        try:
            if not (entry / "cmdline").read_bytes().startswith(b"slurmstepd: ["):
                return False
            targets = [os.readlink(link) for link in (entry / "fd").iterdir()]
            targets.append(os.readlink(entry / "cwd"))
        except OSError:
            return False
        own = (f"{self.root}/spool/{name}", f"{self.root}/log/slurmd.{name}.log")
        return any(target.startswith(own) for target in targets)


def rank_pid(folder: Path) -> int:
    """The process of rank 0 of the run that goes on in `folder`."""
    return int((folder / "lock").read_text().split()[1])


def output(folder: Path) -> str:
    """What the launchers and rank 0 said, for a failed assertion."""
    files = [*(folder / "slurm").glob("*.out"), *(folder / "log").glob("rank_*.log")]
    return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in sorted(files))


def last_step(folder: Path) -> int:
    """Of a run; -1 for none."""
    try:
        return int(json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    except (OSError, ValueError, IndexError):
        return -1


def ends(folder: Path) -> list[str | None]:
    """How the attempts of a run ended."""
    return [attempt.how for attempt in read_attempts(folder)]


def assert_same(folder: Path, undisturbed: Path) -> None:
    """No step lost, none twice, and the same bits at the end."""
    ours, theirs = metrics(folder), metrics(undisturbed)
    assert [row["step"] for row in ours] == list(range(len(theirs)))
    assert final_state(folder) == final_state(undisturbed)
    for name in ("reward/mean", "loss/policy", "grad/norm"):
        assert [row.get(name) for row in ours] == [row.get(name) for row in theirs]


def _free_ports() -> int:
    """The first of twenty ports that nobody listens on."""
    for first in range(17000 + os.getpid() % 500 * 20, 32000, 20):
        try:
            for port in range(first, first + 20):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError("no twenty free ports in a row")
