"""The error for a request that is not served."""

# Why a request was refused: the names of the counters `refused_<reason>`.
REASONS = ("parameter", "value", "length", "body", "route", "token", "hold", "engine")


class Refusal(Exception):
    """A request that is answered with HTTP `status` and an error in OpenAI's form, and counted under `reason`.

    `reason` is one of REASONS; `param` names the parameter at fault; `retry_seconds` is sent as Retry-After.
    """

    def __init__(
        self, status: int, reason: str, message: str, *, param: str | None = None, retry_seconds: int | None = None
    ) -> None:
        super().__init__(message)
        assert reason in REASONS, reason
        self.status = status
        self.reason = reason
        self.param = param
        self.retry_seconds = retry_seconds

    def body(self) -> dict[str, object]:
        """The error as OpenAI's clients read it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.reason}}


def unsupported(name: str, value: object, instead: str) -> Refusal:
    """The refusal of a parameter that asks for something the gateway does not do; `instead` says what to do."""
    return Refusal(400, "parameter", f"{name}={_shown(value)} is not supported; {instead}", param=name)


def invalid(name: str, value: object, expected: str) -> Refusal:
    """The refusal of a value; `expected` says what it must be."""
    return Refusal(400, "value", f"{name} must be {expected}; got {_shown(value)}", param=name)


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
