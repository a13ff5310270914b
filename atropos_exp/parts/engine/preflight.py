"""Checks of an engine's environment before any process of the run starts."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from atropos_exp.processes.child import IMPORT_ROOT, child_environment

FIND_SECONDS = 30.0  # for an interpreter to find its modules
NEEDS = ("msgpack", "xxhash", "safetensors", "starlette", "uvicorn", "numpy")  # of our server, besides the engine
_FIND = (
    "import importlib.util, sys; "
    "print('\\n'.join(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))"
)


def has_gpu() -> bool:
    """Whether the NVIDIA driver shows a GPU. Imports nothing."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def missing_modules(python: str, modules: Sequence[str]) -> str | None:
    """Why the interpreter `python` cannot import all of `modules`, or None. It finds them without importing them."""
    try:
        found = subprocess.run(
            [python, "-c", _FIND, *modules],
            capture_output=True,
            text=True,
            timeout=FIND_SECONDS,
            check=False,
            env=child_environment(python),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"it does not run ({error})"
    if found.returncode != 0:
        return f"it does not run (exit code {found.returncode}: {found.stderr.strip()[-200:]})"
    missing = found.stdout.split()
    return f"it cannot import {', '.join(missing)}" if missing else None


def interpreter(python: str | None, *, environment: str) -> str:
    """The interpreter that runs the server: `python` if it is configured, otherwise that of a virtual environment with
    the name `environment` in the checkout, otherwise the trainer's own."""
    if python is not None:
        return python
    beside = IMPORT_ROOT / environment / "bin" / "python"
    return str(beside) if beside.is_file() else sys.executable


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
