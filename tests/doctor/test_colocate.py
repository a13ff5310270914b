"""Memory of a GPU that trainer and engine share, or take turns on."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from atropos_exp.config.build import build
from atropos_exp.doctor import memory
from atropos_exp.doctor.line import Level
from atropos_exp.doctor.machine import check_memory
from atropos_exp.doctor.memory import Estimate
from atropos_exp.parts.model.tiny import WEIGHTS
from tests.helpers.paths import CONF

NEEDS = Estimate(
    trainer={"weights": 4, "gradients": 4, "optimizer": 8, "activations": 20, "sync bucket": 1}, engine={"weights": 2}
)


def test_the_larger_of_an_update_and_of_sampling_counts() -> None:
    assert NEEDS.peak(engine=10, takes_turns=False) == 37 + 10
    assert NEEDS.peak(engine=10, takes_turns=True) == 37  # the update: 13 + 10 while it samples is less
    assert NEEDS.peak(engine=30, takes_turns=True) == 13 + 30


@pytest.mark.parametrize(("share", "level"), [(0.9, Level.fail), (0.5, Level.ok)])
def test_sglangs_share_of_a_gpu_counts(
    share: float, level: Level, checked: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of a GPU of 2 GiB, beside a trainer that needs some hundred MiB."""
    told = tmp_path / "nvidia-smi"
    told.write_text("#!/bin/sh\necho '0, Small GPU, 2048, 0'\n")
    told.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    run = checked()
    settings = yaml.safe_load((CONF / "engine" / "sglang.yaml").read_text()) | {"mem_fraction_static": share}
    run = replace(run, device="cuda", parts=replace(run.parts, engine=build(settings, "engine")))
    (line,) = check_memory(run, WEIGHTS)
    needed = memory.estimate(run, memory.Shape.of(WEIGHTS)).trainer_total + int(share * 2 * memory.GIB)
    assert f"about {memory.human(needed)} on the fullest of 2.0 GiB" in line.text
    assert line.level is level, line
