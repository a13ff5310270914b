"""The sections of a sweep's page: findings, points, settings that mattered, cost, runs and failures."""

import math
from collections import Counter
from collections.abc import Sequence

from atropos_exp.report.comparisons import Comparison, SeedMean, rank_correlation, variance_shares
from atropos_exp.report.html import card_table, escape, figure, seconds_figure, signed, tag
from atropos_exp.report.sections import swatch
from atropos_exp.report.sweep_data import Point, SweepData, SweepRun, spread
from atropos_exp.runs.files import last_step
from atropos_exp.runs.sweep_folder import Phase, describe_point, shown

_PILLS = {Phase.FINISHED: "finished", Phase.FAILED: "failed", Phase.KILLED: "failed", Phase.TIMEOUT: "failed"}


def sweep_header(data: SweepData) -> str:
    """Return title, number of runs in each phase, and the command."""
    found = Counter(run.state.phase for run in data.runs)
    pills = [tag("span", f"{found[phase]} {phase}", class_=f"pill {_pill(phase)}") for phase in Phase if found[phase]]
    button = tag("button", "Theme", id="theme", type="button")
    title = tag("div", tag("h1", escape(f"{data.request.name}: sweep")), *pills, button, class_="line")
    kind = "Optuna search" if data.request.kind == "optuna" else "grid"
    seeds = sorted({run.record.seed for run in data.runs})
    varied = ", ".join(data.request.axes) or "seeds only"
    facts = [("kind", kind), ("started", data.request.created), ("varies", varied),
             ("seeds", ", ".join(map(str, seeds)))]  # fmt: skip
    if data.baseline is not None:
        facts.append(("baseline", data.baseline.label))
    listed = "".join(tag("li", tag("b", escape(key)), escape(value)) for key, value in facts)
    folder = tag("p", escape(str(data.folder.path)), class_="folder muted small")
    command = tag("pre", escape("$ " + " ".join(data.request.command)), class_="card command")
    return tag("header", title, folder, tag("ul", listed, class_="facts"), command)


def findings(data: SweepData) -> str:
    """Return what the runs show, in sentences."""
    said: list[str] = []
    if data.request.kind == "optuna":
        said = _search_findings(data)
    elif data.baseline is not None:
        for point in data.points:
            found = point.comparison
            if found is not None and found.significant and found.interval is not None:
                low, high = (signed(end) for end in found.interval)
                said.append(f"{point.label} against {data.baseline.label}: {found.verdict} "
                            f"{signed(found.difference)} held-out accuracy (95 %: {low} to {high}).")  # fmt: skip
        others = [
            (point.label, found) for point in data.points if (found := point.comparison) and not found.significant
        ]
        said += [f"{label}: {found.verdict}" for label, found in others if found.p is None]
        equal = [label for label, found in others if found.p is not None]
        if equal:
            said.append(f"No significant difference between {data.baseline.label} and: {'; '.join(equal)}.")
    said += [f"{point.label}: not compared, {point.not_comparable}." for point in data.points
             if point.not_comparable and data.request.kind != "optuna"]  # fmt: skip
    undone = [run for run in data.runs if not run.state.phase.is_done]
    if undone:
        said.append(f"{len(undone)} of {len(data.runs)} runs are not finished; means are over those that are.")
    if not said:
        said.append("There is nothing to compare.")
    items = "".join(tag("li", escape(text)) for text in said)
    return tag("h2", "What the runs show") + tag("ul", items, class_="card findings")


def points_table(data: SweepData) -> str:
    """Return the final and best evaluation of every point, and its comparison with the baseline."""
    ends = [value for point in data.points if point.final is not None for value in (
        *(point.final.interval or ()), point.final.mean)]  # fmt: skip
    axis = spread([*ends]) if ends else (0.0, 1.0)
    rows = []
    for at, point in enumerate(data.points):
        is_baseline = data.baseline is point
        found = point.comparison
        rows.append(
            [
                tag("span", swatch(at), " ", escape(point.label), class_="label"),
                f"{point.final.num if point.final else 0} of {len(point.runs)}",
                _with_interval(point.final),
                _interval_mark(point.final, axis, at),
                _with_interval(point.best),
                _difference(found),
                figure(found.p_holm, 2) if found else "–",
                _verdict(point, is_baseline),
            ]
        )
    heads = ["Point", "Seeds", "Final", f"{figure(axis[0], 3)} … {figure(axis[1], 3)}", "Best", "Difference",
             "p (Holm)", "Significant?"]  # fmt: skip
    if data.request.kind == "optuna":
        about = "Held-out evaluation of the trials: after the last step, and the highest of each. One seed each."
        return tag("h2", "Trials") + tag("p", about, class_="muted small") + card_table(heads[:5], [
            [tag("span", swatch(at), f" {point.number}: {escape(point.label)}", class_="label"), *row[1:5]]
            for at, (point, row) in enumerate(zip(data.points, rows, strict=True))
        ])  # fmt: skip
    about = (
        "Held-out evaluation, mean over the seeds that finished, with Student's 95 % interval over seeds. Best is the "
        "highest of each seed's evaluations: it flatters noisy runs, so points are compared by the final one. "
        "Differences are paired: same seed, same held-out prompts. p is of the paired t-test, Holm-corrected for all "
        "comparisons of this table; below 0.05 counts as significant. The interval of a difference is of that "
        "comparison alone."
    )
    return tag("h2", "Points") + tag("p", about, class_="muted small wide-text") + card_table(heads, rows)


def importance(data: SweepData) -> str:
    """Return the settings of every point with its result, and which of them go with the result."""
    varied = [axis for axis in data.request.axes if len({repr(point.values.get(axis)) for point in data.points}) > 1]
    if not varied:
        return ""
    ranked = sorted(data.points, key=_rank)
    rows = [[*(escape(shown(point.values.get(axis))) for axis in varied), figure(_result(point), 3),
             escape(", ".join(sorted({str(run.state.phase) for run in point.runs})))] for point in ranked]  # fmt: skip
    table = card_table([*varied, "Final" if data.request.kind == "grid" else "Value", "Runs"], rows,
                       numeric_from=len(varied))  # fmt: skip
    return tag("h2", "Hyperparameters") + _shares(data, varied) + table


def cost(data: SweepData) -> str:
    """Return hours, tokens and attempts of every point."""
    rows = []
    for point in data.points:
        steps = sum(len([row for row in run.rows if row.step]) for run in point.runs)
        rows.append([escape(point.label), figure(sum(run.device_hours for run in point.runs), 3),
                     figure(sum(run.tokens for run in point.runs)), figure(steps),
                     seconds_figure(sum(run.seconds for run in point.runs) / steps if steps else None)])  # fmt: skip
    rows.append([tag("b", "All"), tag("b", figure(sum(run.device_hours for run in data.runs), 3)),
                 tag("b", figure(sum(run.tokens for run in data.runs))), "", ""])  # fmt: skip
    about = ("Device hours are process time times trainer processes, start-up and failed attempts included. Tokens are "
             "those of rollouts, prompts included.")  # fmt: skip
    heads = ["Point", "Device hours", "Tokens", "Steps", "Time per step, all in"]
    return tag("h2", "Cost") + tag("p", about, class_="muted small") + card_table(heads, rows)


def runs_table(data: SweepData) -> str:
    """Return every run, with a link to its own report."""
    rows = []
    for run in data.runs:
        name = run.record.folder
        there = (data.folder.run_folder(run.record.number) / "report.html").exists()
        link = tag("a", name, href=f"{name}/report.html") if there else name
        last = last_step(run.rows)
        rows.append(
            [link, escape(describe_point(run.record.values)), str(run.record.seed), _state(run),
             f"{last} of {run.record.max_steps}", figure(run.reached, 3), seconds_figure(run.seconds or None)]
        )  # fmt: skip
    heads = ["Run", "Point", "Seed", "State", "Steps", "Last evaluation", "Process time"]
    return tag("h2", "Runs") + card_table(heads, rows, numeric_from=4)


def failures(data: SweepData) -> str:
    """Return the runs that did not reach their end, with the reason."""
    lost = [run for run in data.runs if not run.state.phase.is_done and not run.state.phase.is_open]
    if not lost:
        return ""
    rows = [
        [
            run.record.folder,
            escape(f"{describe_point(run.record.values)}, seed={run.record.seed}"),
            _state(run),
            tag("span", escape(run.state.reason or "no reason is known"), class_="label"),
            f"<code>{data.folder.log_of(run.record)}</code>",
        ]
        for run in lost
    ]
    heads = ["Run", "Point", "State", "Reason", "Log"]
    command = tag("code", escape(f"python -m atropos_exp.sweep resume {data.folder.path}"))
    again = tag("p", "They continue with ", command, class_="muted small")
    return tag("h2", "Runs that did not finish") + again + card_table(heads, rows, numeric_from=99)


def _search_findings(data: SweepData) -> list[str]:
    finished = [point for point in data.points if point.final is not None]
    if not finished:
        return ["No trial finished."]
    best = max(finished, key=lambda point: point.final.mean if point.final else -math.inf)
    value = figure(best.final.mean if best.final else None, 3)
    pruned = sum(run.state.phase is Phase.PRUNED for run in data.runs)
    return [
        f"The best of {len(finished)} finished trials is {best.number}: {best.label}, {value}; {pruned} were pruned.",
        "It was chosen for being the highest of one-seed results, so its value is optimistic and its lead unproven: "
        "run it and its rivals as a grid over seeds before believing it.",
    ]


def _shares(data: SweepData, varied: Sequence[str]) -> str:
    if data.request.kind == "optuna":
        return _correlations(data, varied)
    runs = [run for run in data.runs if run.final is not None]
    finals = [run.final for run in runs if run.final is not None]
    shares = variance_shares({axis: [run.record.values.get(axis) for run in runs] for axis in varied}, finals)
    if not shares:
        return tag("p", "The results do not vary, so no setting matters in them.", class_="muted small")
    complete = len(runs) == len(data.runs)
    rows = [[f"<code>{escape(axis)}</code>", f"{share:.0%}", _bar(share)] for axis, share in shares.items()]
    if complete and not _zipped(data):
        left = max(0.0, 1 - sum(shares.values()))
        rows.append(["interactions and seeds", f"{left:.0%}", _bar(left)])
    about = ("Simple variance decomposition: the share of the variance of the final evaluations that the means of a "
             "key's values account for (main effects only).")  # fmt: skip
    if not complete:
        about += " Runs are missing, so shares overlap and do not add up."
    if _zipped(data):
        about += " Keys that change together share their effect: it is shown for each of them."
    return tag("p", about, class_="muted small") + card_table(["Key", "Share", ""], rows)


def _correlations(data: SweepData, varied: Sequence[str]) -> str:
    runs = [run for run in data.runs if run.reached is not None]
    results = [run.reached for run in runs if run.reached is not None]
    rows = []
    for axis in varied:
        settings = [run.record.values.get(axis) for run in runs]
        if all(isinstance(item, (int, float)) and not isinstance(item, bool) for item in settings):
            found = rank_correlation([float(item) for item in settings if item is not None], results)
            rows.append([f"<code>{escape(axis)}</code>", "rank correlation", signed(found), _bar(abs(found or 0.0))])
        else:
            share = variance_shares({axis: settings}, results).get(axis, 0.0)
            rows.append([f"<code>{escape(axis)}</code>", "share of variance", f"{share:.0%}", _bar(share)])
    about = ("With the value that each trial reached, pruned ones included: Spearman's rank correlation of numbers, "
             "the share of variance of choices. A search looks where it hopes to win, so this describes its trials, no "
             "cause.")  # fmt: skip
    return tag("p", about, class_="muted small") + card_table(["Key", "Measure", "Value", ""], rows, numeric_from=2)


def _zipped(data: SweepData) -> bool:
    return len(data.request.settings.get("zip") or {}) > 1


def _result(point: Point) -> float | None:
    if point.final is not None:
        return point.final.mean
    reached = [run.reached for run in point.runs if run.reached is not None and run.state.phase is Phase.PRUNED]
    return reached[0] if reached else None


def _rank(point: Point) -> float:
    """Best first, points without a result last."""
    result = _result(point)
    return -result if result is not None else math.inf


def _with_interval(found: SeedMean | None) -> str:
    if found is None:
        return "–"
    if found.interval is None:
        return f'{figure(found.mean, 3)} <small class="muted">one seed</small>'
    low, high = (figure(end, 3) for end in found.interval)
    return f'{figure(found.mean, 3)} <small class="muted">[{low}, {high}]</small>'


def _difference(found: Comparison | None) -> str:
    if found is None or not found.seeds:
        return "–"
    if found.interval is None:
        return signed(found.difference)
    low, high = (signed(end) for end in found.interval)
    return f'{signed(found.difference)} <small class="muted">[{low}, {high}]</small>'


def _verdict(point: Point, is_baseline: bool) -> str:
    if is_baseline or point.comparison is None:
        return tag("span", "baseline" if is_baseline else "not compared", class_="muted")
    word = point.comparison.word
    kind = {"better": "finished", "worse": "failed"}.get(word, "neutral")
    return tag("span", escape(word), class_=f"pill {kind}")


def _interval_mark(found: SeedMean | None, axis: tuple[float, float], at: int) -> str:
    """A dot with its whisker on the axis that all rows share."""
    if found is None:
        return ""

    def place(value: float) -> str:
        return f"{5 + 150 * (value - axis[0]) / (axis[1] - axis[0]):.1f}"

    low, high = found.interval or (found.mean, found.mean)
    line = f'<line class="whisker" x1="{place(low)}" x2="{place(high)}" y1="10" y2="10" stroke-width="2"/>'
    dot = f'<circle class="dot" cx="{place(found.mean)}" cy="10" r="4.5"/>'
    spoken = f"{figure(found.mean, 3)}, from {figure(low, 3)} to {figure(high, 3)}"
    return (f'<svg class="interval" width="160" height="20" role="img" aria-label="{spoken}" '
            f'style="--c:var(--c{at % 8})">{line}{dot}</svg>')  # fmt: skip


def _bar(share: float) -> str:
    return tag("span", tag("span", style=f"width:{min(1.0, share):.1%};--c:var(--c0)"), class_="bar thin")


def _state(run: SweepRun) -> str:
    return tag("span", str(run.state.phase), class_=f"pill {_pill(run.state.phase)}")


def _pill(phase: Phase) -> str:
    return _PILLS.get(phase, "stopped" if phase is not Phase.PRUNED else "finished")
