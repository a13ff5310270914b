"""kill -9 of any process of a run, over and over; each run must end with the weights of the undisturbed one.

    python -m tests.helpers.kill_loop FOLDER --kills 100 --minutes 12 --seed 0

prints one line for each run, and at the end how many kills hit which process. A trainer that is killed is started
again by the same command; the rest must mend itself.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from tests.helpers.experiments import final_state, metrics, summary
from tests.helpers.processes import command_line, descendants, is_alive
from tests.helpers.zygote import Zygote, alive

NUM_STEPS = 25
# Finds the whole answer, after some 20 ms of looking for other ways: else hardly a kill would come while one is scored.
SLOW = "^(?:" + "(?:x?|y?)" * 16 + "Z|.*)$"
RUN = (
    f"trainer.max_steps={NUM_STEPS}",
    "checkpoint.every=4",
    "eval.num_prompts=4",
    "eval.every=10",
    "engine.max_restarts=100",
    f"reward.extract='{SLOW}'",
)
TARGETS = ("engine", "guard", "guard, then engine", "worker", "scoring worker", "template", "trainer", "everything")
WEIGHTS = (3, 4, 2, 2, 5, 2, 2, 2)
LONGEST_PAUSE = 2.5  # seconds between two kills
RUN_SECONDS = 240.0  # in which a run must end after its last kill


class KillLoop:
    """Kills processes of runs, which leave their folders in `folder`. It is a context manager."""

    def __init__(self, folder: Path, *, seed: int) -> None:
        self.counts: Counter[str] = Counter()  # kills, by what was killed
        self.rescored = 0.0  # answers whose worker was killed under them
        self._folder = folder
        self._chance = random.Random(seed)
        self._number = 0
        self._expected: tuple[dict[str, str], list[object]] | None = None

    def __enter__(self) -> KillLoop:
        self._zygote = Zygote(*RUN).__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._zygote.__exit__()

    def undisturbed(self) -> None:
        """Make the run that all others are compared with."""
        run = self._new_folder("undisturbed")
        self._wait(self._zygote.start(run))
        self._expected = _outcome(run)

    def round(self, *, num_kills: int) -> str:
        """Kill up to `num_kills` times in one new run. Returns "equal", or what is wrong with its end."""
        run = self._new_folder(f"run_{self._number:03d}")
        self._number += 1
        pid = self._zygote.start(run)
        seen = {pid}
        left = num_kills
        while left > 0 and self._pause(pid):
            (target,) = self._chance.choices(TARGETS, WEIGHTS)
            victims = [victim for victim in self._victims(target, pid) if alive(victim)]
            if not victims:
                continue
            seen.update(descendants(pid))
            for victim in victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
            self.counts[target] += 1
            left -= 1
            self.note(run, f"killed {target}: {victims}")
            if target == "guard, then engine":  # the next server, while it starts
                time.sleep(self._chance.uniform(0.0, 4.0))
                for victim in _processes(pid).get("engine", []):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(victim, signal.SIGKILL)
            if pid in victims:
                while alive(pid):
                    time.sleep(0.01)
                pid = self._zygote.start(run)
                seen.add(pid)
        if not self._wait(pid):
            return "did not end"
        if summary(run)["status"] != "finished":
            return f"status {summary(run)['status']}"
        if any(is_alive(one) for one in seen):
            return f"left behind: {[(one, command_line(one)) for one in seen if is_alive(one)]}"
        self.rescored += max((row.get("reward/rescored", 0.0) for row in metrics(run)), default=0.0)
        return "equal" if _outcome(run) == self._expected else "other weights"

    def last_output(self) -> str:
        """The end of what the last run printed."""
        return (self._run.parent / "output.log").read_text(errors="replace")[-3000:]

    def note(self, run: Path, text: str) -> None:
        """Put a line into the output of a run."""
        with (run.parent / "output.log").open("a") as file:
            file.write(f"--- {text}\n")

    def _new_folder(self, name: str) -> Path:
        self._run = self._folder / name / "run"
        self._run.parent.mkdir(parents=True)
        return self._run

    def _pause(self, pid: int) -> bool:
        """Let a random time pass. Returns whether the run is still there."""
        end = time.monotonic() + self._chance.uniform(0.0, LONGEST_PAUSE)
        while time.monotonic() < end and alive(pid):
            time.sleep(0.005)
        return alive(pid)

    def _wait(self, pid: int) -> bool:
        end = time.monotonic() + RUN_SECONDS
        while alive(pid) and time.monotonic() < end:
            time.sleep(0.02)
        return not alive(pid)

    def _victims(self, target: str, pid: int) -> list[int]:
        if target == "trainer":
            return [pid]
        if target == "everything":
            return [pid, *descendants(pid)]
        if target == "scoring worker":
            return self._scoring(pid)
        return _processes(pid).get(target.partition(",")[0], [])[:1]

    def _scoring(self, pid: int) -> list[int]:
        """A worker in the middle of an answer, as soon as there is one."""
        end = time.monotonic() + 5.0
        while alive(pid) and time.monotonic() < end:
            for worker in _processes(pid).get("worker", []):
                with contextlib.suppress(OSError):  # it may be gone
                    if Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0] == "R":
                        return [worker]
            time.sleep(0.002)
        return []


def _processes(pid: int) -> dict[str, list[int]]:
    """The processes of a run by what they are."""
    found: dict[str, list[int]] = {}
    for one in descendants(pid):
        words = command_line(one)
        if any(word.endswith("guard.py") for word in words):
            found.setdefault("guard", []).append(one)
        elif "atropos_exp.parts.engine.hf.server" in words:
            found.setdefault("engine", []).append(one)
        elif "atropos_exp.parts.reward.worker" in words:  # the template comes first, then its forks
            found.setdefault("worker" if "template" in found else "template", []).append(one)
    return found


def _outcome(run: Path) -> tuple[dict[str, str], list[object]]:
    rows = metrics(run)
    names = ("step", "reward/mean", "loss/policy", "grad/norm", "rollout/num")
    return final_state(run), [[row.get(name) for name in names] for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--kills-per-run", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    outcomes: Counter[str] = Counter()
    with KillLoop(options.folder, seed=options.seed) as loop:
        loop.undisturbed()
        end = time.monotonic() + 60 * options.minutes
        while time.monotonic() < end and (done := sum(loop.counts.values())) < options.kills:
            outcome = loop.round(num_kills=min(options.kills_per_run, options.kills - done))
            outcomes[outcome] += 1
            print(f"{sum(loop.counts.values())} kills: {outcome}", flush=True)
    print(f"kills: {dict(loop.counts)}, of which {loop.rescored:g} answers were scored again; runs: {dict(outcomes)}")
    return 0 if set(outcomes) == {"equal"} else 1


if __name__ == "__main__":
    sys.exit(main())
