"""Puts the small experiments within reach, and the ways in which a user meets a sweep."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from atropos_exp.runs.sweep_folder import SweepFolder
from atropos_exp.sweep.local import LocalBackend
from tests.helpers.experiments import SMALL, environment

PATIENCE = 900.0  # seconds; other tests, and others altogether, may take most of two cores


class CommandLine:
    """Commands of the program, run in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def sweep(self, *overrides: str, timeout: float = PATIENCE) -> subprocess.CompletedProcess[str]:
        """`python -m atropos_exp.run` with small settings, which what is given overrides."""
        flags = [word for word in overrides if "=" not in word and not word.startswith("+")]
        given = {word.split("=")[0] for word in overrides}
        small = [word for word in SMALL if word.split("=")[0] not in given]
        return self.start("atropos_exp.run", *flags, *small, *overrides[len(flags) :], timeout=timeout)

    def after(self, *arguments: str, timeout: float = PATIENCE) -> subprocess.CompletedProcess[str]:
        """`python -m atropos_exp.sweep`."""
        return self.start("atropos_exp.sweep", *arguments, timeout=timeout)

    def start(self, module: str, *arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", module, *arguments]
        paths = [environment()["PYTHONPATH"], *filter(None, [os.environ.get("PYTHONPATH")])]
        environ = {**environment(), "PYTHONPATH": os.pathsep.join(paths)}
        return subprocess.run(command, cwd=self.folder, env=environ, capture_output=True, text=True, timeout=timeout)

    @staticmethod
    def wait_until(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
            time.sleep(0.02)


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    folder = tmp_path_factory.mktemp("user")
    yield CommandLine(folder)
    for request in folder.rglob("sweep.json"):  # a test that fails half way leaves none of its processes behind
        LocalBackend(SweepFolder(request.parent), num_slots=1).kill()
