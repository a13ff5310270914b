"""The body of a report below its curves: where time went, sample rollouts, every metric, the configuration."""

from collections.abc import Mapping, Sequence
from typing import Any

from atropos_exp.metrics import sentence
from atropos_exp.report.charts import STAGES
from atropos_exp.report.html import card_table, escape, figure, seconds_figure, signed, tag
from atropos_exp.report.run_data import RunData, flatten
from atropos_exp.report.sections import swatch
from atropos_exp.runs.files import Row

LONGEST_TEXT = 6000  # characters shown of a prompt or completion
MOST_SAMPLES = 8  # shown of a step
_PLACES = ("run_dir", "output_dir", "resume")  # differ between runs without meaning anything


def stage_seconds(row: Row) -> dict[str, float]:
    """Return the seconds of a step by stage; `other` is what no stage accounts for."""
    seconds = {stage: row.get(f"time/{stage}_s") or 0.0 for stage in STAGES}
    return seconds | {"other": max(0.0, (row.get("time/step_s") or 0.0) - sum(seconds.values()))}


def time_shares(runs: Sequence[RunData], labels: Sequence[str], *, timing: str) -> str:
    """Return a bar per run, its mean step divided among its stages, and below it `timing`, the chart of the stages.

    Step 0 trains nothing and is left out.
    """
    bars, stages = [], [*STAGES, "other"]
    for run, label in zip(runs, labels, strict=True):
        steps = [stage_seconds(row) for row in run.rows if row.step and row.get("time/step_s")]
        if not steps:
            continue
        means = {stage: sum(step[stage] for step in steps) / len(steps) for stage in stages}
        whole = sum(means.values()) or 1.0
        pieces = "".join(
            tag("span", style=f"width:{means[stage] / whole:.3%};--c:var(--c{at})",
                title=f"{stage}: {seconds_figure(means[stage])}, {means[stage] / whole:.1%}")
            for at, stage in enumerate(stages)
        )  # fmt: skip
        spoken = ", ".join(f"{stage} {seconds / whole:.0%}" for stage, seconds in means.items() if seconds)
        bar = tag("span", pieces, class_="bar", role="img", aria_label=spoken)
        name = label if len(runs) > 1 else "mean step"
        bars.append(tag("div", tag("span", escape(name)), bar, tag("span", seconds_figure(whole)), class_="share"))
        if len(runs) == 1:
            bars.append(_stage_table(means, whole, steps))
    if not bars:
        return ""
    keys = tag("div", *(tag("span", swatch(at), stage) for at, stage in enumerate(stages)), class_="keys")
    shares = tag("div", keys, *bars, class_="card shares")
    return tag("h2", "Where the time goes") + shares + timing.replace('"card"', '"card wide"', 1)


def samples(runs: Sequence[RunData], labels: Sequence[str]) -> str:
    """Return early and late sample rollouts side by side."""
    blocks = []
    for run, label in zip(runs, labels, strict=True):
        if not run.samples:
            continue
        words = ["Early", "Late"] if len(run.samples) > 1 else ["Only"]
        columns = (_column(word, *found) for word, found in zip(words, run.samples, strict=True))
        pair = tag("div", *columns, class_="pair")
        blocks.append(pair if len(runs) == 1 else tag("details", tag("summary", escape(label)), pair, class_="samples"))
    if not blocks:
        return ""
    text = ("As the tokenizer decodes them, special tokens included. A green edge: the update made the completion "
            "likelier; a red one: less likely.")  # fmt: skip
    about = tag("p", text, class_="muted small", style="margin-bottom:10px")
    return tag("h2", "Sample rollouts") + about + "".join(blocks)


def all_metrics(runs: Sequence[RunData]) -> str:
    """Return every metric of a single run with its sentence, and its first, last, smallest and largest value."""
    if len(runs) != 1 or not runs[0].rows:
        return ""
    rows = []
    for name in dict.fromkeys(name for row in runs[0].rows for name in row if name != "step"):
        values = [value for row in runs[0].rows if isinstance(value := row.get(name), (int, float))]
        cells = [values[0], values[-1], min(values), max(values)] if values else [None] * 4
        rows.append([f"<code>{escape(name)}</code>", escape(sentence(name) or ""), *(figure(cell) for cell in cells)])
    table = card_table(["Metric", "What it says", "First", "Last", "Smallest", "Largest"], rows, numeric_from=2)
    return tag("details", tag("summary", f"All {len(rows)} metrics"), table, class_="card")


def configurations(runs: Sequence[RunData], labels: Sequence[str]) -> str:
    """Return the resolved configurations, folded; for several runs, first the settings in which they differ."""
    blocks = [tag("h2", "Configuration")]
    if len(runs) > 1:
        differing = differences([run.config for run in runs])
        keys = [key for key in differing if key not in _PLACES]
        rows = [[escape(label), *(escape(str(differing[key][at])) for key in keys)] for at, label in enumerate(labels)]
        table = card_table(["Run", *keys], rows, numeric_from=99)
        blocks.append(table if keys else tag("p", "All runs have the same."))
    for run, label in zip(runs, labels, strict=True):
        name = "config.yaml" if len(runs) == 1 else label
        text = run.config_text or "config.yaml is not there"
        blocks.append(tag("details", tag("summary", escape(name)), tag("pre", escape(text)), class_="card"))
    return "".join(blocks)


def differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the settings in which configurations differ: key -> value in each, None where it is absent."""
    flat = [flatten(config) for config in configs]
    keys = dict.fromkeys(key for config in flat for key in config)
    values = {key: [config.get(key) for config in flat] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def run_labels(runs: Sequence[RunData]) -> list[str]:
    """Return short names that tell the runs apart: what differs in their configuration, else their folders."""
    if len(runs) == 1:
        return [runs[0].name]
    differing = {
        key: values for key, values in differences([run.config for run in runs]).items()
        if key not in _PLACES and None not in values
    }  # fmt: skip
    labels = [", ".join(_setting(key, values[at]) for key, values in differing.items()) for at in range(len(runs))]
    if 0 < len(differing) <= 3 and len(set(labels)) == len(runs):
        return labels
    parts = [run.folder.absolute().parts for run in runs]
    depth = next((n for n in range(1, 9) if len({part[-n:] for part in parts}) == len(runs)), 8)
    return ["/".join(part[-depth:]) for part in parts]


def _setting(key: str, value: Any) -> str:
    group, _, leaf = key.rpartition(".")
    return f"{group}={str(value).rsplit('.', 1)[-1]}" if leaf == "_target_" else f"{leaf}={value}"


def _stage_table(means: Mapping[str, float], whole: float, steps: Sequence[Mapping[str, float]]) -> str:
    rows = [
        [f"{swatch(at)} {stage}", seconds_figure(means[stage]),
         f"{means[stage] / whole:.1%}", seconds_figure(max(step[stage] for step in steps))]
        for at, stage in enumerate(means)
    ]  # fmt: skip
    return card_table(["Stage", "Mean of a step", "Share", "Longest"], rows).replace("card scroll", "scroll")


def _column(word: str, step: int, records: Sequence[Mapping[str, Any]]) -> str:
    num_left = len(records) - MOST_SAMPLES
    more = tag("p", f"{num_left} more in samples/step_{step:06d}.jsonl", class_="muted small") if num_left > 0 else ""
    return tag("div", tag("h3", f"{word}: step {step}"), *map(_sample, records[:MOST_SAMPLES]), more)


def _sample(record: Mapping[str, Any]) -> str:
    marks = [tag("span", f"reward {figure(record.get('reward'), 3)}", class_="reward")]
    marks.append(tag("span", f"advantage {signed(record.get('advantage'))}"))
    if record.get("lag"):
        marks.append(tag("span", f"lag {figure(record['lag'])}"))
    if record.get("finish") == "length":
        marks.append(tag("span", "cut at the token limit"))
    marks.append(tag("span", escape(str(record.get("prompt_id", "")))))
    completion = escape(_clipped(record.get("completion")))
    answer = tag("pre", completion or "(empty)", class_="completion" if completion else "nothing")
    prompt = tag("pre", escape(_clipped(record.get("prompt"))), class_="prompt")
    return tag("div", tag("div", *marks, class_="marks"), prompt, answer, class_=f"card sample {_push(record)}")


def _push(record: Mapping[str, Any]) -> str:
    """Whether the update made the completion likelier or less likely."""
    advantage = record.get("advantage")
    return "" if not isinstance(advantage, (int, float)) or advantage == 0 else "up" if advantage > 0 else "down"


def _clipped(text: Any) -> str:
    shown = text if isinstance(text, str) else ""
    num_left = len(shown) - LONGEST_TEXT
    return f"{shown[:LONGEST_TEXT]}\n… and {num_left} characters" if num_left > 0 else shown
