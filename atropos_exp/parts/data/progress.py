"""What is said while reading or tokenising takes longer than a few seconds."""

import time

FIRST_SECONDS, NEXT_SECONDS = 4.0, 15.0


class Progress:
    """Prints how far something is: `Progress("tokenised", "prompts of x.parquet", 170_000).at(8192)`."""

    def __init__(self, done: str, what: str, total: int | None) -> None:
        self._done, self._what, self._total = done, what, total
        self._began = time.monotonic()
        self._next = self._began + FIRST_SECONDS

    def at(self, number: int) -> None:
        """Say so, if it is time, after `number` of the total."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + NEXT_SECONDS
        text = f"{self._done} {number:,}"
        if self._total:
            rest = (now - self._began) / max(1, number) * (self._total - number)
            text += f" of {self._total:,} {self._what}, about {rest:.0f} s more"
        else:
            text += f" {self._what}"
        print(text, flush=True)
