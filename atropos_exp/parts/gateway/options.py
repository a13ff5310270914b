"""What the trainer tells the gateway's process on its command line, as one JSON object. Secrets go elsewhere."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

PRIVATE_TOKEN = "ATROPOS_EXP_GATEWAY_TOKEN"  # in its environment: the trainer's own token
CLIENT_TOKEN = "ATROPOS_EXP_GATEWAY_CLIENT_TOKEN"  # of environments, where one is asked for
ENGINE_TOKENS = "ATROPOS_EXP_ENGINE_TOKENS"  # JSON: of each of the engine's servers, null where it asks for none


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """See `GatewaySettings` for what has the same name there."""

    socket_fds: tuple[int, ...]  # listening
    engine_kind: str
    engine_addresses: tuple[str, ...]  # of its servers
    model_folder: str
    model_name: str
    stop_token_ids: tuple[int, ...]
    max_sequence_length: int
    seed: int
    incarnation: int  # 0, then 1 more with every restart
    held: bool  # start with the gate closed
    ledger_tokens: int
    max_hold_seconds: float
    request_timeout_seconds: float
    engine_silence_seconds: float
    max_body_mb: int
    start_timeout_seconds: float  # these two bound the trainer's waits; the process ignores them
    health_timeout_seconds: float

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Options:
        values = json.loads(text)
        for name in ("socket_fds", "engine_addresses", "stop_token_ids"):
            values[name] = tuple(values[name])
        return cls(**values)
