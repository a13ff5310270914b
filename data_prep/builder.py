"""The protocol of a builder: a frozen object whose fields are its arguments, which drafts rows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from atropos_exp.config.settings import Settings
from atropos_exp.parts.data.raw import VerlRow

if TYPE_CHECKING:
    from atropos_exp.interfaces import Reward

AS_RUN: dict[str, Any] = {"num_workers": 2, "timeout_seconds": 10.0}  # how the self-test runs a reward


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Draft:
    """The rows of a data set in verl's schema, before duplicates are dropped."""

    train: list[VerlRow]
    test: list[VerlRow]
    source: str  # where they come from, for the manifest
    counts: Mapping[str, int] = field(default_factory=dict)  # what was left out on the way here


class Builder(Settings):
    """Builds one data set. Equal arguments draft equal rows."""

    NAME: ClassVar[str]
    VERSION: ClassVar[int]  # raised whenever equal arguments would give other rows
    MAX_UNSCORABLE: ClassVar[float]  # fraction of rows that may fail the reward self-test: they are dropped
    MAY_HANG: ClassVar[bool]  # the reward may hang on these rows, so the self-test scores them with a time limit

    @abstractmethod
    def draft(self) -> Draft:
        """All rows, before they are checked. Raises UserError if the source cannot be read."""

    @abstractmethod
    def reward(self) -> Reward:
        """The reward that these rows are made for."""

    @abstractmethod
    def gold(self, row: VerlRow) -> str:
        """A right answer, found without looking at the row's ground_truth where that is possible."""

    @abstractmethod
    def wrong(self, row: VerlRow) -> str:
        """A plausible wrong answer in the right form."""


def argument(default: Any, explanation: str, *, ge: int | None = None, le: int | None = None) -> Any:
    """A field of a builder, which becomes an option of its command line: at least `ge` and at most `le`."""
    return Field(default, description=explanation, ge=ge, le=le)


def arguments_of(builder: Builder) -> dict[str, Any]:
    """All arguments by name; together with NAME and VERSION they determine the rows."""
    return dict(builder)


def defaults_of(builder: type[Builder]) -> dict[str, Any]:
    """The default of each argument of a builder."""
    return {name: field.get_default(call_default_factory=True) for name, field in builder.model_fields.items()}


def prompt_text(row: VerlRow) -> str:
    """The text of the row's last message."""
    return str(row["prompt"][-1]["content"])


def ground_truth(row: VerlRow) -> str:
    """The row's right answer."""
    return str(row["reward_model"]["ground_truth"])
