from __future__ import annotations

import contextlib
import io
import os
import pty
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from atropos_exp.errors import UserError
from atropos_exp.parts.logger.console import Console, ConsoleLogger
from atropos_exp.parts.logger.none import NoLogger
from atropos_exp.parts.logger.step_line import LiveFigures, TimeLeft, clock, step_line
from atropos_exp.parts.logger.wandb import Wandb
from atropos_exp.types import RunDescription, StepMetrics
from tests.helpers.paths import CONF, ROOT

LOGGERS = CONF / "logger"
SUMMARY = {"status": "finished", "steps": 3, "reward_first": 0.25, "reward_last": 0.75, "wall_seconds": 62.4}


def step(number: int, **values: float) -> StepMetrics:
    common = {"reward/mean": 0.5, "reward/std": 0.25, "policy/version_lag_max": 1.0, "time/step_s": 2.0,
              "throughput/tokens_per_s": 12345.6, "length/response_mean": 5.25}  # fmt: skip
    return StepMetrics(step=number, values=common | values)


def logger(stream: Any, *, live: bool | None = None, every: int = 1) -> ConsoleLogger:
    settings = Console(live=live, every=every)
    run = RunDescription(folder=Path("outputs/trial"), config={}, name="trial", total_steps=30, resumed=False)
    return ConsoleLogger(settings, run, stream)


@pytest.mark.parametrize(("option", "schema"), [("console", Console), ("none", NoLogger), ("wandb", Wandb)])
def test_the_yaml_has_the_settings_of_the_schema(option: str, schema: Any) -> None:
    keys = yaml.safe_load((LOGGERS / f"{option}.yaml").read_text())
    assert keys.pop("_target_") == f"atropos_exp.parts.logger.{option}.{schema.__name__}"
    assert set(schema.model_fields) == set(keys)
    assert schema(**keys).model_fields_set == set(keys)


def test_a_line_says_the_step() -> None:
    line = step_line(step(7, **{"eval/a/accuracy": 0.6, "eval/b/accuracy": 0.7}), total_steps=120, left=62.0)
    assert line == ("step   7/120  reward 0.500 ±0.25  eval 0.650  length 5.2  lag 1  12,346 tok/s  2.00 s  ETA 1:02")
    assert step_line(StepMetrics(step=0, values={"reward/mean": float("nan")}), total_steps=9, left=None) == "step 0/9"


def test_without_a_terminal_every_step_is_one_plain_line() -> None:
    stream = io.StringIO()
    told = logger(stream)
    for number in range(1, 4):
        told.log(step(number))
    told.close(SUMMARY)
    lines = stream.getvalue().splitlines()
    assert [line[:11] for line in lines[:3]] == ["step  1/30 ", "step  2/30 ", "step  3/30 "]
    assert lines[2].endswith("ETA 0:54")  # 27 steps of 2 s
    assert lines[3] == "finished after 3 steps in 1:02: reward 0.250 → 0.750; see outputs/trial"
    assert "\x1b" not in stream.getvalue()


def test_every_tenth_line_and_the_evaluated_ones() -> None:
    stream = io.StringIO()
    told = logger(stream, every=10)
    for number in range(31):
        told.log(step(number, **({"eval/a/accuracy": 0.5} if number == 13 else {})))
    shown = [int(line.split("/")[0].removeprefix("step")) for line in stream.getvalue().splitlines()]
    assert shown == [0, 1, 10, 13, 20, 30]


def test_a_warning_is_said_once() -> None:
    stream = io.StringIO()
    told = logger(stream, every=1000)
    told.log(step(1))
    for number in (2, 3, 4):
        told.log(step(number, **{"rollout/dropped_timeout": 3.0, "update/skipped": float(number == 4)}))
    text = stream.getvalue()
    assert text.count("3 rollouts dropped: timeout") == 1
    assert "warning: step 2: 3 rollouts dropped" in text
    assert "warning: step 4: the loss or a gradient was not finite" in text


def test_a_terminal_gets_a_line_that_stays_in_place() -> None:
    controller, terminal = pty.openpty()
    try:
        with open(terminal, "w", closefd=False) as stream:
            told = logger(stream)
            for number in range(1, 4):
                told.log(step(number, **{"eval/a/accuracy": 0.6} if number == 2 else {}))
            told.close(SUMMARY)
        os.set_blocking(controller, False)
        shown = ""
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(controller, 1 << 16):
                shown += chunk.decode()
    finally:
        os.close(terminal)
        os.close(controller)
    assert "\x1b[" in shown  # the cursor was moved
    assert "3/30" in shown and "reward 0.50" in shown
    assert shown.count("ETA") < 12
    assert "step  2/30" in shown  # the evaluated step keeps a line of its own
    assert "finished after 3 steps" in shown


def test_the_live_figures_keep_the_last_evaluation_and_fit_80_columns() -> None:
    live = LiveFigures()
    live.after(step(1, **{"eval/a/accuracy": 0.625}), 60.0)
    figures = live.after(step(2), 58.0)
    assert figures == "reward 0.50 eval 0.62 lag 1 12.3k tok/s ETA 0:58"
    assert len("⠋ trial ━━━━━━━━━━━━ 12/120 ") + len(figures) <= 80


def test_a_closed_pipe_silences_the_console_and_not_the_run() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    stream = open(writing, "w", buffering=1)  # noqa: SIM115
    told = logger(stream)
    told.log(step(1))
    told.log(step(2))
    told.close(SUMMARY)
    with contextlib.suppress(BrokenPipeError):
        stream.close()


def test_time_left_follows_recent_steps() -> None:
    left = TimeLeft(100)
    assert left.after(StepMetrics(step=0, values={"time/step_s": 50.0})) is None  # step 0 trains nothing
    for number in range(1, 50):
        left.after(StepMetrics(step=number, values={"time/step_s": 9.0}))
    for number in range(50, 71):
        found = left.after(StepMetrics(step=number, values={"time/step_s": 1.0}))
    assert found == 30.0
    assert [clock(59.6), clock(0), clock(3601)] == ["1:00", "0:00", "1:00:01"]


def test_settings_are_checked() -> None:
    with pytest.raises(UserError, match=r"^every: got 0, expected at least 1"):
        Console(live=None, every=0)


def test_settings_import_no_heavy_library() -> None:
    import subprocess

    code = (
        "import sys, atropos_exp.parts.logger.wandb, atropos_exp.parts.logger.console, atropos_exp.parts.logger.none;"
        "print([m for m in ('torch','wandb','rich','verl','pyarrow','omegaconf') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert found.stdout.strip() == "[]"
