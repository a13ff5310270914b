"""What the engines that live in an environment of their own have in common before they are driven."""

from __future__ import annotations

import sys
from pathlib import Path

from atropos_exp.engine.preflight import has_gpu, missing_modules

NEEDS = ("msgpack", "xxhash", "safetensors", "starlette", "uvicorn", "numpy")  # of our server, besides the engine
BESIDE_CHECKOUT = ".venv-vllm"  # made by `make vllm-cpu`


def interpreter(python: str | None, *, environment: str) -> str:
    """Who runs the server: the configured one; else that of an environment of this name beside the checkout; else the
    trainer's own."""
    if python is not None:
        return python
    beside = Path(__file__).resolve().parents[2] / environment / "bin" / "python"
    return str(beside) if beside.is_file() else sys.executable


def environment_problems(*, option: str, title: str, python: str, is_own: bool, install: str) -> list[str]:
    """Why this interpreter cannot run the engine: one sentence that says how to get one that can, or nothing."""
    missing = missing_modules(python, [option, *NEEDS, "atropos_exp"])
    if missing is None:
        return []
    where = "engine.python (null: the trainer's own)" if is_own else "engine.python"
    machine = "this machine shows no NVIDIA GPU and " if not has_gpu() else ""
    return [
        f"engine={option} needs an interpreter that can import {option}, but {machine}{where} is {python} and "
        f"{missing}; set engine.python to the interpreter of an environment with {title} ({install}), or use engine=hf"
    ]
