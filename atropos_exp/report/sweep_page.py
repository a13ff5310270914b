"""The report of a sweep: one HTML file that opens offline."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atropos_exp.report.charts import curve, line
from atropos_exp.report.shell import curves, document
from atropos_exp.report.sweep_data import SweepData, load_sweep, point_series
from atropos_exp.report.sweep_sections import (
    cost,
    failures,
    findings,
    importance,
    points_table,
    runs_table,
    sweep_header,
)
from atropos_exp.runs.atomic import write_atomic
from atropos_exp.runs.sweep_folder import RunState, SweepFolder


def write_sweep_report(folder: SweepFolder, states: Mapping[int, RunState], out: Path | None = None) -> Path:
    """Write report.html of the sweep (or `out`) and return its path. Unfinished sweeps have one too."""
    target = out or folder.path / "report.html"
    write_atomic(target, render_sweep(load_sweep(folder, states)))
    return target


def render_sweep(data: SweepData) -> str:
    """Return the HTML."""
    series = [point_series(point) for point in data.points]
    seeds = [point.runs for point in data.points]
    known = {name for one in series for name in one["values"]}
    charts = [
        chart
        for chart in _charts(max(map(len, seeds), default=1))
        if any(item["name"] in known for item in chart["series"])
    ]
    body = [
        sweep_header(data),
        findings(data),
        points_table(data),
        failures(data),
        curves(charts, [], [one["label"] for one in series]),
        importance(data),
        cost(data),
        runs_table(data),
    ]
    return document(
        f"{data.request.name}: sweep", body, series=series, charts=charts,
        source="sweep.json, manifest.jsonl, events.jsonl and the metrics.jsonl of every run",
    )  # fmt: skip


def _charts(num_seeds: int) -> list[dict[str, Any]]:
    band = "mean over seeds; the band is Student's 95 % interval" if num_seeds > 1 else "one run each, so no interval"

    def of(name: str, label: str, *, sparse: bool = False) -> dict[str, Any]:
        return curve(name, label, band=(f"{name}_low", f"{name}_high"), sparse=sparse)

    return [
        line("Held-out evaluation", f"Greedy answers to prompts never trained on: {band}.",
             of("eval", "held-out", sparse=True)),
        line("Reward", f"Of the step's rollouts: {band}.", of("reward/mean", "reward")),
        line("Entropy", f"Per trained token: {band}.", of("policy/entropy", "entropy"), unit="nats", floor=0.0),
        line("Response length", f"Sampled tokens of a rollout: {band}.", of("length/response_mean", "length"),
             unit="tokens", floor=0.0),
    ]  # fmt: skip
