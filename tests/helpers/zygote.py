"""Many runs of the real program, each as a fork of one warm process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.experiments import ROOT, command, environment


class Zygote:
    """Starts experiments with the command line `RUN` as forks of one warm process. It is a context manager."""

    def __init__(self, *run: str) -> None:
        self.run = run
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote_process.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(), cwd=ROOT,
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def start(self, folder: Path) -> int:
        """The process id of the run, whose output goes to `output.log` beside its folder."""
        request = {"overrides": command(folder, *self.run)[3:], "log": str(folder.parent / "output.log")}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.terminate()
        self.process.wait(30)


def alive(pid: int) -> bool:
    """Whether the run is there; the zygote's forks leave no zombies."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
