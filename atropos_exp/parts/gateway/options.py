"""The options of the gateway's process: JSON on its command line. Secrets travel in its environment instead."""

from pathlib import Path

from pydantic import BaseModel

PRIVATE_TOKEN = "ATROPOS_EXP_GATEWAY_TOKEN"  # environment variable with the trainer's own token
CLIENT_TOKEN = "ATROPOS_EXP_GATEWAY_CLIENT_TOKEN"  # with the token that environments must send, if any
ENGINE_TOKENS = "ATROPOS_EXP_ENGINE_TOKENS"  # with the tokens of the engine's servers, as JSON; null: none
ENTRY_TOKENS = 48  # what the bookkeeping of one completion in the ledger weighs, in tokens of 8 bytes


class Options(BaseModel, frozen=True, extra="forbid"):
    """Fields that `GatewaySettings` has too mean the same here."""

    socket_fds: tuple[int, ...]  # inherited listening sockets
    engine_addresses: tuple[str, ...]  # one per server
    model_folder: Path
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
