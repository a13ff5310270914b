"""What can be known of an engine's surroundings before any process of the run starts."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from atropos_exp.child import child_environment

LOOK_SECONDS = 30.0
_FIND = (
    "import importlib.util, sys; "
    "print('\\n'.join(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))"
)


def has_gpu() -> bool:
    """Whether the NVIDIA driver shows a device. Imports nothing."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def missing_modules(python: str, modules: Sequence[str]) -> str | None:
    """Why `python` cannot import all of `modules`, or None. Looks for them without importing them."""
    try:
        found = subprocess.run(
            [python, "-c", _FIND, *modules],
            capture_output=True,
            text=True,
            timeout=LOOK_SECONDS,
            check=False,
            env=child_environment(python),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"it does not run ({error})"
    if found.returncode != 0:
        return f"it does not run (exit code {found.returncode}: {found.stderr.strip()[-200:]})"
    missing = found.stdout.split()
    return f"it cannot import {', '.join(missing)}" if missing else None
