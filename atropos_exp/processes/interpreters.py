"""Whether another Python interpreter can run what it is meant to."""

import subprocess
from collections.abc import Sequence

from atropos_exp.processes.child import child_environment

FIND_SECONDS = 30.0  # for an interpreter to find its modules
_SIGN = "interpreter"  # what a Python prints first, and hardly another program
_FIND = (
    f"import importlib.util, sys; print({_SIGN!r}); "
    "print('\\n'.join(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))"
)


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
        said = (found.stderr.strip().splitlines() or [""])[-1][-200:]
        return f"it does not run (exit code {found.returncode}: {said})"
    first, *missing = found.stdout.split() or [""]
    if first != _SIGN:
        return "it is no Python interpreter"
    return f"it cannot import {', '.join(missing)}" if missing else None
