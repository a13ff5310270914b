"""What every test starts from."""

from __future__ import annotations

import os

# Before torch is imported by anything: tests run side by side on few cores, and results must not depend on how many.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait must not take a core from a child process
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test fetches anything
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a FutureWarning of ray, which verl imports

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` need one. GPU_TESTS_DEVICE=cpu runs those that can on the CPU, to try the tests themselves."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked or os.environ.get("GPU_TESTS_DEVICE") == "cpu":
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))
