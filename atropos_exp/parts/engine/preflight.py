"""Checks of an engine's environment before any process of the run starts."""

import os
import sys
from pathlib import Path

from atropos_exp.processes.child import IMPORT_ROOT
from atropos_exp.processes.interpreters import missing_modules

NEEDS = ("msgpack", "xxhash", "safetensors", "starlette", "uvicorn", "numpy")  # of our server, besides the engine


def has_gpu() -> bool:
    """Whether the NVIDIA driver shows a GPU. Imports nothing."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def interpreter(python: str | None, *, environment: str) -> str:
    """The interpreter that runs the server: `python` if it is configured, otherwise that of a virtual environment with
    the name `environment` ("": none) in the checkout, otherwise the trainer's own."""
    if python is not None:
        return os.path.expanduser(python)
    beside = IMPORT_ROOT / environment / "bin" / "python"
    return str(beside) if environment and beside.is_file() else sys.executable


def environment_problems(*, option: str, title: str, python: str, is_own: bool, install: str) -> list[str]:
    """Why the interpreter `python` cannot run the engine and how to get one that can: one sentence, or none.

    `option` and `title`: the engine's name in conf/engine and in text. `is_own`: no interpreter was configured.
    `install`: how to make an environment for it.
    """
    missing = missing_modules(python, [option, *NEEDS, "atropos_exp"])
    if missing is None:
        return []
    where = "engine.python (null: the trainer's own)" if is_own else "engine.python"
    machine = "this machine shows no NVIDIA GPU and " if not has_gpu() else ""
    return [
        f"engine={option} needs an interpreter that can import {option}, but {machine}{where} is {python} and "
        f"{missing}; set engine.python to the interpreter of an environment with {title} ({install}), or use engine=hf"
    ]
