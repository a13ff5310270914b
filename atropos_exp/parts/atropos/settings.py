"""`conf/atropos`: which Atropos API a run trains from, and how patient it is."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from atropos_exp.config.settings import Index, Seconds, Settings

Port = Annotated[int, Field(ge=1, le=65535)]


class AtroposSettings(Settings):
    """The settings of `conf/atropos`, in seconds where they are times. `launch.start_programs` acts on them."""

    api_url: Annotated[str | None, Field(pattern=r"^https?://[^/\s]+(/\S*)?$", description="http://HOST:PORT, or null")]
    launch: bool
    timeout: Seconds
    start_timeout: Seconds
    data_timeout: Seconds
    batch_timeout: Annotated[float, Field(ge=120, le=1e6, description="seconds; hanging up earlier loses the batch")]
    take_over: bool
    max_version_lag: Annotated[int | None, Field(ge=0, le=10**9, description="null: no limit")]
    max_restarts: Index
    extra_ports: list[Port]

    def preflight(self, *, uses_atropos: bool) -> Iterator[str]:
        """What stands in the way of using Atropos at all."""
        import importlib.util

        if not uses_atropos:
            return
        if self.api_url is None and not self.launch:
            yield "api_url: got null with launch=false, so there is no API to use; set one of them, or rollout=local"
        if self.launch and importlib.util.find_spec("atroposlib") is None:
            yield (
                "launch: got true, but atroposlib is not installed here; "
                "pip install atroposlib==0.4.0, set launch=false, or rollout=local"
            )
