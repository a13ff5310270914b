"""The ledger is asked about groups that have arrived while the next ones are read: two processes, two cores."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from atropos_exp.parts.atropos.scored_data import ScoredGroup, ScoredSequence
from atropos_exp.types import Provenance

PIECE_TOKENS = 1 << 19  # of the groups that are looked up together

LookUp = Callable[[Sequence[ScoredSequence]], Sequence[Provenance | None]]


@dataclass(eq=False)
class Piece:
    """Groups that are looked up together."""

    groups: list[ScoredGroup] = field(default_factory=list)
    num_tokens: int = 0
    asked: Future[Sequence[Provenance | None]] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Arrived:
    """A group, and where it is looked up."""

    group: ScoredGroup
    piece: Piece
    start: int  # of its sequences among those of the piece


class LookAhead:
    """Looks groups up in the order in which they were added, the last few of them when they are asked for."""

    def __init__(self, look_up: LookUp) -> None:
        self._look_up = look_up
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._piece = Piece()

    def add(self, group: ScoredGroup) -> Arrived:
        """Look the group up, now or later."""
        piece = self._piece
        arrived = Arrived(group, piece, sum(len(before.sequences) for before in piece.groups))
        piece.groups.append(group)
        piece.num_tokens += sum(len(sequence.token_ids) for sequence in group.sequences)
        if piece.num_tokens >= PIECE_TOKENS:
            self._ask()
        return arrived

    def provenances(self, arrived: Arrived) -> Sequence[Provenance | None]:
        """What is known of each sequence of the group. Waits for it."""
        if arrived.piece.asked is None:
            self._ask()
        asked = arrived.piece.asked
        assert asked is not None, "only the piece that is being filled is not asked about"
        return asked.result()[arrived.start : arrived.start + len(arrived.group.sequences)]

    def _ask(self) -> None:
        piece, self._piece = self._piece, Piece()
        piece.asked = self._thread.submit(
            self._look_up, [sequence for group in piece.groups for sequence in group.sequences]
        )
