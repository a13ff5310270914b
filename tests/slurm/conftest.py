"""One real Slurm for all tests that a process runs here. Skipped, with the reason, where it cannot be had."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.experiments import run
from tests.slurm.slurm_cluster import Cluster

HERE = Path(__file__).parent
LONG = ("test_sweep.py", "test_preemption.py", "test_failures.py", "test_runs.py")
NEEDED = ("slurmctld", "slurmd", "slurmdbd", "mariadbd", "munged")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test here, and begin with the files that take long: two processes share them."""
    own = sorted((item for item in items if item.path.is_relative_to(HERE)), key=lambda item: _rank(item.path.name))
    items[:] = [item for item in items if not item.path.is_relative_to(HERE)] + own
    reason = _obstacle()
    for item in own:
        item.add_marker(pytest.mark.slurm)
        item.add_marker(pytest.mark.timeout(1800))
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def _rank(name: str) -> int:
    return LONG.index(name) if name in LONG else len(LONG)


def _obstacle() -> str:
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        return f"no Slurm here ({', '.join(missing)} not found): make test-slurm installs it, as root"
    if os.geteuid() != 0:
        return "a Slurm of one's own needs root"
    return ""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    root = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: it holds unix sockets
    found = Cluster(root)
    try:
        yield found
    finally:
        found.wipe()


@pytest.fixture(scope="module")
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the test file's `RUN` that nothing disturbs, not under Slurm."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run(folder, *request.module.RUN, timeout=400)
    return folder
