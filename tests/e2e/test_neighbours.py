"""Libraries that a run does not use may be installed beside it, whatever their version."""

import os
import subprocess
import sys

import pytest

from tests.helpers.experiments import command, environment, summary

TRL = "trl==1.16.0"  # without AutoModelForCausalLMWithValueHead, which verl 0.9 imports where it finds TRL


@pytest.mark.slow
def test_a_run_trains_where_trl_is_installed(tmp_path):
    target, folder = tmp_path / "trl", tmp_path / "run"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), TRL]
    done = subprocess.run(install, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        pytest.skip(f"{TRL} cannot be installed here: {done.stderr[-300:]}")
    environ = {**environment(), "PYTHONPATH": os.pathsep.join([environment()["PYTHONPATH"], str(target)])}
    found = subprocess.run(
        [sys.executable, "-c", "import importlib.util; print(importlib.util.find_spec('trl').origin)"],
        env=environ, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert found.stdout.startswith(str(target)), found.stderr
    run = subprocess.run(
        command(folder, "trainer.max_steps=1"), env=environ, capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr
    assert summary(folder)["policy_version"] == 1
