"""What a run folder holds. The run may be unfinished, failed, one step long, or half missing."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from atropos_exp.errors import UserError
from atropos_exp.runs.files import Row, by_step, last_step, read_json_lines, read_metrics

MAX_POINTS = 1500  # of a curve; longer runs are thinned to means of neighbours
_PARTS = ("metrics.jsonl", "summary.json", "config.yaml", "run.json")


@dataclass(frozen=True, kw_only=True)
class RunData:
    """One run, as far as its folder tells. `missing` has a sentence for everything that is absent or damaged."""

    folder: Path
    rows: list[Row]  # by step
    summary: Mapping[str, Any]
    config_text: str
    config: Mapping[str, Any]
    commands: list[str]  # one per attempt
    samples: list[tuple[int, list[dict[str, Any]]]]  # (step, records), early and late
    missing: list[str] = field(default_factory=list)

    @property
    def status(self) -> str:
        """finished, stopped or failed as the summary says; unfinished without one, or if the run went on after it."""
        status = str(self.summary.get("status") or "unfinished")
        later = last_step(self.rows) > (self.summary.get("steps") or 0)
        return "unfinished" if later else status

    @property
    def name(self) -> str:
        """The run's name in its configuration, else that of its folder."""
        return str(self.config.get("name") or self.folder.name)


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Return the run folders among `paths`; a folder of runs, such as a sweep, stands for all of them.

    Raises UserError for a path without any.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise UserError(
                f"report: {path} is no folder; give the folder of a run, such as outputs/demo/<date>/<time>"
            )
        inside = [path] if _is_run(path) else sorted({file.parent for part in _PARTS for file in path.rglob(part)})
        if not inside:
            raise UserError(f"report: {path} holds no run: none of {', '.join(_PARTS)} is in it or below it")
        found += [folder for folder in inside if folder not in found]
    return found


def load_run(folder: Path) -> RunData:
    """Read one run folder. Never raises for what is missing or damaged, but says so in `missing`."""
    missing: list[str] = []
    rows, num_bad = read_metrics(folder / "metrics.jsonl")
    if not rows:
        missing.append("metrics.jsonl has no steps yet: there are no curves")
    if num_bad:
        missing.append(f"metrics.jsonl: {num_bad} torn line{'s' if num_bad > 1 else ''} left out")
    _, summary = _read(folder / "summary.json", json.loads, missing, ": the run goes on, or was killed")
    config_text, config = _read(folder / "config.yaml", yaml.safe_load, missing, "")
    commands = _text(folder / "command.txt").splitlines()
    if not commands:
        missing.append("command.txt is not there: the command line is unknown")
    samples = _early_and_late(folder / "samples")
    if not samples:
        missing.append("samples/ is empty: there are no sample rollouts")
    return RunData(
        folder=folder,
        rows=by_step(rows),
        summary=summary,
        config_text=config_text,
        config=config,
        commands=commands,
        samples=samples,
        missing=missing,
    )


def columns(rows: Sequence[Mapping[str, float | None]]) -> dict[str, list[float | None]]:
    """Return rows as columns by name, thinned to about MAX_POINTS: neighbours are averaged, gaps stay gaps."""
    names = dict.fromkeys(name for row in rows for name in row)
    stride = -(-len(rows) // MAX_POINTS)
    if stride <= 1:
        return {name: [_number(row.get(name)) for row in rows] for name in names}
    blocks = [rows[at : at + stride] for at in range(0, len(rows), stride)]
    return {name: [_mean([_number(row.get(name)) for row in block]) for block in blocks] for name in names}


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Join the keys of nested mappings: {"a": {"b": 1}} becomes {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _is_run(folder: Path) -> bool:
    return any((folder / part).exists() for part in _PARTS)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _mean(values: Sequence[float | None]) -> float | None:
    given = [value for value in values if value is not None]
    return sum(given) / len(given) if given else None


def _early_and_late(folder: Path) -> list[tuple[int, list[dict[str, Any]]]]:
    """The first and the last file with records in it."""
    paths = sorted(path for path in folder.glob("step_*.jsonl") if path.stem.removeprefix("step_").isdigit())
    early, late = _first_with_records(paths), _first_with_records(reversed(paths))
    if early is None or late is None:
        return []
    return [early] if early[0] == late[0] else [early, late]


def _first_with_records(paths: Iterable[Path]) -> tuple[int, list[dict[str, Any]]] | None:
    read = ((int(path.stem.removeprefix("step_")), read_json_lines(path)[0]) for path in paths)
    return next(((step, records) for step, records in read if records), None)


def _read(path: Path, parse: Callable[[str], Any], missing: list[str], absent: str) -> tuple[str, Mapping[str, Any]]:
    """The text of a file, and the mapping in it; empty if it is absent, which `absent` says, or damaged."""
    if not path.exists():
        missing.append(f"{path.name} is not there{absent}")
        return "", {}
    text = _text(path)
    try:
        content = parse(text)
    except (ValueError, yaml.YAMLError):
        content = None
    if isinstance(content, dict):
        return text, content
    missing.append(f"{path.name} is damaged")
    return text, {}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
