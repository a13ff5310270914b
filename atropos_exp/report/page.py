"""One HTML file of one or more runs that opens offline: all styles, scripts and numbers are inside it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from atropos_exp import __version__
from atropos_exp.atomic import write_atomic
from atropos_exp.report.charts import STAGES, chart_specs, curve
from atropos_exp.report.details import all_metrics, configurations, run_labels, samples, stage_seconds, time_shares
from atropos_exp.report.html import escape, tag
from atropos_exp.report.run_data import RunData, columns, find_runs, load_run
from atropos_exp.report.sections import comparison, header, swatch, sync_proof, tiles

_HERE = Path(__file__).parent


def write_report(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of the runs in `paths` (run folders, or folders of runs such as a sweep) and return its path.

    `out`: None is report.html in the run's folder, or in the first given folder if there are several runs.
    Raises UserError if a path is no folder or holds no run.
    """
    folders = find_runs(paths)
    target = out or (folders[0] if len(folders) == 1 else paths[0]) / "report.html"
    write_atomic(target, render([load_run(folder) for folder in folders]))
    return target


def render(runs: Sequence[RunData]) -> str:
    """The HTML of a report."""
    labels = run_labels(runs)
    series = [_series(run, label) for run, label in zip(runs, labels, strict=True)]
    charts, zeros = _telling(chart_specs(name for run in series for name in run["values"]), series)
    charts.append(_timing_chart(several=len(runs) > 1))
    script = (_HERE / "charts.js").read_text() + (_HERE / "page.js").read_text()
    # only this script may run and nothing may be fetched, whatever a model wrote into a sample
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    title = f"{runs[0].name}: report" if len(runs) == 1 else f"{len(runs)} runs: report"
    body = [
        header(runs, labels),
        tiles(runs[0]) if len(runs) == 1 else tag("h2", "Key figures") + comparison(runs, labels),
        _curves(charts[:-1], zeros, labels),
        time_shares(runs, labels, timing=_figure(len(charts) - 1, charts[-1])),
        sync_proof(runs, labels),
        samples(runs, labels),
        configurations(runs, labels),
        all_metrics(runs),
        tag(
            "footer",
            f"Written by atropos_exp {escape(__version__)} from metrics.jsonl, summary.json, config.yaml, samples/.",
        ),
    ]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            tag("title", escape(title)),
            f"<style>{(_HERE / 'style.css').read_text()}</style></head><body>",
            tag("main", *body),
            '<div id="tip" class="card" hidden></div><div id="live" class="spoken" aria-live="polite"></div>',
            f'<script type="application/json" id="data">{_embedded({"runs": series, "charts": charts})}</script>',
            f"<script>{script}</script></body></html>\n",
        ]
    )


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
    return {"kind": "stack", "title": "Time by stage", "about": about, "unit": "s", "scale": "linear", "floor": 0.0,
            "ceiling": None, "series": stages}  # fmt: skip


def _curves(charts: Sequence[dict[str, Any]], zeros: Sequence[str], labels: Sequence[str]) -> str:
    if not charts:
        return tag("h2", "Curves") + tag("p", "There are no steps to draw yet.", class_="muted")
    axis = "".join(
        tag("button", name, type="button", data_x=key, aria_pressed=str(key == "step").lower())
        for key, name in (("step", "steps"), ("minutes", "minutes"))
    )
    smooth = '<input id="smooth" type="range" min="0" max="0.95" step="0.05" aria-label="smoothing">'
    legend = "".join(
        tag("button", swatch(at), escape(label), type="button", data_run=at, aria_pressed="true")
        for at, label in enumerate(labels)
    )
    tools = tag(
        "div", tag("h2", "Curves"), tag("div", "x axis", axis, class_="group"),
        tag("label", "smoothing", smooth, class_="group"),
        tag("div", legend, class_="group runs") if len(labels) > 1 else "", class_="tools",
    )  # fmt: skip
    figures = "".join(_figure(at, chart) for at, chart in enumerate(charts))
    silent = tag("p", f"Zero at every step: {escape(', '.join(zeros))}.", class_="muted small zeros") if zeros else ""
    return tools + tag("noscript", "The curves need JavaScript.") + tag("div", figures, class_="charts") + silent


def _figure(at: int, chart: dict[str, Any]) -> str:
    unit = tag("span", f" {chart['unit']}", class_="unit") if chart["unit"] else ""
    caption = tag(
        "figcaption",
        tag("h3", escape(chart["title"]), unit),
        tag(
            "button",
            "⤢",
            class_="grow",
            type="button",
            title="larger or smaller",
            aria_label=f"enlarge {chart['title']}",
        ),
        tag("p", escape(chart["about"]), class_="about"),
    )
    return tag("figure", caption, tag("div", class_="series"), tag("div", class_="plot"), class_="card", data_chart=at)


def _embedded(content: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
