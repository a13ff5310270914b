"""`logger=trackio`: a local dashboard beside the console, fed by a process of its own (`remote.py` says why)."""

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from atropos_exp.config.settings import Count, Seconds, Settings
from atropos_exp.parts.logger.console import Console
from atropos_exp.parts.logger.remote import RemoteLogger
from atropos_exp.runs.redaction import redact

INSTALL = "pip install 'atropos-exp[trackio]' (docs/troubleshooting.md, if pip refuses)"


class Trackio(Settings):
    """Settings of `logger=trackio`."""

    live: bool | None
    every: Count
    project: Annotated[str, Field(min_length=1, description="the name of a project")]
    group: str | None
    folder: str
    finish_timeout: Seconds
    queue_size: Count

    def preflight(self) -> Iterator[str]:
        """Yield a problem if trackio is not installed."""
        if importlib.util.find_spec("trackio") is None:
            yield f"logger=trackio, but trackio is not installed; {INSTALL}, or logger=console"

    def start(
        self,
        *,
        run_folder: Path,
        config: Mapping[str, Any],
        name: str,
        resumed: bool,
        total_steps: int,
        group: str | None = None,
    ) -> RemoteLogger:
        """Return the logger of a run. Secrets in `config` are redacted here. A resumed run continues its curves."""
        console = Console(live=self.live, every=self.every).start(
            run_folder=run_folder, config=config, name=name, resumed=resumed, total_steps=total_steps, group=None
        )
        folder = Path(self.folder).expanduser().absolute()
        return RemoteLogger(
            "trackio",
            "atropos_exp.parts.logger.trackio_process",
            console,
            settings={
                "folder": str(folder),
                "project": self.project,
                "group": group if self.group is None else self.group,
                "name": "/".join(run_folder.absolute().parts[-3:]),
                "config": redact(config),
                "finish_timeout": self.finish_timeout,
                "show": f"python -m atropos_exp.report.dashboard --local {folder}",
            },
            log=run_folder / "log" / "trackio.log",
            queue_size=self.queue_size,
            finish_timeout=self.finish_timeout,
        )
