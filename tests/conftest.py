"""What every test starts from."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

# Before torch is imported by anything: tests run side by side on few cores, and results must not depend on how many.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait must not take a core from a child process
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test fetches anything
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a FutureWarning of ray, which verl imports

import pytest

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))  # `tests.helpers`, `tests.parts.reward.misbehaving`, ...
pytest.register_assert_rewrite("tests.helpers", "tests.parts", "tests.runs", "tests.atropos_conformance")
# They run first, so that none of them is left over for one worker at the end (pyproject: --no-loadscope-reorder).
LONG = ("e2e", "atropos_conformance", "sweep", "doctor", "envs", "test_extending.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu`, `vllm` or `sglang` need one. GPU_TESTS_DEVICE=cpu runs those of a GPU that can on the CPU, to
    try the tests."""
    items.sort(key=lambda item: item.path.relative_to(FOLDER).parts[0] not in LONG)  # stable
    _skip_unless(items, "gpu", _has_gpu, "no NVIDIA GPU")
    for name, folder in (("vllm", ".venv-vllm"), ("sglang", ".venv-sglang-cpu")):
        reason = f"there is no {folder}: `make test-{name}` makes it and runs these"
        _skip_unless(items, name, (FOLDER.parent / folder / "bin" / "python").exists, reason)


def pytest_collection_finish() -> None:
    """What was imported by now stays to the end, and the garbage collector need not walk it again and again."""
    gc.freeze()


def _skip_unless(items: list[pytest.Item], marker: str, is_there: Callable[[], bool], reason: str) -> None:
    marked = [item for item in items if item.get_closest_marker(marker)]
    if marked and not is_there():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


def _has_gpu() -> bool:
    if os.environ.get("GPU_TESTS_DEVICE") == "cpu":
        return True
    import torch

    return torch.cuda.is_available()
