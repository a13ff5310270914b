"""Checkpoints whose content is known from their step, and what must be true of a folder of them."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from atropos_exp.runs.checkpoints import Checkpoints, find_latest

# System calls that a save makes.
CALLS = ("open", "write", "fsync", "rename", "mkdir", "rmdir", "unlink")
FILES = {"model/model.safetensors": 3000, "optimizer.safetensors": 5000, "trainer.json": 20}


def content(step: int, name: str) -> bytes:
    """What file `name` of checkpoint `step` must hold."""
    return random.Random(f"{step}/{name}").randbytes(FILES[name])


def writer(step: int) -> Callable[[Path], None]:
    """Writes with plain system calls, so that the faults below reach it too."""

    def write(folder: Path) -> None:
        (folder / "model").mkdir()
        for name in FILES:
            descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT)
            try:
                os.write(descriptor, content(step, name))
            finally:
                os.close(descriptor)

    return write


def save(folder: Path, *steps: int, keep: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep=keep)
    for step in steps:
        checkpoints.save(step, writer(step), state_of(step))
    return checkpoints


def state_of(step: int) -> dict[str, Any]:
    return {"cursor": {"epoch": 1, "index": step * 32}, "learning_rate": step / 3}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_intact(folder: Path) -> int:
    """The newest intact checkpoint holds exactly what was saved under its step, which is returned."""
    found, _ = find_latest(folder)
    assert found is not None, f"no intact checkpoint among {names(folder)}"
    for name in FILES:
        assert (found.folder / name).read_bytes() == content(found.step, name)
    assert found.state == state_of(found.step)
    return found.step
