"""Names that can be imported and not be called."""

from __future__ import annotations

from typing import Any


def absent(name: str) -> Any:
    """For a module's `__getattr__`."""
    if name.startswith("__"):
        raise AttributeError(name)

    def call(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"{name} is not there on a CPU")

    return call
