"""Where the run is tracked: W&B's key and server, or nowhere."""

import importlib.util
import os
import socket
from urllib.parse import urlparse

from atropos_exp.assembly.check import Checked
from atropos_exp.doctor.line import Line, fail, ok, warn
from atropos_exp.parts.logger.trackio import Trackio
from atropos_exp.parts.logger.wandb import Mode, Wandb
from atropos_exp.parts.logger.wandb_process import DEFAULT_HOST, has_key

_CONNECT_SECONDS = 3.0


def check_tracking(checked: Checked) -> list[Line]:
    """Examine whether the logger's service can be reached, and with which account."""
    logger = checked.parts.logger
    if isinstance(logger, Wandb):
        return [_wandb(logger)]
    if isinstance(logger, Trackio) and importlib.util.find_spec("trackio") is None:
        return [fail("tracking", "logger=trackio, but trackio is not installed", "pip install 'trackio>=0.43'")]
    return [ok("tracking", f"{type(logger).__name__}; metrics.jsonl of the run folder has everything")]


def _wandb(logger: Wandb) -> Line:
    keyed = has_key()
    mode = os.environ.get("WANDB_MODE") if logger.mode is Mode.auto else logger.mode.value
    mode = mode or ("online" if keyed else "offline")
    if mode == "online" and not keyed:
        remedy = "wandb login, set WANDB_API_KEY, or logger.mode=offline"
        return fail("tracking", "W&B online without an API key", remedy)
    if mode == "offline":
        text = "W&B records offline" + ("" if keyed else ": no API key is here")
        return warn("tracking", text, "wandb login; or upload later with the `wandb sync` command that the run prints")
    if mode != "online":
        return ok("tracking", f"W&B is {mode}")
    address = urlparse(os.environ.get("WANDB_BASE_URL") or DEFAULT_HOST)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), _CONNECT_SECONDS).close()
    except OSError as error:
        text = f"W&B's server {address.hostname}:{port} cannot be reached ({error}); the run would record offline"
        return warn("tracking", text, "check network and WANDB_BASE_URL, or logger.mode=offline")
    return ok("tracking", f"W&B online at {address.hostname}, project {logger.project}")
