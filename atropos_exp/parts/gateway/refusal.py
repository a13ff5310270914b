"""A request that is not served, and what its sender is told."""

from __future__ import annotations

# Why a request was refused: the names of the counters `refused_<reason>`.
REASONS = ("parameter", "value", "length", "body", "route", "token", "hold", "engine")


class Refusal(Exception):
    """Answered with `status` and an error in the OpenAI form; counted under `reason`, one of REASONS."""

    def __init__(
        self, status: int, reason: str, message: str, *, param: str | None = None, retry_seconds: int | None = None
    ) -> None:
        super().__init__(message)
        assert reason in REASONS, reason
        self.status = status
        self.reason = reason
        self.param = param
        self.retry_seconds = retry_seconds  # sent as Retry-After

    def body(self) -> dict[str, object]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.reason}}


def unsupported(name: str, value: object, instead: str) -> Refusal:
    """A parameter that asks for something the gateway does not do."""
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return Refusal(400, "parameter", f"{name}={shown} is not supported; {instead}", param=name)


def invalid(name: str, value: object, expected: str) -> Refusal:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return Refusal(400, "value", f"{name} must be {expected}; got {shown}", param=name)
