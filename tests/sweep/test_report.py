"""The page of a sweep over planted results, with what can go wrong in it, and in a real browser."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from atropos_exp.report.sweep_data import load_sweep
from atropos_exp.report.sweep_page import write_sweep_report
from atropos_exp.runs.atomic import write_atomic
from atropos_exp.runs.files import RunFiles
from atropos_exp.runs.sweep_folder import Phase, Request, RunRecord, RunState, SweepFolder
from atropos_exp.types import StepMetrics
from tests.helpers.page_text import Text

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
ATTACK = "</script><img src=x onerror=alert(1)>"
NUM_PROMPTS = 100
# held-out accuracy after the last step, by point and seed; None: the run failed
PLANTED: dict[str, list[float | None]] = {
    "base": [0.60, 0.70, 0.65],
    "better": [0.80, 0.91, 0.84],
    "noise": [0.75, 0.55, 0.66],
    "single": [0.90, None, None],
    "dead": [None, None, None],
    "other": [0.70, 0.80, 0.75],  # judged on fewer prompts
}


def planted(folder: Path, points: dict[str, list[float | None]] = PLANTED, *, kind: str = "grid") -> SweepFolder:
    sweep = SweepFolder(folder)
    sweep.write_request(
        Request(kind=kind, identity="", name="planted", created="2026-01-01T00:00:00", command=["python", ATTACK],
                cwd=str(folder), axes=["kind"], baseline=0 if kind == "grid" else None, settings={}, cluster={})
    )  # fmt: skip
    number = 0
    for point, (name, finals) in enumerate(points.items()):
        for seed, final in enumerate(finals):
            sweep.add_record(RunRecord(number=number, point=point, values={"kind": name}, seed=seed, config_hash="",
                                       max_steps=4, num_devices=2))  # fmt: skip
            prompts = 50 if name == "other" else NUM_PROMPTS
            write_atomic(sweep.config_path(number), f"eval:\n  num_prompts: {prompts}\nreward: {{}}\n")
            write_run(sweep.run_folder(number), final, prompts)
            sweep.note(event="started", number=number, time=1000.0)
            sweep.note(event="ended", number=number, time=1036.0)
            number += 1
    return sweep


def write_run(folder: Path, final: float | None, prompts: int) -> None:
    files = RunFiles(folder, first_step=0)
    for step in range(5 if final is not None else 2):
        share = step / 4
        values = {"time/step_s": 1.0, "reward/mean": 0.1 + share, "rollout/num_tokens": 250.0}
        if step in (0, 2, 4):
            # the evaluation in the middle is the best one
            accuracy = 0.3 if step == 0 else (final or 0.3) + (0.05 if step == 2 else 0.0)
            values |= {"eval/sums/accuracy": accuracy, "eval/sums/num": float(prompts)}
        files.log(StepMetrics(step=step, values=values))


def states_of(sweep: SweepFolder, finals: Sequence[float | None]) -> dict[int, RunState]:
    return {
        number: RunState(phase=Phase.FINISHED) if final is not None
        else RunState(phase=Phase.FAILED, reason=f"out of memory {ATTACK}")
        for number, final in enumerate(finals)
    }  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sweep = planted(tmp_path_factory.mktemp("planted"))
    finals = [final for values in PLANTED.values() for final in values]
    return write_sweep_report(sweep, states_of(sweep, finals))


def test_it_says_plainly_what_the_seeds_support(page: Path) -> None:
    text = Text(page.read_text()).text
    # differences 0.20 0.21 0.19: mean 0.2, deviation 0.01
    assert "kind=better against kind=base: Better than the baseline, by these 3 seeds. +0.2 held-out accuracy" in text
    assert "No significant difference between kind=base and: kind=noise." in text
    assert "kind=single: One seed only: it cannot tell a difference from chance." in text
    assert "kind=dead: not compared, no run of this point finished." in text
    assert (
        "kind=other: not compared, judged on other held-out prompts, or by another reward, than the baseline." in text
    )
    assert "5 of 18 runs are not finished" in text


def test_its_numbers_are_the_planted_ones(page: Path) -> None:
    text = Text(page.read_text()).text
    # by hand: t(0.975, 2) = 4.30265, sd(base) = 0.05
    assert "3 of 3 0.65 [0.526, 0.774]" in text
    assert "0.7 [0.576, 0.824]" in text  # best: 0.05 above the final one, at step 2
    # better - base: 0.2 +- 4.30265 * 0.01 / sqrt 3; t = 34.64, p = 0.00083, the smaller of two
    assert "+0.2 [+0.175, +0.225] 0.0017 better" in text
    assert "1 of 3 0.9 one seed" in text
    # 18 runs of 36 s on 2 devices; tokens: 13 whole runs of 5 rows, 5 of 2 rows
    assert f"All {18 * 36 * 2 / 3600:.3g} {(13 * 5 + 5 * 2) * 250:,}" in text


def test_curves_are_means_of_finished_runs_with_bands(page: Path) -> None:
    runs = Text(page.read_text()).data["runs"]
    assert [run["label"].split(" ")[0] for run in runs] == [f"kind={name}" for name in PLANTED]
    base = runs[0]
    assert base["x"]["step"] == [0, 1, 2, 3, 4]
    assert base["values"]["eval"] == pytest.approx([0.3, None, 0.7, None, 0.65], nan_ok=True)
    assert base["values"]["eval_low"][4] == pytest.approx(0.65 - 4.302653 * 0.05 / 3**0.5)
    assert "eval_low" not in runs[3]["values"], "one seed has no band"


def test_reasons_are_shown_and_are_no_markup(page: Path) -> None:
    html = page.read_text()
    assert ATTACK not in html
    text = Text(html).text
    assert text.count("out of memory </script>") == 5


def test_shares_of_a_grid_and_the_end_of_an_empty_one(tmp_path: Path) -> None:
    # 0.6 0.8 against 0.6 0.8: all variance is between seeds
    sweep = planted(tmp_path / "seeds", {"a": [0.6, 0.8], "b": [0.6, 0.8]})
    text = Text(write_sweep_report(sweep, states_of(sweep, [1.0] * 4)).read_text()).text
    assert "kind 0% interactions and seeds 100%" in text
    sweep = planted(tmp_path / "none", {"a": [None], "b": [None]})
    data = load_sweep(sweep, states_of(sweep, [None, None]))
    assert [point.final for point in data.points] == [None, None]
    for number, what in enumerate(("a step or two was done", "nothing was")):
        text = Text(write_sweep_report(sweep, states_of(sweep, [None] * 2)).read_text()).text
        assert "no run of this point finished" in text and text.count("out of memory") == 2, what
        if number == 0:
            for run in (0, 1):
                (sweep.run_folder(run) / "metrics.jsonl").unlink()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; the page was not drawn")
def test_a_browser_draws_it_without_an_error(page: Path, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
               "--disable-background-networking", "--enable-logging=stderr", "--virtual-time-budget=3000",
               "--window-size=1400,2200", f"--user-data-dir={tmp_path}", "--dump-dom", page.as_uri()]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert [line for line in shown.stderr.splitlines() if "CONSOLE" in line] == []
    charts = Text(page.read_text()).data["charts"]
    assert shown.stdout.count('class="curve"') == len(PLANTED) * len(charts)
    assert shown.stdout.count('class="interval"') == 5, "every point of which a run finished"
