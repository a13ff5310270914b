from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from atropos_exp.runs.files import RunFiles, note_command, read_json_lines, read_metrics, read_rows, write_summary
from atropos_exp.runs.summary import summarize_run
from atropos_exp.types import SampleRecord, StepMetrics
from tests.helpers.paths import ROOT


def step(number: int, **values: float) -> StepMetrics:
    return StepMetrics(step=number, values={"reward/mean": number / 10, "rollout/num": 4.0} | values)


def test_a_value_that_is_not_finite_is_null_and_every_line_is_json(tmp_path: Path) -> None:
    files = RunFiles(tmp_path, first_step=0)
    files.log(StepMetrics(step=1, values={"a": float("nan"), "b": float("inf"), "c": 0.1 + 0.2}))
    text = (tmp_path / "metrics.jsonl").read_text()  # before closing: each line is flushed

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is no JSON")

    assert json.loads(text, parse_constant=refuse) == {"step": 1, "a": None, "b": None, "c": 0.1 + 0.2}


def test_resuming_forgets_the_steps_that_run_again_and_a_torn_line(tmp_path: Path) -> None:
    files = RunFiles(tmp_path, first_step=0)
    record = SampleRecord(prompt_id="p", prompt="1+1=", completion="2", reward=1.0, advantage=0.5, lag=0)
    for number in range(6):
        files.log(step(number))
        files.samples(number, [record])
    journal = tmp_path / "rollouts" / "step_000005.parquet"
    journal.parent.mkdir()
    journal.touch()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "reward/me')  # what a kill leaves

    again = RunFiles(tmp_path, first_step=4)
    again.log(step(4, lr=0.5))
    assert [row.step for row in read_rows(tmp_path)] == [0, 1, 2, 3, 4]
    assert read_rows(tmp_path)[4]["lr"] == 0.5
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        f"step_{number:06d}.jsonl" for number in range(4)
    ]
    assert journal.exists()  # it is what the step runs again with
    RunFiles(tmp_path, first_step=0)
    assert read_rows(tmp_path) == []


def test_samples_come_back_as_written(tmp_path: Path) -> None:
    record = SampleRecord(
        prompt_id="p", prompt="größer?\n<b>", completion="\ud800 half a pair \u2028", reward=0.5, advantage=-1.0, lag=2
    )
    RunFiles(tmp_path, first_step=0).samples(12, [record, record])
    (path,) = (tmp_path / "samples").iterdir()
    assert path.name == "step_000012.jsonl"
    (first, second), num_bad = read_json_lines(path)
    assert num_bad == 0
    assert first == second
    assert (first["prompt"], first["completion"]) == ("größer?\n<b>", "? half a pair \u2028")
    assert (first["reward"], first["advantage"], first["lag"]) == (0.5, -1.0, 2)


def test_lines_that_are_no_rows_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == ([], 0)
    path.write_bytes(b'{"step": 1, "a": 2}\n[1, 2]\n{"no": "step"}\n\xff\xfe{\n{"step": 2}')
    assert read_metrics(path) == ([{"step": 1, "a": 2}, {"step": 2}], 3)


def test_a_killed_writer_leaves_whole_lines(tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
from atropos_exp.runs.files import RunFiles
from atropos_exp.types import StepMetrics
files = RunFiles(Path({str(tmp_path)!r}), first_step=0)
number = 0
while True:
    files.log(StepMetrics(step=number, values={{f"loss/{{at}}": 1 / 3 for at in range(50)}}))
    number += 1
    if number == 200:
        print("far enough", flush=True)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
    rows, num_bad = read_metrics(tmp_path / "metrics.jsonl")
    assert num_bad == 0
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert len(rows) >= 200


def test_the_command_is_kept_without_its_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "planted-token")
    note_command(tmp_path, ["python", "-m", "atropos_exp.run", "name=my run", "x=planted-token", "engine.api_key=abc"])
    assert (tmp_path / "command.txt").read_text() == (
        "python -m atropos_exp.run 'name=my run' x=<redacted> engine.api_key=<redacted>\n"
    )


def test_summary_by_hand(tmp_path: Path) -> None:
    files = RunFiles(tmp_path, first_step=0)
    files.log(step(0, **{"reward/mean": float("nan"), "rollout/num": 0.0, "time/step_s": 1.0,
                         "eval/a/accuracy": 0.25, "eval/b/accuracy": 0.75,
                         "sync/bytes": 10.0, "time/sync_s": 0.1, "sync/canary_gap_max": 0.3}))  # fmt: skip
    files.log(step(1, **{"time/step_s": 2.0, "rollout/num_tokens": 300.0, "rollout/num_local": 4.0,
                         "rollout/dropped_timeout": 2.0, "sync/bytes": 20.0, "time/sync_s": 0.3,
                         "sync/canary_gap_max": 0.1}))  # fmt: skip
    files.log(step(2, **{"time/step_s": 1.0, "rollout/num_tokens": 100.0, "rollout/num_local": 1.0,
                         "rollout/num_atropos": 3.0, "rollout/dropped_timeout": 1.0, "rollout/dropped_stale": 5.0,
                         "eval/a/accuracy": 1.0, "eval/b/accuracy": 0.5}))  # fmt: skip
    summary = summarize_run(
        read_rows(tmp_path), status="failed", error="the engine died", policy_version=2, resumed_from=None, seed=7,
        git="abc", versions={"torch": "2"}, config_hash="f00", num_failed_syncs=1,
        num_repeated_syncs=3, dropped_waiting={"mask_value": 4, "stale": 1},
    )  # fmt: skip
    write_summary(tmp_path, summary)
    read = json.loads((tmp_path / "summary.json").read_text())
    expected = {
        "status": "failed", "error": "the engine died", "steps": 2, "policy_version": 2,
        "reward_first": 0.1, "reward_last": 0.2, "eval_first": 0.5, "eval_last": 0.75,
        "wall_seconds": 4.0, "tokens_per_second": 100.0,
        "rollouts": {"atropos": 3, "local": 5, "dropped": {"mask_value": 4, "stale": 6, "timeout": 3}},
        "sync": {"count": 6, "verified": 5, "seconds_mean": 0.2, "bytes": 20, "canary_gap_max": 0.3},
        "resumed_from": None, "seed": 7, "git": "abc", "versions": {"torch": "2"}, "config_hash": "f00",
    }  # fmt: skip
    assert read == expected
    assert list(read) == list(expected)  # for people, in this order


def test_the_summary_of_a_run_that_never_stepped() -> None:
    summary = summarize_run(
        [], status="failed", error="no engine", policy_version=0, resumed_from=None, seed=0, git=None, versions={},
        config_hash="",
    )  # fmt: skip
    assert (summary["steps"], summary["reward_last"], summary["tokens_per_second"]) == (0, None, None)
    assert (summary["sync"]["count"], summary["wall_seconds"]) == (0, 0)
