"""Answers that could not be scored: the first traceback of each kind is told, and only failures end a run."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from atropos_exp.errors import UserError
from atropos_exp.types import Prompt, RewardFailure

log = logging.getLogger(__name__)

# A prompt whose ground truth cannot be read costs its own group; so many in a row are no chance.
MANY_PROMPTS, MANY_ANSWERS = 4, 16


class Failures:
    """What the answers of one reward failed for.

    failures = Failures("Parity")
    failures.tell("error:KeyError", "Traceback ...")  # logged, the first time
    failures.judge(items, results)  # UserError after 16 answers to four prompts, none of which could be scored
    """

    def __init__(self, name: str) -> None:
        """`name`: of the reward's class."""
        self._name = name
        self._traceback = ""  # the last one
        self._said: set[str] = set()
        self._row: Counter[str] = Counter()  # reasons since an answer was scored
        self._prompts: set[str] = set()  # whose answers they were

    def tell(self, reason: str, traceback: str) -> None:
        """Log a traceback, unless one of this reason was logged before."""
        self._traceback = traceback or self._traceback
        if reason not in self._said:
            self._said.add(reason)
            log.warning(
                "reward %s: an answer cannot be scored (%s), so its rollout is dropped and counted. The first of its "
                "kind:\n%s",
                self._name, reason, traceback.rstrip(),
            )  # fmt: skip

    def judge(self, items: Sequence[tuple[str, Prompt]], results: Sequence[float | RewardFailure]) -> None:
        """Raise UserError if nothing could be scored for long. `results` are those of `items`."""
        for (_, prompt), result in zip(items, results, strict=True):
            if isinstance(result, RewardFailure):
                self._row[result.reason] += 1
                self._prompts.add(prompt.prompt_id)
            else:
                self._row.clear()
                self._prompts.clear()
        if len(self._prompts) >= MANY_PROMPTS and self._row.total() >= MANY_ANSWERS:
            reasons = ", ".join(f"{reason} {num}×" for reason, num in self._row.most_common())
            traceback = self._traceback.rstrip()
            last = f", the last one for {traceback.rpartition(chr(10))[2]}" if traceback else ""
            raise UserError(
                f"reward {self._name} could score none of {self._row.total()} answers in a row, to "
                f"{len(self._prompts)} prompts ({reasons}){last}. So there is nothing to train on; mend the reward, or "
                "choose the reward that fits the data" + (f"\n{traceback}" if traceback else "")
            )
