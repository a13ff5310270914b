"""The state of a sweep: a table that is drawn again and again on a terminal, or a line per change elsewhere."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from atropos_exp.runs.files import last_step, read_metrics
from atropos_exp.runs.summary import eval_accuracy
from atropos_exp.runs.sweep_folder import Phase, RunState, SweepFolder, describe_point
from atropos_exp.sweep.driver import Sweep

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

COLOURS = {Phase.FINISHED: "green", Phase.PRUNED: "cyan", Phase.RUNNING: "blue", Phase.PENDING: "dim",
           Phase.STOPPED: "yellow", Phase.CANCELLED: "yellow"}  # fmt: skip
OTHERS = "red"


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """What a run has recorded so far."""

    step: int
    eval_first: float | None
    eval_last: float | None
    reward_last: float | None


def progress(folder: SweepFolder, number: int) -> Progress:
    """Read what run `number` has recorded so far."""
    path = folder.run_folder(number) / "metrics.jsonl"
    try:
        seen = path.stat()
    except FileNotFoundError:
        return _progress(path, 0, 0)
    return _progress(path, seen.st_mtime_ns, seen.st_size)


@lru_cache(maxsize=1024)
def _progress(path: Path, modified: int, size: int) -> Progress:
    """Read again only what has changed: the table of a large sweep is renewed every second."""
    rows, _ = read_metrics(path)
    accuracies = [value for row in rows if (value := eval_accuracy(row)) is not None]
    rewards = [value for row in rows if (value := row.get("reward/mean")) is not None]
    return Progress(
        step=last_step(rows),
        eval_first=accuracies[0] if accuracies else None,
        eval_last=accuracies[-1] if accuracies else None,
        reward_last=rewards[-1] if rewards else None,
    )


def sweep_table(sweep: Sweep) -> Table:
    """Return a table with one row per run."""
    from rich.markup import escape
    from rich.table import Table

    states = sweep.states()
    table = Table(title=f"{sweep.request.name}: {counts(states)}", title_justify="left", header_style="dim", box=None)
    for name in ("run", "point", "seed", "state", "step", "eval", "reward", "time", ""):
        table.add_column(name, justify="right" if name in ("seed", "step", "reward", "time") else "left",
                         overflow="fold", no_wrap=name in ("run", "state", "step", "eval"))  # fmt: skip
    for record in sweep.folder.records():
        state, so_far = states[record.number], progress(sweep.folder, record.number)
        colour = COLOURS.get(state.phase, OTHERS)
        table.add_row(
            record.folder, escape(describe_point(record.values)), str(record.seed), f"[{colour}]{state.phase}[/]",
            f"{so_far.step}/{record.max_steps}", f"{_figure(so_far.eval_first)} → {_figure(so_far.eval_last)}",
            _figure(so_far.reward_last), _duration(state), escape(state.reason),
        )  # fmt: skip
    return table


def counts(states: Mapping[int, RunState]) -> str:
    """Return how many runs are in each phase, such as "4 finished, 1 running, 1 failed"."""
    found = Counter(state.phase for state in states.values())
    return ", ".join(f"{found[phase]} {phase}" for phase in Phase if found[phase]) or "no runs yet"


def print_status(sweep: Sweep) -> None:
    """Print the table once."""
    _console().print(sweep_table(sweep))


class LiveTable:
    """Shows a sweep each time it is called: redraws the table on a terminal, prints changed runs elsewhere."""

    def __init__(self) -> None:
        self._live: Live | None = None
        self._told: dict[int, Phase] = {}

    def close(self) -> None:
        """Leave the table as it was drawn last."""
        if self._live is not None:
            self._live.stop()

    def __call__(self, sweep: Sweep) -> None:
        if not sys.stdout.isatty():
            self._tell_changes(sweep)
            return
        from rich.live import Live

        if self._live is None:
            self._live = Live(console=_console(), auto_refresh=False)
            self._live.start()
        self._live.update(sweep_table(sweep), refresh=True)

    def _tell_changes(self, sweep: Sweep) -> None:
        states = sweep.states()
        for record in sweep.folder.records():
            state = states[record.number]
            if self._told.get(record.number, Phase.PENDING) is not state.phase:
                reason = f": {state.reason}" if state.reason else ""
                print(f"{record.label}: {state.phase}{reason}", flush=True)
            self._told[record.number] = state.phase


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=False, width=None if sys.stdout.isatty() else 160)


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _duration(state: RunState) -> str:
    if state.started is None:
        return ""
    seconds = round((state.ended if state.ended is not None else time.time()) - state.started)
    minutes, seconds = divmod(max(0, seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
