"""A run of the real program in the background, and the programs that it has started."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from atropos_exp.runs.journal import Journal, read_journal
from tests.helpers.experiments import ROOT, command, environment, metrics
from tests.helpers.processes import command_line, descendants

PROGRAMS = {
    "atroposlib.cli.run_api": "api",
    "atropos_exp.envs.single_turn": "environment",
    "atropos_exp.parts.gateway.server": "gateway",
    "atropos_exp.parts.engine.hf.server": "engine",
    "atropos_exp.parts.engine.vllm.server": "engine",
}


class Run:
    """A run of the real program in the background."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.folder = folder
        self.log = folder.parent / "output.log"
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                command(folder, *overrides), env=environment(), cwd=ROOT, stdout=output, stderr=output
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_until(self, condition: Callable[[], object], what: str, seconds: float) -> float:
        """Seconds it took; fails if the run ends before, or does not get there."""
        started = time.monotonic()
        while not condition():
            assert self.process.poll() is None, f"the run ended before: {what}\n{self.output[-3000:]}"
            assert time.monotonic() < started + seconds, f"not within {seconds} s: {what}\n{self.output[-3000:]}"
            time.sleep(0.05)
        return time.monotonic() - started

    def wait(self, seconds: float) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            pytest.fail(f"the run did not end within {seconds} s:\n{self.output[-3000:]}")

    def programs(self) -> dict[str, int]:
        """Process id of each of its programs that is there, by its name of PROGRAMS."""
        found = {}
        for pid in descendants(self.process.pid):
            words = command_line(pid)
            if not any(word.endswith("guard.py") for word in words):
                found |= {PROGRAMS[word]: pid for word in words if word in PROGRAMS}
        return found

    def steps(self, source: str) -> list[int]:
        """Steps so far whose rollouts came from `source`."""
        rows = metrics(self.folder) if (self.folder / "metrics.jsonl").exists() else []
        return [row["step"] for row in rows if row.get(f"rollout/num_{source}")]

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(30)


def journals(folder: Path) -> list[Journal]:
    """Of every step of a run."""
    found = [read_journal(path) for path in sorted((folder / "rollouts").glob("*.parquet"))]
    assert found and None not in found
    return found


def group_ids(folder: Path) -> list[str]:
    """Of the groups that came from Atropos."""
    return [group.prompt_id for journal in journals(folder) for group in journal.groups if group.source == "atropos"]
