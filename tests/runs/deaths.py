"""Saves checkpoints in processes that are killed; `python deaths.py FOLDER` prints what it saw.

A script of its own, because what it forks must not be a copy of pytest with its threads.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from atropos_exp.runs.checkpoints import Checkpoints
from tests.runs.checkpoint_cases import CALLS, assert_intact, save, state_of, writer


def child(work: Callable[[], Any]) -> int:
    """Run `work` in a fork that never returns; its process id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def save_and_die(at: int, folder: Path) -> None:
    """Save step 3, and be killed at the `at`-th system call."""
    count = 0

    def dying(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal count
            count += 1
            if count == at:
                if name == "write":  # a torn write
                    original(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **keywords)

        return call

    for name in CALLS:
        setattr(os, name, dying(name, getattr(os, name)))
    Checkpoints(folder, keep=2).save(3, writer(3), state_of(3))


def kill_at_every_call(root: Path) -> int:
    """The number of system calls at which a save was killed; after each the folder is intact and can go on."""
    save(root / "before", 1, 2)
    for at in range(1, 1000):
        folder = root / str(at)
        shutil.copytree(root / "before", folder)
        _, status = os.waitpid(child(lambda at=at, folder=folder: save_and_die(at, folder)), 0)
        newest = assert_intact(folder)
        if not os.WIFSIGNALED(status):
            assert newest == 3 and status == 0
            return at - 1
        assert newest in (2, 3)
        save(folder, 3)
        assert assert_intact(folder) == 3 and len(list(folder.iterdir())) == 2
        shutil.rmtree(folder)
    raise AssertionError("the sweep never ended")


def save_for_ever(folder: Path, acknowledge: int) -> None:
    """One checkpoint after the other from where the folder stands; each is told to the pipe once it is published."""
    checkpoints = Checkpoints(folder, keep=2)
    newest = checkpoints.latest()
    assert newest is not None
    for step in range(newest.step + 1, 10**6):
        checkpoints.save(step, writer(step), state_of(step))
        os.write(acknowledge, b"%d " % step)


def kill_at_random_moments(folder: Path, times: int) -> int:
    """The last step that a killed process had published: none that was published is ever lost."""
    generator = random.Random(0)
    save(folder, 1)
    published = 1
    for _ in range(times):
        reading, writing = os.pipe()
        pid = child(lambda writing=writing: save_for_ever(folder, writing))
        os.close(writing)
        time.sleep(generator.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with os.fdopen(reading, "rb") as pipe:
            steps = pipe.read().split()
        published = int(steps[-1]) if steps else published
        assert assert_intact(folder) >= published
    return published


if __name__ == "__main__":
    print("points", kill_at_every_call(Path(sys.argv[1])))
    print("published", kill_at_random_moments(Path(sys.argv[1]) / "random", 30))
