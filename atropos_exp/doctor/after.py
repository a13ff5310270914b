"""A run explained from its folder: how it ended, what its metrics show, where its time went, what it lost."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from atropos_exp.assembly.gap import CEILING
from atropos_exp.doctor.curves import Curve, judge_curves, spans
from atropos_exp.doctor.line import Line, fail, ok, warn
from atropos_exp.doctor.stalled import look_at_running
from atropos_exp.processes.locks import is_held
from atropos_exp.report.run_data import RunData, load_run
from atropos_exp.runs.files import Row, last_step

OVERHEAD = ("journal", "advantage", "pack", "sync", "proof", "save", "eval")  # beside rollout and update
_SLOW_SHARE = 0.25
_REMEDIES = {
    "sync": "engine.transport=shm, a larger sync.bucket_mb",
    "proof": "fewer sync.canary_prompts",
    "save": "a larger checkpoint.every, a faster disk (output_dir)",
    "eval": "a larger eval.every, a lower eval.num_prompts or eval.samples_per_prompt",
    "journal": "a faster disk (output_dir)",
}
# Totals of a run's Atropos side that tell of trouble -> what it means.
_TROUBLE = {
    "lost_batches": "batches that the API sent and that did not arrive",
    "registrations_lost": "times that the API forgot the run",
    "outages": "outages of the API",
    "api_restarts": "restarts of the API",
    "environment_restarts": "restarts of environments",
    "services_given_up": "programs given up",
    "ledger_failures": "look-ups that the gateway did not answer",
    "rollouts_without_logprobs": "rollouts without the sampler's logprobs",
    "rollouts_of_unknown_version": "rollouts of unknown weights",
}


def explain(folder: Path, *, patience: float | None = None) -> list[Line]:
    """Return everything that the folder tells. Without news for `patience` seconds a run counts as stalled."""
    data = load_run(folder)
    if not (data.rows or data.summary or (folder / "run.json").is_file()):
        return [fail("run", f"{folder} is no run folder", "give outputs/<name>/<date>/<time>")]
    rows = [row for row in data.rows if row.step]
    return [
        *(look_at_running(folder, data.rows, patience=patience) if is_held(folder / "lock") else [_end(data)]),
        *judge_curves(data.rows, data.config),
        *_gap(rows),
        *_time(rows),
        *_drops(rows),
        *_fallbacks(rows, data.config),
        *_atropos(rows),
        *_syncs(data.summary.get("sync") or {}),
    ]


def _end(data: RunData) -> Line:
    summary, folder = data.summary, data.folder
    steps = last_step(data.rows)
    wanted = (data.config.get("trainer") or {}).get("max_steps", "?")
    if data.status == "finished":
        return ok("run", f"finished after {steps} of {wanted} steps")
    if data.status == "failed":
        traces = sorted((folder / "log").glob("traceback_rank_*.txt"))
        logs = sorted(folder.glob("log/*.log"), key=lambda path: -path.stat().st_mtime)
        places = ", ".join(str(path) for path in [*traces, *logs[:2]]) or "its output"
        return fail("run", f"failed after {steps} of {wanted} steps: {summary.get('error')}", f"see {places}")
    if data.status == "stopped":
        return warn("run", f"stopped on request after {steps} of {wanted} steps", "the same command continues it")
    return fail(
        "run",
        f"ended without a summary after {steps} of {wanted} steps: it was killed (memory? time limit? node?)",
        "dmesg or the scheduler's log tell who killed it; the same command continues it without losing a step",
    )


def _gap(rows: Sequence[Row]) -> list[Line]:
    """The level of the gap between trainer and sampler, whatever it was at the start."""
    gaps, largest = [], max(CEILING.values())
    for row in rows:
        gap, allowed = row.get("policy/fresh_logprob_gap_mean"), row.get("policy/fresh_logprob_gap_allowed")
        if gap is None and not row.get("policy/version_lag_max"):  # a run of an earlier version, nothing old in it
            gap = row.get("policy/logprob_gap_mean")
        if gap is not None:
            gaps.append((row.step, gap, largest if allowed is None else allowed))
    if not gaps:
        return []
    above = [one for one in gaps if one[1] > one[2]]
    if not above:
        _, gap, allowed = max(gaps, key=lambda one: one[1] / one[2])
        return [ok("gap", f"trainer and sampler differ by {gap:.2g} nats at most, {allowed:.2g} are allowed")]
    step, gap, allowed = max(above, key=lambda one: one[1] / one[2])
    text = (
        f"trainer and sampler differ by more than rounding explains at steps {spans([one[0] for one in above])}: "
        f"{gap:.3g} nats at step {step}, {allowed:.3g} are allowed"
    )
    remedy = (
        "those steps were sampled by other weights, or one side computes something else: engine.dtype=float32 "
        "model.dtype=float32 tells rounding from a fault, trainer.layout=rows or engine=hf which side it is"
    )
    return [warn("gap", text, remedy)]


def _time(rows: Sequence[Row]) -> list[Line]:
    """Shares of the steps' time, and single steps that took far longer than usual."""
    total = sum(float(row.get("time/step_s") or 0) for row in rows)
    if not total:
        return []
    names = sorted({name for row in rows for name in row if name.startswith("time/")} - {"time/step_s", "time/log_s"})
    spent = {name[5:-2]: sum(float(row.get(name) or 0) for row in rows) / total for name in names}
    shares = sorted(spent.items(), key=lambda item: -item[1])
    told = ", ".join(f"{name} {share:.0%}" for name, share in shares if share >= 0.005)
    lines = [
        warn("time", f"{name} takes {share:.0%} of the steps' time ({told})", _REMEDIES.get(name, "see log/"))
        for name, share in shares
        if name in OVERHEAD and share > _SLOW_SHARE
    ]
    steps = [(row, float(row["time/step_s"] or 0)) for row in rows if row.get("time/step_s")]
    usual = median(seconds for _, seconds in steps)
    # the first step waits for programs to start; few steps have no usual length
    slow = [(row, seconds) for row, seconds in steps[1:] if seconds > 3 * usual and len(steps) >= 5]
    if slow:
        row, seconds = max(slow, key=lambda item: item[1])
        part = max(names, key=lambda name: float(row.get(name) or 0))
        text = (
            f"steps {spans([one.step for one, _ in slow])} took more than three times the usual {usual:.2f} s; the "
            f"slowest, {row.step}, {seconds:.2f} s, of it {float(row.get(part) or 0):.2f} s in {part[5:-2]}"
        )
        remedy = "look into log/ at that time: a restart, another program on the machine, one very long answer"
        lines.append(warn("time", text, remedy))
    return lines or [ok("time", f"{usual:.2f} s a step: {told}")]


def _drops(rows: Sequence[Row]) -> list[Line]:
    """Rollouts that reached no group."""
    dropped: dict[str, dict[int, float]] = {}  # reason -> step -> rollouts
    for row in rows:
        for name, value in row.items():
            if name.startswith("rollout/dropped_") and value:
                dropped.setdefault(name.removeprefix("rollout/dropped_"), {})[row.step] = value
    kept = sum(float(row.get("rollout/num") or 0) for row in rows)
    if not dropped:
        return [ok("drops", f"none of {kept:.0f} rollouts")] if kept else []
    nums = {reason: sum(found.values()) for reason, found in dropped.items()}
    share = sum(nums.values()) / (kept + sum(nums.values()))
    reasons = ", ".join(f"{num:.0f} {reason} (steps {spans([*dropped[reason]])})" for reason, num in nums.items())
    text = f"{share:.1%} of the rollouts: {reasons}"
    if share < 0.01:
        return [ok("drops", text)]
    slow = any("timeout" in reason for reason in dropped)
    remedy = "a larger reward.timeout_seconds" if slow else "see samples/ and log/"
    return [warn("drops", text, f"{remedy}; docs/metrics.md explains the reasons")]


def _fallbacks(rows: Sequence[Row], config: Mapping[str, Any]) -> list[Line]:
    """Steps that rollout=auto sampled itself."""
    if "Auto" not in str((config.get("rollout") or {}).get("_target_")):
        return []
    local = [row.step for row in rows if row.get("rollout/num_local")]
    if not local:
        return [ok("source", f"all {len(rows)} steps from Atropos")] if rows else []
    text = f"{len(local)} of {len(rows)} steps were sampled locally, Atropos gave nothing: steps {spans(local)}"
    remedy = "log/atropos_api.log and log/environment_*.log tell why; `doctor` with the run's overrides asks the API"
    return [warn("source", text, remedy)]


def _atropos(rows: Sequence[Row]) -> list[Line]:
    """Counters are totals of a process, so their largest value counts; a resumed run may have more."""
    lines = []
    for name in sorted({name for row in rows for name in row if name.startswith("atropos/")}):
        values = Curve(rows, name).points
        total = max((value for _, value in values), default=0)
        short = name.removeprefix("atropos/")
        meaning = _TROUBLE.get(short)
        if short.startswith("groups_dropped_"):
            meaning = f"groups refused ({short.removeprefix('groups_dropped_')})"
        if meaning and total:
            first = next(step for step, value in values if value)
            text = f"{total:.0f} {meaning}, first at step {first}"
            lines.append(warn("atropos", text, "see log/ and docs/atropos.md"))
    return lines


def _syncs(sync: Mapping[str, Any]) -> list[Line]:
    count, verified = sync.get("count"), sync.get("verified")
    if count is None:
        return []
    if verified != count:
        text = f"{count - verified} of {count} weight syncs were not proven"
        return [fail("sync", text, "see the error above, log/engine.log")]
    gap = sync.get("canary_gap_max")
    return [ok("sync", f"{count} proven" + (f", largest canary gap {gap:.2g} nats" if gap is not None else ""))]
