"""Every error of our own that crosses a room: whom it is for, and whether something else may take over."""


class Refused(Exception):
    """A request that this server will not do. The text goes to the client."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status  # of HTTP: 400 wrong request, 409 not in this state, 503 not in time


class UserError(ValueError):
    """Something the user can mend: what, where, got, expected, what to do. Ends a run with exit code 2."""


class StopRequested(BaseException):
    """The user wants the run to stop, and it waits for something that may never come, or has not begun yet."""


class SourceUnavailable(RuntimeError):
    """A rollout source gave nothing within its deadlines. The text says why; another source may take over."""


class WireError(ValueError):
    """The bytes are not a message of this format."""


class EngineError(RuntimeError):
    """The engine did not do what it was asked: it died, hangs, or refuses. The text says what was waited for."""


class EngineLost(EngineError):
    """The engine's process has died or hangs: only a new one can go on."""


class WrongSampler(RuntimeError):
    """Rollouts do not come from the weights that they say. The text names step, figures or tensors, and what to do."""


class SyncError(RuntimeError):
    """The engine does not provably hold the trainer's weights. The text names the tensor or the reason."""
