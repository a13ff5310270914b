"""What the engines that live in an environment of their own have in common before they are driven."""

from __future__ import annotations

from atropos_exp.engine.preflight import has_gpu, missing_modules


def environment_problems(*, option: str, module: str, title: str, python: str | None) -> list[str]:
    """Why the configured interpreter cannot run the engine: one sentence, or nothing."""
    import sys

    interpreter = python or sys.executable
    missing = missing_modules(interpreter, [module])
    if missing is None:
        return []
    where = "engine.python" if python else "engine.python (null: the trainer's own)"
    machine = "this machine shows no NVIDIA GPU and " if not has_gpu() else ""
    return [
        f"engine={option} needs an interpreter that can import {module}, but {machine}{where} is {interpreter} and "
        f"{missing}; set engine.python to the interpreter of an environment with {title}, or use engine=hf"
    ]
