"""`gateway=default`: the settings of the gateway, the one address that environments talk to."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from atropos_exp.config.settings import Seconds, Settings
from atropos_exp.errors import UserError
from atropos_exp.parts.gateway.client import GatewayClient
from atropos_exp.parts.gateway.options import ENTRY_TOKENS, Options
from atropos_exp.parts.gateway.ports import Doors
from atropos_exp.types import Endpoint

LOOPBACK = ("127.0.0.1", "localhost", "::1")
LEAST_LEDGER, REMEMBERED_BATCHES = 4_000_000, 4  # tokens of the ledger; batches of full length that it can hold
ENVIRONMENT_LIMIT = 600.0  # seconds after which an Atropos environment gives a rollout up (its worker_timeout)
Patience = Annotated[float, Field(gt=0, lt=ENVIRONMENT_LIMIT, description="seconds; environments wait no longer")]


class GatewaySettings(Settings):
    """The settings of `conf/gateway`, whose YAML explains each; `start` starts the gateway that they describe."""

    host: str
    port: Annotated[int | None, Field(ge=1, le=65535, description="null: a free one")]
    token: Annotated[str | None, Field(min_length=8, description="at least 8 characters, or null")]
    ledger_tokens: Annotated[int | None, Field(ge=1000, le=10**10, description="null: as many as the run needs")]
    max_hold_seconds: Patience
    request_timeout_seconds: Patience
    engine_silence_seconds: Seconds
    start_timeout_seconds: Seconds
    health_timeout_seconds: Seconds
    max_body_mb: Annotated[int, Field(ge=1, le=1024, description="MiB")]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.host not in LOOPBACK and self.token is None:
            raise UserError(
                f"host: got {self.host!r}, which others can reach, without a token; set gateway.token to a secret that "
                "environments send as their API key, or gateway.host=127.0.0.1"
            )
        if self.request_timeout_seconds < self.max_hold_seconds:
            raise UserError(
                f"request_timeout_seconds: got {self.request_timeout_seconds:g}, expected at least max_hold_seconds "
                f"({self.max_hold_seconds:g}), because a hold is part of a request"
            )
        return self

    def preflight(
        self, *, uses_atropos: bool, batch_size: int, group_size: int, max_response_length: int
    ) -> Iterator[str]:
        """A ledger that would forget a batch before it comes back."""
        needed = batch_size * group_size * (max_response_length + ENTRY_TOKENS)
        if uses_atropos and self.ledger_tokens is not None and self.ledger_tokens < needed:
            yield (
                f"ledger_tokens: got {self.ledger_tokens}, but one batch has up to {batch_size} x {group_size} "
                f"completions of {max_response_length} tokens (each counts {ENTRY_TOKENS} more): the ledger would have "
                f"forgotten it when it comes back; expected at least {needed}, or null"
            )

    def listen(self, extra_ports: Sequence[int]) -> Doors:
        """Bind the ports, so that environments know where to connect before the gateway runs. Raises UserError for a
        port that is taken."""
        return Doors.open(self.host, self.port, extra_ports)

    def start(
        self,
        *,
        doors: Doors,
        endpoints: Sequence[Endpoint],
        model_folder: Path,
        model_name: str,
        stop_token_ids: tuple[int, ...],
        max_sequence_length: int,
        seed: int,
        log_folder: Path,
        batch_tokens: int = 0,
    ) -> GatewayClient:
        """Start the process at `doors` and wait until it answers; raises EngineError if it does not. Stopping it closes
        the doors. `endpoints` are the engine's servers, which share the requests.
        `batch_tokens`: the most that one batch weighs in the ledger."""
        options = Options(
            socket_fds=tuple(listener.fileno() for listener in doors.sockets),
            engine_addresses=tuple(endpoint.address for endpoint in endpoints),
            model_folder=model_folder,
            model_name=model_name,
            stop_token_ids=stop_token_ids,
            max_sequence_length=max_sequence_length,
            seed=seed,
            incarnation=0,
            held=False,
            **{
                **self.model_dump(exclude={"host", "port", "token"}),
                "ledger_tokens": self.ledger_tokens or max(LEAST_LEDGER, REMEMBERED_BATCHES * batch_tokens),
            },
        )
        return GatewayClient(options, doors=doors, endpoints=endpoints, token=self.token, log_folder=log_folder)
