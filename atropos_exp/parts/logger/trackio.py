"""`logger=trackio`: a local dashboard beside the console, fed by a process of its own (`remote.py` says why)."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from atropos_exp.parts.logger.remote import RemoteLogger, RemoteSettings
from atropos_exp.types import RunDescription

INSTALL = "pip install 'trackio>=0.43' (docs/troubleshooting.md, if pip refuses)"


class Trackio(RemoteSettings):
    """Settings of `logger=trackio`."""

    folder: str

    def preflight(self) -> Iterator[str]:
        """Yield a problem if trackio is not installed."""
        if importlib.util.find_spec("trackio") is None:
            yield f"logger=trackio, but trackio is not installed; {INSTALL}, or logger=console"

    def start(self, run: RunDescription) -> RemoteLogger:
        """Return the logger of a run. A resumed run continues its curves."""
        folder = Path(self.folder).expanduser().absolute()
        facts = {
            "folder": str(folder),
            "name": "/".join(run.folder.absolute().parts[-3:]),
            "finish_timeout": self.finish_timeout,
            "show": f"python -m atropos_exp.report.dashboard --local {folder}",
        }
        return RemoteLogger(self, run, library="trackio", name="trackio", facts=facts)
