"""A wait for a batch: what came to nothing meanwhile, when to say so, and the file that tells it to others."""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from atropos_exp.runs.waiting import end_waiting, write_waiting

FIRST_WORD = 30.0  # seconds until a wait is spoken of; then each time it has doubled
DROPPED = "groups_dropped_"


class Wait:
    """One wait. `counters` are totals; those of its beginning are subtracted."""

    def __init__(self, step: int, folder: Path, counters: Mapping[str, int]) -> None:
        self._step = step
        self._folder = folder
        self._before = Counter(counters)
        self._since = time.monotonic()
        self._next_word = FIRST_WORD

    @property
    def seconds(self) -> float:
        """How long it has been."""
        return time.monotonic() - self._since

    def happened(self, counters: Mapping[str, int]) -> Counter[str]:
        """What was counted since its beginning."""
        return Counter(counters) - self._before

    def tell(
        self,
        say: Callable[[str], None],
        explain: Callable[[], str],
        counters: Mapping[str, int],
        dropped: Mapping[str, int],
    ) -> None:
        """Write the file, and `say` why it takes so long if that is due. `dropped` are rollouts, by reason."""
        seconds = self.seconds
        cause = explain() if seconds >= self._next_word else None
        if cause is not None:
            self._next_word = 2 * seconds
            say(f"step {self._step} has waited {seconds:.0f} s for rollouts: {cause}")
        write_waiting(self._folder, step=self._step, seconds=seconds, counters=self.happened(counters), dropped=dropped)

    def end(self) -> None:
        """It has come to a good end: nothing need be told any more."""
        end_waiting(self._folder)


def dropped_groups(happened: Mapping[str, int]) -> dict[str, int]:
    """Dropped groups by reason, most frequent first."""
    found = {name.removeprefix(DROPPED): num for name, num in happened.items() if name.startswith(DROPPED)}
    return dict(sorted(found.items(), key=lambda item: -item[1]))
