"""Whatever fails in a save, and whenever the process or the machine dies: an intact checkpoint remains."""

from __future__ import annotations

import builtins
import errno
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from atropos_exp.runs.checkpoints import CheckpointError, Checkpoints
from tests.runs.checkpoint_cases import CALLS, assert_intact, names, save, state_of, writer


@contextmanager
def fault(at: int, code: int, *, lasting: bool) -> Iterator[list[int]]:
    """The `at`-th counted call raises OSError(code); with `lasting` every later one too. Yields the calls so far."""
    calls = [0]
    lock = threading.Lock()

    def failing(original: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            with lock:
                calls[0] += 1
                number = calls[0]
            if number == at or (lasting and number > at):
                raise OSError(code, os.strerror(code))
            return original(*arguments, **keywords)

        return call

    originals = {name: getattr(os, name) for name in CALLS}
    original_open = builtins.open
    try:
        for name, original in originals.items():
            setattr(os, name, failing(original))
        builtins.open = failing(original_open)
        yield calls
    finally:
        builtins.open = original_open
        for name, original in originals.items():
            setattr(os, name, original)


@pytest.mark.parametrize(("code", "lasting"), [(errno.ENOSPC, True), (errno.EIO, False)])
@pytest.mark.parametrize("step", [3, 2])  # a new one; one that replaces the newest
def test_every_single_fault_leaves_an_intact_checkpoint(tmp_path: Path, code: int, lasting: bool, step: int) -> None:
    save(tmp_path / "before", 1, 2)
    failures = 0
    for at in range(1, 1000):
        folder = tmp_path / str(at)
        shutil.copytree(tmp_path / "before", folder)
        checkpoints = Checkpoints(folder, keep=2)
        with fault(at, code, lasting=lasting) as calls:
            try:
                checkpoints.save(step, writer(step), state_of(step))
                saved = True
            except CheckpointError as error:
                assert os.strerror(code) in str(error)
                saved = False
        newest = assert_intact(folder)
        assert newest in ((step,) if saved else (2, step)), f"fault at call {at}"
        if calls[0] < at:
            break
        failures += not saved
        again = Checkpoints(folder, keep=2)  # and the disk recovers: nothing stands in the way
        again.save(step, writer(step), state_of(step))
        assert assert_intact(folder) == step
        assert not [name for name in names(folder) if name.startswith(("tmp.", "old."))]
        shutil.rmtree(folder)
    else:
        pytest.fail("the sweep never ended")
    assert failures > 15


def test_kill_9_at_every_call_and_at_random_moments(tmp_path: Path) -> None:
    script = Path(__file__).with_name("deaths.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(script.parents[2])},
    )
    assert done.returncode == 0, done.stderr
    points, published = (int(line.split()[1]) for line in done.stdout.splitlines())
    assert points > 20, "the sweep must meet every system call of a save"
    assert published > 10, "the random kills must interrupt real progress"


def test_what_was_flushed_is_enough_after_a_power_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that keeps nothing but what was flushed: file contents and directory entries at their last fsync."""
    contents: dict[int, bytes] = {}
    entries: dict[int, dict[str, int]] = {}
    fsync = os.fsync

    def recording(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        inode = path.stat().st_ino
        if path.is_dir():
            entries[inode] = {entry.name: entry.stat().st_ino for entry in path.iterdir()}
        else:
            contents[inode] = path.read_bytes()

    def restore(inode: int, target: Path) -> None:
        if inode in entries:
            target.mkdir()
            for name, child in entries[inode].items():
                restore(child, target / name)
        else:
            target.write_bytes(contents.get(inode, b""))

    folder = tmp_path / "checkpoints"
    monkeypatch.setattr(os, "fsync", recording)
    save(folder, 1, 2, 3)
    assert "checkpoints" in entries[tmp_path.stat().st_ino]
    restore(folder.stat().st_ino, tmp_path / "after")
    assert assert_intact(tmp_path / "after") == 3
