"""`logger=console`: a live progress line in a terminal, a plain line per step anywhere else."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar

from atropos_exp.config.settings import Count, Settings
from atropos_exp.parts.logger.step_line import FirstTimes, LiveFigures, TimeLeft, clock, step_line
from atropos_exp.types import RunDescription, SampleRecord, StepMetrics

if TYPE_CHECKING:
    from rich.progress import Progress

log = logging.getLogger(__name__)


class Console(Settings):
    """Settings of `logger=console`."""

    live: bool | None  # None: if standard output is a terminal
    every: Count  # steps between plain lines

    project: ClassVar[None] = None  # nothing is tracked outside the run folder
    group: ClassVar[None] = None

    def start(self, run: RunDescription) -> ConsoleLogger:
        """Return the logger of a run, which prints to standard output."""
        return ConsoleLogger(self, run, sys.stdout)


class ConsoleLogger:
    """A `Logger` that prints.

    A stream that is closed under it (`| head`) silences it and does not stop the run.
    """

    def __init__(self, settings: Console, run: RunDescription, stream: IO[str]) -> None:
        self._every = settings.every
        self._run = run
        self._stream = stream
        self._left = TimeLeft(run.total_steps)
        self._figures = LiveFigures()
        self._first_times = FirstTimes()
        self._open = True
        is_live = stream.isatty() if settings.live is None else settings.live
        self._bar = _progress_bar(stream, run.name, run.total_steps) if is_live else None

    def log(self, metrics: StepMetrics) -> None:
        """Show a step: move the live line, or print one of its own if the step is one of `every`."""
        left = self._left.after(metrics)
        line = step_line(metrics, total_steps=self._run.total_steps, left=left)
        evaluated = any(name.startswith("eval/") for name in metrics.values)
        for text in self._first_times.in_step(metrics):
            self.say(f"warning: {text}")
        if self._bar is not None:
            if evaluated:  # worth keeping on the screen
                self.say(line)
            figures = self._figures.after(metrics, left)
            self._bar.update(self._bar.task_ids[0], completed=metrics.step, figures=figures)
        elif evaluated or metrics.step in (0, 1, self._run.total_steps) or metrics.step % self._every == 0:
            self.say(line)

    def samples(self, step: int, records: Sequence[SampleRecord]) -> None: ...

    def close(self, summary: Mapping[str, Any]) -> None:
        """End the live line and print how the run ended."""
        if self._bar is not None:
            bar, self._bar = self._bar, None
            bar.stop()
        self.say(closing_line(summary, self._run.folder))

    def say(self, text: str) -> None:
        """Print one line, above the live one if there is one."""
        if not self._open:
            return
        try:
            if self._bar is not None:
                self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                self._stream.write(text + "\n")
                self._stream.flush()
        except (OSError, ValueError) as error:  # a closed pipe or file
            self._open = False
            log.warning("the console cannot be written to any more: %s", error)


def _progress_bar(stream: IO[str], name: str, total_steps: int) -> Progress:
    """rich's progress display, which redraws itself twice a second so that a long step is seen to be alive."""
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
    from rich.table import Column

    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
        console=RichConsole(file=stream),
        refresh_per_second=2,
    )
    bar.add_task(name, total=total_steps, figures="")
    bar.start()
    return bar


def closing_line(summary: Mapping[str, Any], run_folder: Path) -> str:
    """Return the last line of a run.

    For example `finished after 120 steps in 0:54: reward 0.31 → 0.92, eval 0.33 → 0.93; see outputs/demo/…`.
    """
    parts = [
        f"{what} {first:.3f} → {last:.3f}"
        for what in ("reward", "eval")
        if (first := summary.get(f"{what}_first")) is not None and (last := summary.get(f"{what}_last")) is not None
    ]
    head = f"{summary.get('status', 'ended')} after {summary.get('steps', 0)} steps"
    if summary.get("wall_seconds"):
        head += f" in {clock(summary['wall_seconds'])}"
    if summary.get("error"):
        parts.append(str(summary["error"]))
    return f"{head}: {', '.join(parts)}; see {run_folder}" if parts else f"{head}; see {run_folder}"
