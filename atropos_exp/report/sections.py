"""The head of a report: who ran, how it ended, the figures that matter, what is missing."""

from collections.abc import Mapping, Sequence
from typing import Any

from atropos_exp.report.html import bytes_figure, card_table, escape, figure, seconds_figure, tag
from atropos_exp.report.run_data import RunData
from atropos_exp.runs.files import last_step
from atropos_exp.runs.summary import eval_accuracy

_GROUPS = ("model", "data", "reward", "rollout", "engine", "advantage", "loss", "trainer")


def header(runs: Sequence[RunData], labels: Sequence[str]) -> str:
    """Return title, status, facts, command and what is missing; of several runs, the title only."""
    button = tag("button", "Theme", id="theme", type="button")
    if len(runs) > 1:
        states = [run.status for run in runs]
        counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
        status = tag("span", ", ".join(counts), class_="muted")
        title = tag("div", tag("h1", f"{len(runs)} runs"), status, button, class_="line")
        return tag("header", title, *(_problems(run, f"{label}: ") for run, label in zip(runs, labels, strict=True)))
    (run,) = runs
    title = tag("div", tag("h1", escape(run.name)), _pill(run), button, class_="line")
    folder = tag("p", escape(str(run.folder)), class_="folder muted small")
    facts = tag("ul", *(tag("li", tag("b", escape(key)), escape(value)) for key, value in _facts(run)), class_="facts")
    lines = escape("\n".join(f"$ {line}" for line in run.commands))
    command = tag("pre", lines, class_="card command") if lines else ""
    return tag("header", title, folder, facts, command, _problems(run))


def tiles(run: RunData) -> str:
    """Return the key figures of one run."""
    summary, sync, rollouts = run.summary, _inner(run.summary, "sync"), _inner(run.summary, "rollouts")
    rewards = [value for row in run.rows if (value := row.get("reward/mean")) is not None]
    evaluated = [(row, value) for row in run.rows if (value := eval_accuracy(row)) is not None]
    seconds = sum(row.get("time/step_s") or 0.0 for row in run.rows)
    tokens = sum(row.get("rollout/num_tokens") or 0.0 for row in run.rows)
    dropped = sum(value or 0 for row in run.rows for name, value in row.items() if name.startswith("rollout/dropped_"))
    used = sum(row.get("rollout/num") or 0.0 for row in run.rows)
    gaps = [value for row in run.rows if (value := row.get("sync/canary_gap_max")) is not None]
    reached = last_step(run.rows)
    planned = _inner(run.config, "trainer").get("max_steps")
    proven = f"{sync['verified']} of {sync['count']}" if {"verified", "count"} <= sync.keys() else figure(len(gaps))
    shown = [
        ("Held-out accuracy", _change([value for _, value in evaluated]), _interval(evaluated)),
        ("Reward", _change(rewards), "first → last step"),
        ("Steps", figure(summary.get("steps", reached)), f"of {planned} planned" if planned else ""),
        ("Wall clock", seconds_figure(summary.get("wall_seconds") or seconds or None), "all attempts"),
        ("Tokens per second", figure(tokens / seconds if seconds else None, 3), "prompt and sampled"),
        ("Syncs proven", proven, f"canary gap ≤ {figure(max(gaps, default=None), 2)}"),
        ("Rollouts", figure(used), _sources(rollouts, dropped)),
    ]  # fmt: skip
    return tag("div", *(_tile(*item) for item in shown), class_="tiles")


def comparison(runs: Sequence[RunData], labels: Sequence[str]) -> str:
    """Return a table with the key figures of every run."""
    rows = []
    for at, (run, label) in enumerate(zip(runs, labels, strict=True)):
        accuracies = [value for row in run.rows if (value := eval_accuracy(row)) is not None]
        rewards = [value for row in run.rows if (value := row.get("reward/mean")) is not None]
        sync = _inner(run.summary, "sync")
        rows.append(
            [
                f"{swatch(at)} {escape(label)}",
                _pill(run),
                figure(max((row.step for row in run.rows), default=None)),
                _change(accuracies),
                _change(rewards),
                seconds_figure(run.summary.get("wall_seconds")),
                figure(run.summary.get("tokens_per_second"), 3),
                f"{figure(sync.get('verified'))} of {figure(sync.get('count'))}",
            ]
        )
    heads = ["Run", "Status", "Steps", "Held-out accuracy", "Reward", "Wall clock", "Tokens/s", "Syncs proven"]
    return card_table(heads, rows, numeric_from=2)


def sync_proof(runs: Sequence[RunData], labels: Sequence[str]) -> str:
    """Return a table with what the weight syncs of every run cost and showed."""
    rows = []
    for run, label in zip(runs, labels, strict=True):
        synced = [row for row in run.rows if row.get("sync/bytes") is not None]
        if not synced:
            continue
        sync = _inner(run.summary, "sync")
        verified, count = sync.get("verified", len(synced)), sync.get("count", len(synced))
        steps = [row for row in synced if row.step]
        step_seconds, proof_seconds = _total(steps, "time/step_s"), _total(steps, "time/proof_s")
        share = f"{proof_seconds / step_seconds:.1%}" if step_seconds else "–"
        tensors, digests = synced[-1].get("sync/tensors"), synced[-1].get("sync/digests_compared")
        verdict = tag("span", f"{figure(verified)} of {figure(count)}",
                      class_="pill " + ("finished" if verified >= count else "failed"))  # fmt: skip
        rows.append(
            [
                escape(label),
                verdict,
                figure(tensors),
                figure(digests),
                bytes_figure(synced[-1].get("sync/bytes")),
                seconds_figure(_total(synced, "time/sync_s") / len(synced)),
                seconds_figure(_total(synced, "time/proof_s") / len(synced)),
                share,
                figure(_total(synced, "sync/canary_gap_mean") / len(synced), 2),
                figure(max(row.get("sync/canary_gap_max") or 0.0 for row in synced), 2),
            ]
        )
    if not rows:
        return ""
    about = ("After every update the engine received all tensors, reported a digest of each where it can, and scored "
             "fixed prompts (the canary) like the trainer. Times are means, gaps are in nats.")  # fmt: skip
    heads = ["Run", "Proven", "Tensors", "Digests", "Bytes", "Transfer", "Proof", "of a step", "Canary mean",
             "Canary max"]  # fmt: skip
    return tag("h2", "Sync proof") + tag("p", about, class_="muted small") + card_table(heads, rows)


def swatch(at: int) -> str:
    """Return the colour of run number `at`."""
    return tag("i", class_="swatch", style=f"--c:var(--c{at % 8})")


def _facts(run: RunData) -> list[tuple[str, str]]:
    facts = []
    for group in _GROUPS:
        part = _inner(run.config, group)
        if "_target_" in part:
            named = str(part["_target_"]).rsplit(".", 1)[-1]
            facts.append((group, f"{named} ({part['path']})" if group == "model" and part.get("path") else named))
    known = {**run.config, **run.summary}
    facts += [
        (key, str(known[key])) for key in ("seed", "git", "config_hash", "resumed_from") if known.get(key) is not None
    ]
    return facts + [(key, str(value)) for key, value in _inner(run.summary, "versions").items()]


def _problems(run: RunData, prefix: str = "") -> str:
    found = ""
    if error := run.summary.get("error"):
        found += tag("div", tag("b", f"{escape(prefix)}Failed. "), escape(str(error)), class_="card note failed")
    if run.missing:
        items = "".join(tag("li", escape(text)) for text in run.missing)
        found += tag("div", tag("b", escape(prefix) + "Not in this report"), tag("ul", items), class_="card note")
    return found


def _pill(run: RunData) -> str:
    status = run.status if run.status in ("finished", "stopped", "failed") else "unfinished"
    return tag("span", escape(run.status), class_=f"pill {status}")


def _tile(what: str, value: str, more: str) -> str:
    return tag(
        "div", tag("div", what, class_="what"), tag("div", value, class_="value"), tag("div", more, class_="more"),
        class_="card tile",
    )  # fmt: skip


def _change(values: Sequence[float]) -> str:
    if len(values) < 2:
        return figure(values[0] if values else None, 3)
    return f"<small>{figure(values[0], 3)} →</small> {figure(values[-1], 3)}"


def _interval(evaluated: Sequence[tuple[Mapping[str, Any], float]]) -> str:
    if not evaluated:
        return "not evaluated"
    row = evaluated[-1][0]
    sets = [name for name in row if name.startswith("eval/") and name.endswith("/accuracy") and row[name] is not None]
    if len(sets) > 1:
        return f"mean of {len(sets)} sets"
    low, high = row.get(f"{sets[0]}_ci_low"), row.get(f"{sets[0]}_ci_high")
    return f"95 %: {figure(low, 3)} – {figure(high, 3)}" if low is not None else "greedy"


def _sources(rollouts: Mapping[str, Any], dropped: float) -> str:
    parts = [f"{figure(rollouts[source])} {source}" for source in ("atropos", "local") if rollouts.get(source)]
    return ", ".join([*parts, f"{figure(dropped)} dropped"])


def _inner(mapping: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = mapping.get(key)
    return value if isinstance(value, Mapping) else {}


def _total(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(sum(row.get(name) or 0.0 for row in rows))
