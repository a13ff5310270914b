"""One HTML file of one or more runs that opens offline: all styles, scripts and numbers are inside it."""

import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from atropos_exp.report.charts import STAGES, chart_specs, curve, line
from atropos_exp.report.details import all_metrics, configurations, run_labels, samples, stage_seconds, time_shares
from atropos_exp.report.html import tag
from atropos_exp.report.run_data import RunData, columns, find_runs, load_run
from atropos_exp.report.sections import comparison, header, sync_proof, tiles
from atropos_exp.report.shell import chart_figure, curves, document
from atropos_exp.runs.atomic import write_atomic


def write_report(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of the runs in `paths` (run folders, or folders of runs such as a sweep) and return its path.

    `out`: None is report.html in the folder that is given: of a run, or of several. Of several folders it is
    comparison.html in the folder that they have in common.
    Raises UserError if a path is no folder or holds no run.
    """
    folders = find_runs(paths)
    if out is not None:
        target = out
    elif len(folders) == 1:
        target = folders[0] / "report.html"
    elif len(paths) == 1:
        target = paths[0] / "report.html"
    else:
        target = Path(os.path.commonpath([path.expanduser().absolute() for path in paths])) / "comparison.html"
    write_atomic(target, render([load_run(folder) for folder in folders]))
    return target


def render(runs: Sequence[RunData]) -> str:
    """Return the HTML of a report."""
    labels = run_labels(runs)
    series = [_series(run, label) for run, label in zip(runs, labels, strict=True)]
    charts, zeros = _telling(chart_specs(name for run in series for name in run["values"]), series)
    charts.append(_timing_chart(several=len(runs) > 1))
    title = f"{runs[0].name}: report" if len(runs) == 1 else f"{len(runs)} runs: report"
    body = [
        header(runs, labels),
        tiles(runs[0]) if len(runs) == 1 else tag("h2", "Key figures") + comparison(runs, labels),
        curves(charts[:-1], zeros, labels),
        time_shares(runs, labels, timing=chart_figure(len(charts) - 1, charts[-1])),
        sync_proof(runs, labels),
        samples(runs, labels),
        configurations(runs, labels),
        all_metrics(runs),
    ]
    source = "metrics.jsonl, summary.json, config.yaml, samples/"
    return document(title, body, series=series, charts=charts, source=source)


def _series(run: RunData, label: str) -> dict[str, Any]:
    """The columns that charts draw, the stages of a step and the two x axes among them."""
    values = columns([{**row, **_other(row)} for row in run.rows])
    seconds = [value or 0.0 for value in columns(run.rows).get("time/step_s", [])]
    stride = len(run.rows) / max(1, len(seconds))  # a thinned point stands for this many steps
    step = [value or 0.0 for value in values.pop("step", [])]
    minutes = [spent * stride / 60 for spent in accumulate(seconds)] or [0.0] * len(step)
    kept = {name: found for name, found in values.items() if any(value is not None for value in found)}
    return {"label": label, "x": {"step": step, "minutes": minutes}, "values": kept}


def _other(row: Any) -> dict[str, float]:
    return {"time/other_s": stage_seconds(row)["other"]} if row.get("time/step_s") is not None else {}


def _telling(
    charts: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """The charts in which something happens, and the titles of those that are zero throughout."""

    def is_zero(chart: dict[str, Any]) -> bool:
        columns = [run["values"].get(series["name"], []) for run in runs for series in chart["series"]]
        return not any(any(column) for column in columns)

    return [chart for chart in charts if not is_zero(chart)], [chart["title"] for chart in charts if is_zero(chart)]


def _timing_chart(*, several: bool) -> dict[str, Any]:
    stages = [curve(f"time/{stage}_s", stage) for stage in (*STAGES, "other")]
    about = "Seconds of each step by stage, stacked." + (" Of the first run that the legend shows." if several else "")
    return line("Time by stage", about, *stages, unit="s", floor=0.0) | {"kind": "stack"}
