"""Which task comes next, when several processes share one stream and any of them may be restarted."""

from __future__ import annotations

from dataclasses import dataclass

from atropos_exp.runs.seeds import derive_seed


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamPosition:
    """A position of the stream that this process took."""

    position: int
    seed: int  # of everything random about it


class Stream:
    """Process i of n takes the positions i, n + i, 2 n + i, ...: no two share one.

    A start at step s of the trainer begins at position s × `tasks_per_step`, rounded up to a multiple of n, so that
    a run that goes on does not see its first tasks again. Tasks that a process had taken ahead of the trainer when
    it died may come again; their seeds differ, so their completions do. Same arguments: same places.
    """

    def __init__(self, *, seed: int, process_index: int, num_processes: int, tasks_per_step: int) -> None:
        self._seed = seed
        self._process_index = process_index
        self._num_processes = num_processes
        self._tasks_per_step = tasks_per_step
        self.start(step=0, env_id=0)

    def start(self, *, step: int, env_id: int) -> None:
        """`env_id` is new for every process that registers, so the place of a dead one is drawn with other seeds."""
        self._life = (env_id, step)
        self._block = -(-step * self._tasks_per_step // self._num_processes)

    def next(self) -> StreamPosition:
        position = self._block * self._num_processes + self._process_index
        self._block += 1
        return StreamPosition(position=position, seed=derive_seed(self._seed, "atropos", *self._life, position))
