"""The local dashboard: trackio's page over what runs with `logger=trackio` wrote. Only this machine can open it."""

import importlib.util
import os
from pathlib import Path

from atropos_exp.errors import UserError

INSTALL = "pip install 'trackio>=0.43' (docs/troubleshooting.md, if pip refuses)"


def show(folder: Path, *, port: int | None, open_browser: bool) -> None:
    """Serve the dashboard until Ctrl-C. Raises UserError without trackio, or if `folder` has no run."""
    if importlib.util.find_spec("trackio") is None:
        raise UserError(f"the local dashboard is trackio's, which is not installed; {INSTALL}")
    if not any(folder.glob("*.db")):
        raise UserError(
            f"{folder} holds no run; give logger.folder of a run that was started with logger=trackio "
            "(default: outputs/trackio)"
        )
    os.environ["TRACKIO_DIR"] = str(folder.absolute())  # read at import
    os.environ["HF_HUB_OFFLINE"] = "1"
    import trackio

    trackio.show(host="127.0.0.1", server_port=port, open_browser=open_browser, block_thread=True)
