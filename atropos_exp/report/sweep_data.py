"""What the report of a sweep shows: points with their evaluations by seed, comparisons, curves, cost."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import yaml

from atropos_exp.report.comparisons import Comparison, SeedMean, compare, seed_mean
from atropos_exp.runs.files import Row, by_step, read_rows
from atropos_exp.runs.summary import eval_accuracy
from atropos_exp.runs.sweep_folder import Phase, Request, RunRecord, RunState, SweepFolder, describe_point

# What decides which held-out prompts a run is judged on, and how. Points that differ in it cannot be compared.
_JUDGEMENT = ("eval.num_prompts", "eval.correct_at", "data.prepare", "data.eval_paths", "data.format",
              "data.system_prompt", "reward", "max_prompt_length")  # fmt: skip

ACCURACY = (0.0, 1.0)  # where it can lie


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """One run of a sweep, as far as it got."""

    record: RunRecord
    state: RunState
    rows: list[Row]
    metric: str | None  # None: greedy accuracy, mean over the held-out sets
    judged_on: str  # equal for runs with the same held-out prompts and scoring
    resolution: float  # smallest step between two values of the metric; 0: unknown
    seconds: float  # of processes, over all attempts

    @property
    def evaluations(self) -> dict[int, float]:
        """Step -> value of the metric, including the untrained policy's (step 0)."""
        found = {}
        for row in self.rows:
            value = row.get(self.metric) if self.metric else eval_accuracy(row)
            if value is not None:
                found[row.step] = value
        return found

    @property
    def final(self) -> float | None:
        """The value after the last step; None unless the run finished."""
        trained = {step: value for step, value in self.evaluations.items() if step}
        return trained[max(trained)] if trained and self.state.phase is Phase.FINISHED else None

    @property
    def best(self) -> float | None:
        """The largest value after any step; None unless the run finished."""
        trained = [value for step, value in self.evaluations.items() if step]
        return max(trained) if trained and self.state.phase is Phase.FINISHED else None

    @property
    def reached(self) -> float | None:
        """The newest value, whether the run finished or not."""
        return self.evaluations[max(self.evaluations)] if self.evaluations else None

    @property
    def tokens(self) -> float:
        """Tokens of all rollouts, prompts included."""
        return sum(row.get("rollout/num_tokens") or 0.0 for row in self.rows)

    @property
    def device_hours(self) -> float:
        """Hours of devices that the run kept busy."""
        return self.seconds * self.record.num_devices / 3600


@dataclass(frozen=True, kw_only=True)
class Point:
    """One choice of values, with its runs by seed."""

    number: int
    values: Mapping[str, Any]
    runs: list[SweepRun]
    final: SeedMean | None  # None: no run finished
    best: SeedMean | None
    comparison: Comparison | None  # None: it is the baseline, or cannot be compared
    not_comparable: str  # why, if so

    @property
    def label(self) -> str:
        """The values in one line."""
        return describe_point(self.values)


@dataclass(frozen=True, kw_only=True)
class SweepData:
    """A sweep with all its points and runs."""

    folder: SweepFolder
    request: Request
    points: list[Point]
    runs: list[SweepRun]

    @property
    def baseline(self) -> Point | None:
        """The point that the others are compared with; None in a search."""
        return next((point for point in self.points if point.number == self.request.baseline), None)


def load_sweep(folder: SweepFolder, states: Mapping[int, RunState]) -> SweepData:
    """Read all of a sweep. `states`: the state of each run by number."""
    request = folder.request()
    events = folder.events()
    metric = request.settings.get("metric")
    runs = [_load_run(folder, record, states[record.number], events, metric) for record in folder.records()]
    by_point: dict[int, list[SweepRun]] = {}
    for run in runs:
        by_point.setdefault(run.record.point, []).append(run)
    return SweepData(folder=folder, request=request, points=_points(by_point, request.baseline), runs=runs)


def point_series(point: Point) -> dict[str, Any]:
    """The curves of a point, as charts.js takes them: means over seeds with 95 % intervals.

    Of the finished runs, if there are any: a run that ended early would pull the mean about where it ends.
    """
    runs = [run for run in point.runs if run.state.phase is Phase.FINISHED] or [run for run in point.runs if run.rows]
    by_step: dict[int, list[Row]] = {}
    for run in runs:
        for row in run.rows:
            by_step.setdefault(row.step, []).append(row)
    common = [step for step in sorted(by_step) if len(by_step[step]) == len(runs)]
    evaluations = [run.evaluations for run in runs]
    columns: dict[str, list[list[float]]] = {
        "eval": [[found[step] for found in evaluations if step in found] for step in common],
        **{name: [[value for row in by_step[step] if (value := row.get(name)) is not None] for step in common]
           for name in ("reward/mean", "policy/entropy", "length/response_mean", "time/step_s")},
    }  # fmt: skip
    values: dict[str, list[float | None]] = {}
    for name, column in columns.items():
        bounds = ACCURACY if name == "eval" and not point.runs[0].metric else None
        means = [seed_mean(cell, bounds=bounds) if len(cell) == len(runs) and cell else None for cell in column]
        values[name] = [found.mean if found else None for found in means]
        values[f"{name}_low"] = [found.interval[0] if found and found.interval else None for found in means]
        values[f"{name}_high"] = [found.interval[1] if found and found.interval else None for found in means]
    minutes = [spent / 60 for spent in accumulate(value or 0.0 for value in values.pop("time/step_s"))]
    kept = {name: column for name, column in values.items()
            if any(value is not None for value in column) and not name.startswith("time/")}  # fmt: skip
    label = point.label + (f" ({len(runs)} seeds)" if len(runs) > 1 else "")
    return {"label": label, "x": {"step": [float(step) for step in common], "minutes": minutes}, "values": kept}


def _points(by_point: Mapping[int, list[SweepRun]], baseline: int | None) -> list[Point]:
    finals = {number: {run.record.seed: run.final for run in runs if run.final is not None}
              for number, runs in by_point.items()}  # fmt: skip
    judged = {number: {run.judged_on for run in runs if run.final is not None} for number, runs in by_point.items()}
    reasons = {number: _not_comparable(number, baseline, finals, judged) for number in by_point}
    others = [number for number in by_point if not reasons[number] and number != baseline]
    compared: dict[int, Comparison] = {}
    if baseline is not None and others:
        resolution = max(run.resolution for number in (baseline, *others) for run in by_point[number])
        found = compare(finals[baseline], [finals[number] for number in others], resolution=resolution)
        compared = dict(zip(others, found, strict=True))
    return [
        Point(
            number=number, values=runs[0].record.values, runs=runs,
            final=_mean(finals[number].values(), runs[0].metric),
            best=_mean([run.best for run in runs if run.best is not None], runs[0].metric),
            comparison=compared.get(number), not_comparable=reasons[number],
        )
        for number, runs in sorted(by_point.items())
    ]  # fmt: skip


def _mean(values: Iterable[float], metric: str | None) -> SeedMean | None:
    given = list(values)
    return seed_mean(given, bounds=None if metric else ACCURACY) if given else None


def _not_comparable(
    number: int, baseline: int | None, finals: Mapping[int, Mapping[int, float]], judged: Mapping[int, set[str]]
) -> str:
    if baseline is None:
        return "a search has no baseline"
    if number == baseline:
        return ""
    if not finals[number]:
        return "no run of this point finished"
    if not finals.get(baseline):
        return "no run of the baseline finished"
    if len(judged[number] | judged[baseline]) > 1:
        return "judged on other held-out prompts, or by another reward, than the baseline"
    return ""


def _load_run(
    folder: SweepFolder, record: RunRecord, state: RunState, events: Sequence[Mapping[str, Any]], metric: str | None
) -> SweepRun:
    rows = by_step(read_rows(folder.run_folder(record.number)))
    sizes = {name: row[name] for row in rows for name in row if name.startswith("eval/") and name.endswith("/num")}
    smallest = min((value for value in sizes.values() if value), default=None)
    config = yaml.safe_load(folder.config_path(record.number).read_text())
    stepped = sum(row.get("time/step_s") or 0.0 for row in rows)
    known = state.seconds if state.seconds is not None else _process_seconds(record, events)
    return SweepRun(
        record=record, state=state, rows=rows, metric=metric, seconds=max(known, stepped),
        judged_on=repr([[_get(config, key) for key in _JUDGEMENT], sorted(sizes.items())]),
        resolution=1 / (smallest * len(sizes)) if smallest and metric is None else 0.0,
    )  # fmt: skip


def _process_seconds(record: RunRecord, events: Sequence[Mapping[str, Any]]) -> float:
    """Of the run's processes, start-up included, as far as their starts and ends are known."""
    total, started = 0.0, None
    for event in events:
        if event["number"] != record.number:
            continue
        if event["event"] in ("started", "trial started"):
            started = event["time"]
        elif event["event"] in ("ended", "trial ended", "trial stopped") and started is not None:
            total, started = total + event["time"] - started, None
    return total


def _get(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = config.get(name) if isinstance(config, Mapping) else None
    return config


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of an axis around values, with room on both sides."""
    low, high = float(np.min(values)), float(np.max(values))
    room = (high - low or 0.1) * 0.08
    return low - room, high + room
