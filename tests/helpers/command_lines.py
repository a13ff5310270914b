"""Many command lines of the real program at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# Runs many command lines through the real entry point, each in a process of its own that inherits the imports.
DRIVER = """
import json, os, sys
from atropos_exp.run import main
codes = []
for number, arguments in enumerate(json.loads(sys.argv[1])):
    os.makedirs(f"{number}/empty")
    child = os.fork()
    if child == 0:
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{number}/{name}", os.O_CREAT | os.O_WRONLY), stream)
        os.chdir(f"{number}/empty")
        sys.argv[1:] = arguments
        main()  # leaves by SystemExit
        os._exit(99)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""


def answers_to(command_lines: Sequence[Sequence[str]], folder: Path) -> list[tuple[int, Path]]:
    """Exit code of each, and the folder with out, err and the working directory `empty`."""
    command = [sys.executable, "-c", DRIVER, json.dumps(command_lines)]
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return [(code, folder / str(number)) for number, code in enumerate(json.loads(done.stdout))]
