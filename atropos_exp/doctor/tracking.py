"""Where the run is tracked: W&B's key and server, or nowhere."""

import importlib.util
import os
from urllib.parse import urlparse

from atropos_exp.assembly.check import Checked
from atropos_exp.doctor.line import Line, fail, ok, warn
from atropos_exp.parts.logger.trackio import Trackio
from atropos_exp.parts.logger.wandb import CONNECT_SECONDS, Wandb
from atropos_exp.parts.logger.wandb_process import DEFAULT_HOST, has_key, resolved, unreachable


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
    mode = resolved(logger.mode.value)
    if mode == "online" and not keyed:
        remedy = "wandb login, set WANDB_API_KEY, or logger.mode=offline"
        return fail("tracking", "W&B online without an API key", remedy)
    if mode == "offline":
        text = "W&B records offline" + ("" if keyed else ": no API key is here")
        return warn("tracking", text, "wandb login; or upload later with the `wandb sync` command that the run prints")
    if mode != "online":
        return ok("tracking", f"W&B is {mode}")
    if reason := unreachable(CONNECT_SECONDS):
        text = f"{reason}; the run would record offline"
        return warn("tracking", text, "check network and WANDB_BASE_URL, or logger.mode=offline")
    host = urlparse(os.environ.get("WANDB_BASE_URL") or DEFAULT_HOST).hostname
    return ok("tracking", f"W&B online at {host}, project {logger.project}")
