from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from atropos_exp.report.__main__ import main
from atropos_exp.report.charts import chart_specs
from atropos_exp.report.page import write_report
from atropos_exp.report.run_data import MAX_POINTS, columns, load_run
from atropos_exp.runs.files import RunFiles
from atropos_exp.types import StepMetrics

ATTACK = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"


def page_of(parse: Any, *folders: Path) -> Any:
    return parse(write_report(folders).read_text())


def titles(page: Any) -> list[str]:
    return [chart["title"] for chart in page.data["charts"]]


def test_the_report_of_a_finished_run_says_what_happened(tmp_path: Path, write_run: Any, parse: Any) -> None:
    page = page_of(parse, write_run(tmp_path / "run", steps=4))
    for words in (
        "trial finished", "model Packaged (tiny)", "torch 2.13.0", "git abc1234", "python -m atropos_exp.run seed=0",
        "Held-out accuracy 0.3 → 0.9", "Reward 0.375 → 0.75", "Steps 4 of 4 planned", "Syncs proven 5 of 5",
        "Early: step 1", "Late: step 4", "2 at 1", "2 at 4", "reward 1 advantage +0.5", "config.yaml", "max_steps: 4",
        "Zero at every step: Reference KL.", "rollout 500 ms 50.0%", "other 100 ms 10.0%",
    ):  # fmt: skip
        assert words in page.text, words
    assert "Not in this report" not in page.text
    assert titles(page) == [
        "Reward", "Held-out accuracy: arithmetic", "Response length", "Groups that teach nothing", "Gradient norm",
        "Learning rate", "Entropy", "Mismatch KL", "Logprob gap", "Sources", "Canary gap after sync", "Time by stage",
    ]  # fmt: skip
    (run,) = page.data["runs"]
    assert run["values"]["reward/mean"] == [None, 0.375, 0.5, 0.625, 0.75]
    assert run["x"] == {"step": [0, 1, 2, 3, 4], "minutes": pytest.approx([s / 60 for s in range(1, 6)])}
    # 30 of 100: Wilson's interval
    assert run["values"]["eval/arithmetic/accuracy_ci_low"][0] == pytest.approx(0.2189, abs=1e-4)


def test_nothing_is_fetched(tmp_path: Path, write_run: Any, parse: Any) -> None:
    html = write_report([write_run(tmp_path / "run", steps=2)]).read_text()
    assert re.findall(r"https?://[^\s\"'<]+", html) == ["http://www.w3.org/2000/svg"]  # a name, not an address
    page = parse(html)
    assert not any({"src", "href"} & attributes.keys() for _, attributes in page.elements)
    assert len(html) < 200_000


def test_what_a_model_wrote_stays_text(tmp_path: Path, write_run: Any, parse: Any) -> None:
    clean = page_of(parse, write_run(tmp_path / "clean", steps=2, status="failed"))
    page = page_of(parse, write_run(tmp_path / "run", steps=2, status="failed", text=ATTACK))
    assert [name for name, _ in page.elements] == [name for name, _ in clean.elements]
    assert f"1+1={ATTACK}" in page.text
    assert f"it broke {ATTACK}" in page.text
    several = page_of(parse, tmp_path / "clean", tmp_path / "run")  # the attack is now part of a run's name
    assert several.count("img") == 0 and several.count("script") == 2


def test_an_unfinished_run_with_a_torn_line_and_missing_files(tmp_path: Path, write_run: Any, parse: Any) -> None:
    folder = write_run(tmp_path / "run", steps=5, status=None)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')
    (folder / "config.yaml").unlink()
    (folder / "command.txt").unlink()
    shutil.rmtree(folder / "samples")
    page = page_of(parse, folder)
    for words in (
        "run unfinished", "metrics.jsonl: 1 torn line left out", "summary.json is not there",
        "config.yaml is not there", "the command line is unknown", "there are no sample rollouts", "Steps 5",
        "Syncs proven 6",
    ):  # fmt: skip
        assert words in page.text, words
    assert page.data["runs"][0]["x"]["step"] == [0, 1, 2, 3, 4, 5]


def test_a_run_that_goes_on_after_its_summary_is_unfinished(tmp_path: Path, write_run: Any) -> None:
    folder = write_run(tmp_path / "run", steps=3, status="stopped")
    assert load_run(folder).status == "stopped"
    RunFiles(folder, first_step=4).log(StepMetrics(step=4, values={"rollout/num": 8.0}))
    assert load_run(folder).status == "unfinished"


@pytest.mark.parametrize("damage", ["summary.json", "config.yaml"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str, write_run: Any, parse: Any) -> None:
    folder = write_run(tmp_path / "run", steps=2)
    (folder / damage).write_text('{"status": [unclosed')
    assert f"{damage} is damaged" in page_of(parse, folder).text


def test_a_run_that_never_stepped_and_one_of_a_single_step(tmp_path: Path, write_run: Any, parse: Any) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "run.json").write_text("{}")
    page = page_of(parse, empty)
    assert "There are no steps to draw yet." in page.text
    assert page.count("figure") == 0
    one = page_of(parse, write_run(tmp_path / "one", steps=1))
    assert "Only: step 1" in one.text
    assert one.data["runs"][0]["values"]["reward/mean"] == [None, 0.75]


def test_odd_values_do_not_break_it(tmp_path: Path, write_run: Any, parse: Any) -> None:
    folder = write_run(tmp_path / "run", steps=2)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    row = json.loads(lines[-1]) | {"reward/std": None, "eval/arithmetic/accuracy_ci_low": None, "lr": "text", "new": 1}
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(row), json.dumps(row), "[]"]) + "\n")
    (folder / "samples" / "step_000001.jsonl").write_text('{"reward": "high", "completion": null}\n{"torn')
    (folder / "summary.json").write_text('{"status": 3, "sync": [], "versions": null, "rollouts": 1}')
    page = page_of(parse, folder)
    assert "(empty)" in page.text
    assert page.data["runs"][0]["x"]["step"] == [0, 1, 2]  # the later of two lines of one step


def test_several_runs_are_told_apart_by_what_differs(tmp_path: Path, write_run: Any, parse: Any) -> None:
    write_run(tmp_path / "sweep" / "0", steps=3, seed=0)
    write_run(tmp_path / "sweep" / "1", steps=3, seed=1, status="failed")
    out = tmp_path / "both.html"
    assert main([str(tmp_path / "sweep"), "--out", str(out)]) == 0
    page = parse(out.read_text())
    assert [run["label"] for run in page.data["runs"]] == ["seed=0", "seed=1"]
    assert "2 runs 1 finished, 1 failed" in page.text
    assert "seed=1: Failed. it broke 2" in page.text
    assert "Run seed seed=0 0 seed=1 1" in page.text  # the table of what differs
    assert sum("data-run" in attributes for _, attributes in page.elements) == 2


def test_runs_of_equal_configuration_are_named_by_folder(tmp_path: Path, write_run: Any, parse: Any) -> None:
    folders = [write_run(tmp_path / day / "12-00-00", steps=1) for day in ("monday", "tuesday")]
    assert [run["label"] for run in page_of(parse, *folders).data["runs"]] == ["monday/12-00-00", "tuesday/12-00-00"]
    assert "All runs have the same." in page_of(parse, *folders).text


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_a_long_run_is_thinned_to_means(tmp_path: Path) -> None:
    rows = [{"step": float(step), "a": float(step % 7), "b": 1.0 if step % 20 == 0 else None} for step in range(10_000)]
    thin = columns(rows)
    assert len(thin["step"]) <= MAX_POINTS
    assert thin["a"][0] == pytest.approx(3.0)  # of the first 7 steps
    assert thin["step"][0] == 3.0
    assert set(thin["b"]) == {None, 1.0}
    start = time.perf_counter()
    files = RunFiles(tmp_path / "long", first_step=0)
    names = [f"loss/{at}" for at in range(30)]
    (tmp_path / "long" / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": step, "reward/mean": 0.5} | dict.fromkeys(names, 0.1)) + "\n" for step in range(10_000)
        )
    )
    assert len(write_report([files.folder]).read_text()) < 2_000_000
    assert time.perf_counter() - start < 10


def test_a_comparison_of_runs_overwrites_no_report(tmp_path: Path, write_run: Any, capsys: Any) -> None:
    runs = [write_run(tmp_path / "demo" / name, steps=2) for name in ("one", "two")]
    for run in runs:
        (run / "report.html").write_text("its own")
    assert main([str(run) for run in runs]) == 0
    target = tmp_path / "demo" / "comparison.html"
    assert capsys.readouterr().out == f"{target}\n" and "2 runs" in target.read_text()
    assert [(run / "report.html").read_text() for run in runs] == ["its own", "its own"]
    assert main([str(runs[0]), "--out", "/proc/x/report.html"]) == 2
    assert capsys.readouterr().err == "report: /proc/x: No such file or directory; --out names another file\n"


def test_evaluations_of_an_environment_have_a_chart_of_their_own() -> None:
    names = ["reward/mean", "environment/gsm8k_0/eval_percent_correct", "environment/gsm8k_0/n"]
    [chart] = [chart for chart in chart_specs(names) if chart["title"].startswith("Environment")]
    assert chart["title"] == "Environment gsm8k_0"
    assert [(series["name"], series["label"]) for series in chart["series"]] == [
        ("environment/gsm8k_0/eval_percent_correct", "eval_percent_correct"),
        ("environment/gsm8k_0/n", "n"),
    ]
